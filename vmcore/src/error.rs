//! Errors while a dump is read, grouped by their cause.

use std::io;

/// Why a dump cannot be read, as a whole or at one offset.
///
/// Offsets are bytes in the dump's file; for a flattened file, in the file that it describes.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// A system call failed.
    #[error("reading at byte {offset}: {source}")]
    Io {
        /// Offset, bytes.
        offset: u64,
        /// The system's error.
        source: io::Error,
    },
    /// The file violates its own format.
    #[error("damaged at byte {offset}: {what}")]
    Damaged {
        /// Offset of the invalid value, bytes.
        offset: u64,
        /// The violated rule.
        what: &'static str,
    },
    /// The file is shorter than it claims.
    #[error("truncated: {what} is at byte {offset}, but the file has {file_bytes}")]
    CutOff {
        /// Offset of the first missing byte.
        offset: u64,
        /// The missing data.
        what: &'static str,
        /// Length of the file.
        file_bytes: u64,
    },
    /// Not a dump in a known format.
    #[error("not a vmcore: {0}")]
    NotADump(&'static str),
    /// A dump of an unsupported type.
    #[error("unsupported vmcore: {0}")]
    Unsupported(&'static str),
}

/// Why memory at an address cannot be read from a dump.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The machine had no memory there, or the dump does not describe it.
    #[error("physical address {phys:#x} is not in the dump")]
    Absent {
        /// The physical address.
        phys: u64,
    },
    /// The machine had memory there, but the dump omits it.
    #[error("the page at physical address {phys:#x} was left out of the dump")]
    LeftOut {
        /// The physical address.
        phys: u64,
    },
    /// No page table maps the address.
    #[error("virtual address {virt:#x} is not mapped: the level {level} page table has no entry")]
    NotMapped {
        /// The virtual address.
        virt: u64,
        /// Level of the table where the walk ends: 5 to 1.
        level: u8,
    },
    /// The file itself cannot be read at that place.
    #[error(transparent)]
    Dump(#[from] DumpError),
}
