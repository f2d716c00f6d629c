//! The layout of the arena, version 1. All words are 64-bit in native byte order.
//!
//! ```text
//!   0x0000  magic            0x0008  layout version     0x0010  capacity in bytes
//!   0x0018  ownership word   0x0020  change counter     0x0028  content digest
//!   0x0030  bytes in use     0x0038  keys               0x0040  keys that expire
//!   0x0048  touched end      0x0050  hash key (2 words)
//!   0x0060  table level      0x0068  next bucket to split
//!   0x0070  directory slots  0x0078  expiry cursor      0x0080  first-level bitmap
//!   0x0100  second-level bitmaps, one word per first level
//!   0x0400  free list heads, FIRST_LEVELS x SECOND_LEVELS words
//!   0x2000  directory: offsets of bucket segments, 0 where there is none
//!   heap    blocks, back to back up to the capacity
//! ```
//!
//! The change counter is odd while a change is in progress; an arena with an odd counter was left by a process that
//! died during a change, and is refused.

/// `KMORPHA1` in memory order on a little-endian machine.
pub const MAGIC: u64 = u64::from_le_bytes(*b"KMORPHA1");
/// Layout version.
pub const VERSION: u64 = 1;

/// Offsets of the header words.
#[allow(missing_docs)]
pub mod word {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x08;
    pub const CAPACITY: u64 = 0x10;
    pub const OWNERSHIP: u64 = 0x18;
    pub const COUNTER: u64 = 0x20;
    pub const DIGEST: u64 = 0x28;
    pub const USED_BYTES: u64 = 0x30;
    pub const KEYS: u64 = 0x38;
    pub const KEYS_WITH_EXPIRY: u64 = 0x40;
    pub const TOUCHED_END: u64 = 0x48;
    pub const HASH_KEY_0: u64 = 0x50;
    pub const HASH_KEY_1: u64 = 0x58;
    pub const TABLE_LEVEL: u64 = 0x60;
    pub const SPLIT_BUCKET: u64 = 0x68;
    pub const DIRECTORY_SLOTS: u64 = 0x70;
    pub const EXPIRY_CURSOR: u64 = 0x78;
    pub const FIRST_BITMAP: u64 = 0x80;
    pub const SECOND_BITMAPS: u64 = 0x100;
    pub const FREE_HEADS: u64 = 0x400;
}

/// Number of size classes by power of two.
pub const FIRST_LEVELS: u64 = 40;
/// Number of classes within a power of two.
pub const SECOND_LEVELS: u64 = 16;
/// Offset of the directory.
pub const DIRECTORY: u64 = 0x2000;
/// Number of buckets in one segment of the table.
pub const SEGMENT_BUCKETS: u64 = 4096;
/// log2 of [`SEGMENT_BUCKETS`]: the initial level of a table.
pub const FIRST_TABLE_LEVEL: u64 = 12;

const _: () = assert!(word::SECOND_BITMAPS + FIRST_LEVELS * 8 <= word::FREE_HEADS);
const _: () = assert!(word::FREE_HEADS + FIRST_LEVELS * SECOND_LEVELS * 8 <= DIRECTORY);
const _: () = assert!(1 << FIRST_TABLE_LEVEL == SEGMENT_BUCKETS);

/// Returns the number of directory slots for an arena of `capacity` bytes: one bucket for each 64
/// bytes, so that the table can grow as long as there is space for keys.
#[must_use]
pub const fn directory_slots(capacity: u64) -> u64 {
    capacity / (64 * SEGMENT_BUCKETS) + 1
}

/// Returns the offset of the heap in an arena of `capacity` bytes.
#[must_use]
pub const fn heap_start(capacity: u64) -> u64 {
    (DIRECTORY + directory_slots(capacity) * 8).next_multiple_of(64)
}
