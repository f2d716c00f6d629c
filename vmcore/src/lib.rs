//! Vmcores: files with the memory of a kernel that died.
//!
//! This crate reads, writes and analyses them. It may read and write files, start threads, and run drgn. It does not
//! communicate with a daemon, an instance or QEMU, and is independent of KMP. It supports x86_64 only.
//!
//! ```text
//! bytes ─▶ dump ─────────────▶ memory ─▶ kernel (page tables) ─▶ log, symbols, pages ─▶ analysis
//!  file     ELF, kdump,         by          VMCOREINFO
//!           flattened; notes    physical  └──────────────────▶ writer ─▶ ELF, kdump-compressed
//!                               address
//! ```
//!
//! The contents of a dump come from a machine that failed, and the file from anywhere: [`dump`] lists the guarantees
//! for hostile files.

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
