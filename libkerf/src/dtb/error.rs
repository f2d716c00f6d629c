use thiserror::Error;

use super::MAX_BLOB_BYTES;
use crate::tree::{MAX_DEPTH, MAX_NAME_BYTES};

/// Why bytes are no device tree, and where.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("device tree blob, byte {offset:#x}: {fault}")]
pub struct DtbError {
    /// Where in the blob.
    pub offset: usize,
    /// The fault.
    pub fault: DtbFault,
}

/// A fault of a blob.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DtbFault {
    /// There are fewer bytes than a header, or than the header says.
    #[error("{have} bytes where {need} are needed: the file is truncated")]
    Short {
        /// Bytes that are there.
        have: usize,
        /// Bytes that are needed.
        need: usize,
    },
    /// More than [`MAX_BLOB_BYTES`].
    #[error("{0} bytes; the kernel takes at most {MAX_BLOB_BYTES}")]
    TooLarge(usize),
    /// It does not start as a blob does.
    #[error("not a device tree blob: it starts with {0:#010x} instead of 0xd00dfeed")]
    Magic(u32),
    /// A version of the format that is not read.
    #[error(
        "unsupported version {version}, readable as {last_compatible}; version 17 is supported"
    )]
    Version {
        /// The header's version.
        version: u32,
        /// The oldest version it is readable as.
        last_compatible: u32,
    },
    /// A block lies outside the blob.
    #[error("the {block} lies outside the blob: {size} bytes at {start:#x}")]
    Block {
        /// Which block.
        block: &'static str,
        /// Where the header puts it.
        start: usize,
        /// How long the header says it is.
        size: usize,
    },
    /// A block that must be aligned is not.
    #[error("the {0} is not aligned")]
    Alignment(&'static str),
    /// Something that the format has no meaning for.
    #[error("unknown token {0:#x}")]
    Token(u32),
    /// The structure ends before it is complete.
    #[error("the structure ends inside {0}")]
    Ends(&'static str),
    /// A part stands where it may not.
    #[error("{0}")]
    Order(&'static str),
    /// A name is not ended, is too long, or is no UTF-8.
    #[error("the name of a {0} has no end, is not UTF-8, or is longer than {MAX_NAME_BYTES} bytes")]
    Name(&'static str),
    /// More than [`MAX_DEPTH`] nodes within each other.
    #[error("more than {MAX_DEPTH} nested nodes")]
    Depth,
    /// A name cannot be written: it holds a NUL or a slash, or is too long.
    #[error("{0:?} cannot be a name: it is empty or too long, or holds a NUL or a slash")]
    Unwritable(String),
}
