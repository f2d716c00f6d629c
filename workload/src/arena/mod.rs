//! Position-independent memory in a memfd, which two processes can map.
//!
//! All references inside are offsets from the start, so a successor serves directly from its predecessor's memory,
//! mapped at any address. The layout is in [`layout`]; it is versioned, and a process refuses an unknown version.
//!
//! One word in the header determines which process may write, see `ownership`. Every word that is read is untrusted:
//! an invalid offset results in [`ArenaError::Corrupt`], never in a memory fault.

mod alloc;
mod dirty;
pub mod layout;
mod map;
mod ownership;

use std::io;

pub use map::Mapping;
pub use ownership::{Ownership, OwnershipPhase};

/// Minimum size of an arena, in bytes.
pub const MIN_CAPACITY: u64 = 1 << 20;
/// Maximum size of an arena, in bytes.
pub const MAX_CAPACITY: u64 = 1 << 44;

/// Why an operation on an arena failed.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// No free block is large enough.
    #[error("the arena is full")]
    Full,
    /// Another process owns the arena, or it is frozen.
    #[error("the arena is not ours to write: {0:?}")]
    NotOwner(Ownership),
    /// The memory contains an impossible value.
    #[error("the arena is damaged: {what} at offset {offset:#x}")]
    Corrupt {
        /// The data being read.
        what: &'static str,
        /// Its offset.
        offset: u64,
    },
    /// An unknown version wrote the memory, or it is not an arena.
    #[error("not an arena this program can read: {0}")]
    Incompatible(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// The attempted action.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// Result of an arena operation.
pub type Result<T> = std::result::Result<T, ArenaError>;

/// Returns an index into memory. Every offset fits: the crate builds for 64-bit targets only.
#[allow(clippy::cast_possible_truncation)]
pub(crate) const fn index(offset: u64) -> usize {
    offset as usize
}
