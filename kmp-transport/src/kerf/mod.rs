//! kerf-vsock (`docs/kerf-vsock.md`) in user space: this module creates the shared memory, serves it with doorbells
//! to the guests that QEMU runs, and acts as the host, a peer that connects to them.
//!
//! ```text
//!   DoorbellServer ── Unix socket for each guest: the memory, everybody's doorbells ──▶ QEMU
//!         │                                                                            │
//!         └── SharedMemory (memfd) ◀── BAR 2 of the guest's ivshmem-doorbell device ◀──┘
//! ```

mod bridge;
mod connection;
mod doorbell;
mod host;
mod memory;
mod packet;

pub use bridge::serve;
pub use doorbell::{DoorbellServer, HOST, Listening};
pub use host::{Host, HostStream};
pub use memory::SharedMemory;

/// The only guest of a memory of its own, as `kmorph-kerf-host` makes it.
pub const GUEST: u32 = 1;
/// The vectors of that guest's device.
pub const VECTORS: u32 = 2;
