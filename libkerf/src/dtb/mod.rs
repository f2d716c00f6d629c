//! Flattened device trees (DTB): bytes to [`DeviceTree`](crate::tree::DeviceTree) and back.

mod ends;
mod error;
mod read;
mod write;

pub use error::{DtbError, DtbFault};
pub use read::read;
pub use write::write;

/// Maximum size of a blob, in bytes: the kernel accepts no more in one write.
pub const MAX_BLOB_BYTES: usize = 1 << 20;

const MAGIC: u32 = 0xd00d_feed;
/// The supported version, which is also the oldest version that a reader of a written blob must support.
const VERSION: u32 = 17;
const LAST_COMPATIBLE: u32 = 16;
const HEADER_BYTES: usize = 40;

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;
