use thiserror::Error;

use super::MAX_BLOB_BYTES;
use crate::tree::{MAX_DEPTH, MAX_NAME_BYTES};

/// Why bytes are not a device tree, and the position of the fault.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("device tree blob, byte {offset:#x}: {fault}")]
pub struct DtbError {
    /// Offset in the blob.
    pub offset: usize,
    /// The fault.
    pub fault: DtbFault,
}

/// A fault of a blob.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DtbFault {
    /// The blob is shorter than a header, or than its header states.
    #[error("{have} bytes where {need} are needed: the file is truncated")]
    Short {
        /// Actual number of bytes.
        have: usize,
        /// Required number of bytes.
        need: usize,
    },
    /// The blob is larger than [`MAX_BLOB_BYTES`].
    #[error("{0} bytes; the kernel takes at most {MAX_BLOB_BYTES}")]
    TooLarge(usize),
    /// The blob has the wrong magic number.
    #[error("not a device tree blob: it starts with {0:#010x} instead of 0xd00dfeed")]
    Magic(u32),
    /// The version of the format is not supported.
    #[error(
        "unsupported version {version}, readable as {last_compatible}; version 17 is supported"
    )]
    Version {
        /// The header's version.
        version: u32,
        /// The oldest compatible version.
        last_compatible: u32,
    },
    /// A block is outside the blob.
    #[error("the {block} lies outside the blob: {size} bytes at {start:#x}")]
    Block {
        /// The block.
        block: &'static str,
        /// Its start, according to the header.
        start: usize,
        /// Its size, according to the header.
        size: usize,
    },
    /// A block is not aligned.
    #[error("the {0} is not aligned")]
    Alignment(&'static str),
    /// A token is undefined.
    #[error("unknown token {0:#x}")]
    Token(u32),
    /// The structure block ends early.
    #[error("the structure ends inside {0}")]
    Ends(&'static str),
    /// A part is in the wrong place.
    #[error("{0}")]
    Order(&'static str),
    /// A name is not terminated, is too long, or is not UTF-8.
    #[error("the name of a {0} has no end, is not UTF-8, or is longer than {MAX_NAME_BYTES} bytes")]
    Name(&'static str),
    /// Nodes are nested deeper than [`MAX_DEPTH`].
    #[error("more than {MAX_DEPTH} nested nodes")]
    Depth,
    /// A name cannot be written: it contains a NUL or a slash, or is too long.
    #[error("{0:?} cannot be a name: it is empty or too long, or holds a NUL or a slash")]
    Unwritable(String),
}
