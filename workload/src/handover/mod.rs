//! The handover socket, between an agent and its workload, and the transfer of state between two workloads.
//!
//! The agent starts the workload with one end of a Unix SEQPACKET socket pair, named in [`AGENT_FD_ENV`]. Each packet
//! is a JSON message, then raw data, with descriptors attached; all sizes are bounded. [`message`] shows the sequence
//! of a whole morph.

#[cfg(feature = "tokio")]
mod agent_end;
pub mod message;
mod packet;
mod spawn;
pub mod table;

#[cfg(feature = "tokio")]
pub use agent_end::{AgentEnd, AgentEndError};
pub use packet::{HandoverError, Incoming, Packet, PacketSocket};
pub use spawn::{ActivatedListener, attach};

/// Environment variable with the number of the workload's end of the handover socket.
pub const AGENT_FD_ENV: &str = "KMORPH_AGENT_FD";
/// Most bytes of JSON in a packet.
pub const MAX_JSON_BYTES: usize = 32 * 1024;
/// Most bytes of data in a packet, and so in one chunk of memory.
pub const MAX_CHUNK_BYTES: usize = 64 * 1024;
/// Most descriptors in a packet. The kernel's own limit is 253.
pub const MAX_FDS_PER_PACKET: usize = 128;
/// Most connections that move in one morph.
pub const MAX_CONNECTIONS: usize = 10_000;
/// Largest connection table, in bytes: what may be buffered for all connections together.
pub const MAX_TABLE_BYTES: u64 = 1 << 30;
