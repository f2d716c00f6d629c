//! A hash table of keys and values in an arena, served by one owner after another.
//!
//! All of it is in the arena, so a successor has nothing to rebuild. The table grows by linear hashing (Litwin 1980):
//! it splits one bucket at a time, so no insertion has to move the whole table.
//!
//! Invariants for the owner of the arena:
//! - each change happens between two increments of the change counter, which is odd in between;
//! - the content digest is the wrapping sum of the fingerprints of all entries, so it depends only on the contents,
//!   not on their place or order.

mod entry;
mod expiry;
mod table;
mod verify;

use std::hash::{BuildHasher, RandomState};
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::arena::layout::{self, word};
use crate::arena::{ArenaError, Mapping, Ownership, OwnershipPhase, Result};
use crate::handover::message::StateDigest;

pub use entry::MAX_KEY_BYTES;
pub use verify::Verified;

/// Milliseconds since the Unix epoch.
pub type UnixMillis = u64;

/// The effect of a write on a key's expiry time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// The key does not expire.
    Never,
    /// The expiry time does not change.
    Keep,
    /// The key expires at this time.
    At(UnixMillis),
}

/// The expiry of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeToLive {
    /// The key does not exist.
    NoKey,
    /// The key does not expire.
    Never,
    /// The remaining time, milliseconds.
    Millis(u64),
}

/// The store. Single-threaded; one owner at a time, see [`crate::arena::Ownership`].
#[derive(Debug)]
pub struct Store {
    map: Mapping,
    /// The epoch in which this process owns, or last owned, the arena; 0 if it never did.
    epoch: u64,
}

impl Store {
    /// Creates an empty store in a new arena, owned by this process.
    ///
    /// # Errors
    /// [`ArenaError::Incompatible`] for a capacity out of range; else the system's error.
    pub fn create(capacity: u64) -> Result<Self> {
        let mut map = Mapping::create(capacity)?;
        map.put(word::MAGIC, layout::MAGIC)?;
        map.put(word::VERSION, layout::VERSION)?;
        map.put(word::CAPACITY, capacity)?;
        // A random key from the system: clients cannot choose keys that collide.
        for place in [word::HASH_KEY_0, word::HASH_KEY_1] {
            map.put(place, RandomState::new().hash_one(place))?;
        }
        let slots = layout::directory_slots(capacity);
        map.put(word::DIRECTORY_SLOTS, slots)?;
        let mut store = Self { map, epoch: 1 };
        store.format()?;
        let from = Ownership {
            epoch: 0,
            phase: OwnershipPhase::Empty,
        };
        store.map.change_owner(from, store.serving())?;
        Ok(store)
    }

