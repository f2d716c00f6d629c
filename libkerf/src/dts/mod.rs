//! Device tree source (DTS): text to [`DeviceTree`](crate::tree::DeviceTree) and back.
//!
//! The language is that of dtc 1.6 without `/include/`, `/incbin/` and `/plugin/`: a multikernel tree is one file,
//! and its overlays name their targets by path. The same source results in the same bytes as with dtc.

mod draft;
mod error;
mod expression;
mod parse;
mod print;
mod resolve;
mod scan;
mod value;

pub use error::{DtsError, DtsFault, Position};
pub use parse::{read, read_while};
pub use print::{Unprintable, write};

/// Maximum size of a source, in bytes.
pub const MAX_TEXT_BYTES: usize = 2 << 20;
