//! Errors while a dump is read, grouped by their cause.

use std::io;

/// Why a dump cannot be read, or not at one place.
///
/// Offsets are bytes in the dump's file; for a flattened file, in the file that it describes.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The system refused.
    #[error("reading at byte {offset}: {source}")]
    Io {
        /// Offset, bytes.
        offset: u64,
        /// The system's error.
        source: io::Error,
    },
    /// The file breaks the rules of its own format.
    #[error("damaged at byte {offset}: {what}")]
    Damaged {
        /// Offset of the invalid value, bytes.
        offset: u64,
        /// Which rule is broken.
        what: &'static str,
    },
    /// The file ends before what it refers to.
    #[error("truncated: {what} is at byte {offset}, but the file has {file_bytes}")]
    CutOff {
        /// First byte of what is missing.
        offset: u64,
        /// The missing data.
        what: &'static str,
        /// Length of the file.
        file_bytes: u64,
    },
    /// No dump of a format that is read here.
    #[error("not a vmcore: {0}")]
    NotADump(&'static str),
    /// A dump, but of a kind that is not read here.
    #[error("unsupported vmcore: {0}")]
    Unsupported(&'static str),
}

/// Why memory at an address cannot be had from a dump.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The machine had no memory there, or the dump does not know of it.
    #[error("physical address {phys:#x} is not in the dump")]
    Absent {
        /// The physical address.
        phys: u64,
    },
    /// The machine had memory there, and the dump was made without it.
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
        /// The table in which the way ends: 5 to 1.
        level: u8,
    },
    /// The file itself cannot be read there.
    #[error(transparent)]
    Dump(#[from] DumpError),
}