    /// Creates space for the copy of an arena of `capacity` bytes. The copy is not a store yet: fill it with
    /// [`Store::apply`], check it with [`Store::check_header`], then [`Store::claim`] it.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn awaiting(capacity: u64) -> Result<Self> {
        let map = Mapping::create(capacity)?;
        Ok(Self { map, epoch: 0 })
    }

    /// Maps the arena of another process, which owns it until [`Store::claim`].
    ///
    /// # Errors
    /// [`ArenaError::Incompatible`] if it is not an arena of a known version.
    pub fn open(fd: OwnedFd, len: u64) -> Result<Self> {
        let map = Mapping::open(fd, len)?;
        let store = Self { map, epoch: 0 };
        store.check_header()?;
        Ok(store)
    }

    fn serving(&self) -> Ownership {
        Ownership {
            epoch: self.epoch,
            phase: OwnershipPhase::Serving,
        }
    }

    fn frozen(&self) -> Ownership {
        Ownership {
            epoch: self.epoch,
            phase: OwnershipPhase::Frozen,
        }
    }

    /// Freezes the arena: from now on this process may not write, and the next owner may claim it.
    ///
    /// # Errors
    /// [`ArenaError::NotOwner`].
    pub fn freeze(&mut self) -> Result<StateDigest> {
        self.map.change_owner(self.serving(), self.frozen())?;
        self.state()
    }

    /// Takes a frozen arena back.
    ///
    /// # Errors
    /// [`ArenaError::NotOwner`] when a successor has claimed it.
    pub fn resume(&mut self) -> Result<()> {
        self.map.change_owner(self.frozen(), self.serving())
    }

    /// Makes this process the owner of an arena that its owner has frozen.
    ///
    /// # Errors
    /// [`ArenaError::NotOwner`] if it is not frozen, for example because it was resumed, or claimed by another process.
    pub fn claim(&mut self) -> Result<()> {
        let found = self.map.ownership()?;
        if found.phase != OwnershipPhase::Frozen {
            return Err(ArenaError::NotOwner(found));
        }
        let claimed = Ownership {
            epoch: found.epoch + 1,
            phase: OwnershipPhase::Serving,
        };
        self.map.change_owner(found, claimed)?;
        self.epoch = claimed.epoch;
        Ok(())
    }

    /// Returns whether this process may write and answer.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.map.is_serving(self.epoch)
    }

    /// Returns the number of owners so far, including this one; 0 before [`Store::claim`].
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Returns the memfd, to pass to another process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.map.fd()
    }

    /// Returns the size of the arena in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.map.len()
    }

    /// Returns the size of the memory that was ever in use, in bytes; all memory beyond it is zero.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn touched_bytes(&self) -> Result<u64> {
        Ok(self.map.get(word::TOUCHED_END)?.min(self.map.len()))
    }

    /// Returns the number of keys, including expired keys that were not removed yet.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn keys(&self) -> Result<u64> {
        self.map.get(word::KEYS)
    }

    /// Returns the number of keys with an expiry time.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn keys_with_expiry(&self) -> Result<u64> {
        self.map.get(word::KEYS_WITH_EXPIRY)
    }

    /// Returns the current ownership of the arena.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn ownership(&self) -> Result<Ownership> {
        self.map.ownership()
    }

    /// Returns the digest of the contents.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn state(&self) -> Result<StateDigest> {
        Ok(StateDigest {
            digest: self.map.get(word::DIGEST)?,
            counter: self.map.get(word::COUNTER)? / 2,
            used_bytes: self.map.get(word::USED_BYTES)?,
        })
    }

    /// See [`Mapping::prefault`].
    ///
    /// # Errors
    /// The system's error.
    pub fn prefault(&self, start: u64, end: u64) -> Result<()> {
        self.map.prefault(start, end)
    }

    /// Begins to track writes; everything in use counts as written.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn track_dirty(&mut self) -> Result<()> {
        let end = self.touched_bytes()?;
        self.map.track_dirty(end);
        Ok(())
    }

    /// Stops tracking writes.
    pub fn stop_tracking(&mut self) {
        self.map.stop_tracking();
    }

    /// Returns the number of bytes to copy, see [`Store::read_dirty`].
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.map.dirty_bytes()
    }

    /// Takes the next run of written bytes, at most `max_bytes`, with its offset. Returns `None` if
    /// nothing is left.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn read_dirty(&mut self, max_bytes: u64) -> Result<Option<(u64, &[u8])>> {
        self.map.take_dirty(max_bytes)
    }

    /// Copies bytes of [`Store::read_dirty`] to their place.
    ///
    /// # Errors
    /// [`ArenaError::NotOwner`] once the arena has been claimed, [`ArenaError::Corrupt`] for a
    /// range out of bounds.
    pub fn apply(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.epoch != 0 {
            return Err(ArenaError::NotOwner(self.map.ownership()?));
        }
        self.map.write(offset, bytes)
    }

    /// Returns the number of bytes written by this process.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.map.written_bytes()
    }

    /// Clears the heap and the table. The hash key stays.
    fn format(&mut self) -> Result<()> {
        for place in [
            word::DIGEST,
            word::KEYS,
            word::KEYS_WITH_EXPIRY,
            word::SPLIT_BUCKET,
            word::EXPIRY_CURSOR,
        ] {
            self.map.put(place, 0)?;
        }
        self.map.put(word::TABLE_LEVEL, layout::FIRST_TABLE_LEVEL)?;
        let slots = layout::directory_slots(self.map.len());
        self.map.zero(layout::DIRECTORY, slots * 8)?;
        self.map.format_heap()?;
        self.add_segment(0)
    }

    /// Performs one change between two increments of the counter.
    fn change<T>(&mut self, change: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if !self.is_owner() {
            return Err(ArenaError::NotOwner(self.map.ownership()?));
        }
        let counter = self.map.get(word::COUNTER)?;
        self.map.put(word::COUNTER, counter.wrapping_add(1))?;
        let result = change(self);
        // Leave the counter odd if the memory is damaged: no process may trust it after that.
        if matches!(result, Ok(_) | Err(ArenaError::Full)) {
            self.map.put(word::COUNTER, counter.wrapping_add(2))?;
        }
        result
    }

    /// Removes all keys, in constant time.
    ///
    /// # Errors
    /// [`ArenaError::NotOwner`], [`ArenaError::Corrupt`].
    pub fn flush(&mut self) -> Result<()> {
        self.change(Self::format)
    }
}
