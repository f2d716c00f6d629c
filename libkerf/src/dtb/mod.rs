//! Flattened device trees (DTB): bytes to [`DeviceTree`](crate::tree::DeviceTree) and back.

mod ends;
mod error;
mod read;
mod write;

pub use error::{DtbError, DtbFault};
pub use read::read;
pub use write::write;

/// The largest blob that is read or written, in bytes: what the kernel takes in one write.
pub const MAX_BLOB_BYTES: usize = 1 << 20;

const MAGIC: u32 = 0xd00d_feed;
/// The version that is read and written, and the oldest reader that understands what is written.
const VERSION: u32 = 17;
const LAST_COMPATIBLE: u32 = 16;
const HEADER_BYTES: usize = 40;

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;
