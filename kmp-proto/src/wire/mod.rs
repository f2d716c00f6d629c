//! The fixed part of the protocol: header, message types, limits, error codes, records.

pub(crate) mod field;
mod header;
pub(crate) mod record;
mod types;

pub use field::Layout;
pub use header::{HEADER_BYTES, Header, HeaderError, MAGIC, RawHeader, VERSION};
pub use record::RECORD_KINDS;
pub use types::{ErrorCode, MsgType, PAYLOAD_MAX_BYTES, REPLY_BIT};
