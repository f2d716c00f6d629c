//! Removes expired keys incrementally.

use super::{Store, UnixMillis};
use crate::arena::Result;
use crate::arena::layout::word;

impl Store {
    /// Scans `buckets` buckets, from the end of the last call on, and removes their expired keys.
    /// Returns the number of removed keys.
    ///
    /// # Errors
    /// [`crate::arena::ArenaError::NotOwner`], [`crate::arena::ArenaError::Corrupt`].
    pub fn expire_some(&mut self, buckets: u64, now: UnixMillis) -> Result<u64> {
        if self.map.get(word::KEYS_WITH_EXPIRY)? == 0 {
            return Ok(0);
        }
        let total = self.buckets()?;
        let mut cursor = self.map.get(word::EXPIRY_CURSOR)? % total;
        let mut removed = 0;
        for _ in 0..buckets.min(total) {
            removed += self.expire_bucket(cursor, now)?;
            cursor = (cursor + 1) % total;
        }
        self.change(|store| store.map.put(word::EXPIRY_CURSOR, cursor))?;
        Ok(removed)
    }

    fn expire_bucket(&mut self, bucket: u64, now: UnixMillis) -> Result<u64> {
        let mut removed = 0;
        loop {
            let mut expired = None;
            self.visit_bucket(bucket, |found| {
                if found.entry.is_expired(now) {
                    expired.get_or_insert(found);
                }
                Ok(())
            })?;
            let Some(found) = expired else {
                return Ok(removed);
            };
            self.change(|store| store.unlink(found))?;
            removed += 1;
        }
    }
}
