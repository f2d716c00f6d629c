//! Vmcores: the memory of a kernel that died, as a file.
//!
//! This crate reads them, writes them, and says what is in them. It may read and write files and start
//! threads, and run drgn; it may not talk to a daemon, an instance or QEMU, and knows nothing of KMP. x86_64 only.
//!
//! ```text
//! bytes ─▶ dump ─────────────▶ memory ─▶ kernel (page tables) ─▶ log, symbols, pages ─▶ analysis
//!  file     ELF, kdump,         by          VMCOREINFO
//!           flattened; notes    physical  └──────────────────▶ writer ─▶ ELF, kdump-compressed
//!                               address
//! ```
//!
//! What a dump holds comes from a machine that failed, and the file from anywhere: see [`dump`] for what
//! is promised about hostile ones.

#![forbid(unsafe_code)]

pub mod analysis;
pub mod bytes;
mod checksum;
pub mod compression;
pub mod dump;
pub mod error;
pub mod kernel;
pub mod memory;
pub mod paced;
pub mod writer;

pub use dump::{ChecksumState, Completeness, Dump, Format};
pub use error::{DumpError, MemoryError};
pub use memory::{MemoryFile, MemoryPart, PhysRange, PhysicalMemory};
