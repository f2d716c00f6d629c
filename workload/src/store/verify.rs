//! Checks an arena that another process wrote.

use std::time::{Duration, Instant};

use super::Store;
use super::entry::{Entry, crc};
use crate::arena::layout::{self, word};
use crate::arena::{ArenaError, Result};

/// Number of value bytes between two checks of the clock.
const CLOCK_BYTES: u64 = 64 * 1024;
/// Minimum rate of a checksum, in bytes per nanosecond: determines whether a large value still fits
/// into the budget.
const BYTES_PER_NS: u128 = 1;

/// The progress of a check of the contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Number of checked keys.
    pub keys: u64,
    /// Total number of keys.
    pub of: u64,
}

impl Verified {
    /// Returns whether all keys were checked, and so the digest.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.keys == self.of
    }
}

impl Store {
    /// Checks the parts that are constant even while the owner writes: that this is an arena of a
    /// known version, of this size, with valid bounds.
    ///
    /// # Errors
    /// [`ArenaError::Incompatible`], [`ArenaError::Corrupt`].
    pub fn check_header(&self) -> Result<()> {
        let incompatible = |text: String| Err(ArenaError::Incompatible(text));
        let capacity = self.map.len();
        if self.map.get(word::MAGIC)? != layout::MAGIC {
            return incompatible("the arena does not begin with its magic".to_owned());
        }
        let version = self.map.get(word::VERSION)?;
        if version != layout::VERSION {
            let known = layout::VERSION;
            return incompatible(format!(
                "layout version {version}; only {known} is supported"
            ));
        }
        let claimed = self.map.get(word::CAPACITY)?;
        if claimed != capacity {
            return incompatible(format!(
                "the header says {claimed} bytes, but the arena has {capacity}"
            ));
        }
        if self.map.get(word::DIRECTORY_SLOTS)? != layout::directory_slots(capacity) {
            return Err(ArenaError::Corrupt {
                what: "directory size",
                offset: word::DIRECTORY_SLOTS,
            });
        }
        self.map.ownership()?;
        self.buckets().map(drop)
    }

    /// Checks that no change was left incomplete.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn check_settled(&self) -> Result<()> {
        if self.map.get(word::COUNTER)? % 2 == 0 {
            return Ok(());
        }
        Err(ArenaError::Corrupt {
            what: "change that was never finished",
            offset: word::COUNTER,
        })
    }

    /// Walks a frozen arena for at most `budget`: every entry is in the bucket of its key and its
    /// value has its checksum. A complete walk also checks the number of keys and the digest.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn verify_content(&self, budget: Duration) -> Result<Verified> {
        let begin = Instant::now();
        let of = self.keys()?;
        let mut keys = 0;
        let mut digest = 0u64;
        let mut unclocked = 0;
        let mut spent = false;
        for bucket in 0..self.buckets()? {
            // An empty bucket takes time too.
            unclocked += 64;
            self.visit_bucket(bucket, |found| {
                unclocked += found.entry.value_len + 64;
                if unclocked >= CLOCK_BYTES {
                    unclocked = 0;
                    let need = u128::from(found.entry.value_len) / BYTES_PER_NS;
                    spent = spent || begin.elapsed().as_nanos() + need >= budget.as_nanos();
                }
                if !spent {
                    self.check_entry(&found.entry, bucket)?;
                    digest = digest.wrapping_add(found.entry.fingerprint());
                    keys += 1;
                }
                Ok(())
            })?;
            if spent {
                return Ok(Verified { keys, of });
            }
        }
        let corrupt = |what, offset| Err(ArenaError::Corrupt { what, offset });
        if keys != of {
            return corrupt("number of keys", word::KEYS);
        }
        if digest != self.map.get(word::DIGEST)? {
            return corrupt("content digest", word::DIGEST);
        }
        Ok(Verified { keys, of })
    }

    fn check_entry(&self, entry: &Entry, bucket: u64) -> Result<()> {
        let corrupt = |what| {
            Err(ArenaError::Corrupt {
                what,
                offset: entry.at,
            })
        };
        let key = self.map.bytes(entry.key_at(), entry.key_len)?;
        if self.hash(key)? != entry.hash {
            return corrupt("key's hash");
        }
        if self.bucket_index(entry.hash)? != bucket {
            return corrupt("key's bucket");
        }
        let value = self.map.bytes(entry.value_at(), entry.value_len)?;
        if crc(&[value]) != entry.value_crc {
            return corrupt("value's checksum");
        }
        Ok(())
    }
}
