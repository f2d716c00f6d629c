//! The table: buckets in segments, found through a directory, growing one bucket at a time.
//!
//! With level `l` and split bucket `s` there are `2^l + s` buckets. A hash belongs to bucket `h mod 2^l`, or `h mod
//! 2^(l+1)` if that bucket has already been split (is below `s`). Buckets are only split, never merged, and an entry
//! only moves to a higher bucket: a scan in ascending order meets every key that exists from its start to its end.

use super::Store;
use super::entry::Found;
use crate::arena::layout::{DIRECTORY, FIRST_TABLE_LEVEL, SEGMENT_BUCKETS, word};
use crate::arena::{ArenaError, Result};

/// Maximum size of a table, as a power of two.
const MAX_TABLE_LEVEL: u64 = 40;

impl Store {
    fn level_and_split(&self) -> Result<(u64, u64)> {
        let level = self.map.get(word::TABLE_LEVEL)?;
        let split = self.map.get(word::SPLIT_BUCKET)?;
        if !(FIRST_TABLE_LEVEL..=MAX_TABLE_LEVEL).contains(&level) || split >> level != 0 {
            return Err(ArenaError::Corrupt {
                what: "table size",
                offset: word::TABLE_LEVEL,
            });
        }
        Ok((level, split))
    }

    /// Returns the number of buckets.
    pub(super) fn buckets(&self) -> Result<u64> {
        let (level, split) = self.level_and_split()?;
        Ok((1 << level) + split)
    }

    /// Returns the offset of the head word of a hash's bucket.
    pub(super) fn bucket(&self, hash: u64) -> Result<u64> {
        self.bucket_word(self.bucket_index(hash)?)
    }

    pub(super) fn bucket_index(&self, hash: u64) -> Result<u64> {
        let (level, split) = self.level_and_split()?;
        let index = hash & ((1 << level) - 1);
        Ok(if index < split {
            hash & ((2 << level) - 1)
        } else {
            index
        })
    }

    pub(super) fn bucket_word(&self, bucket: u64) -> Result<u64> {
        let slot = bucket / SEGMENT_BUCKETS;
        let segment = self.directory(slot)?;
        if segment == 0 {
            return Err(ArenaError::Corrupt {
                what: "table segment",
                offset: DIRECTORY + slot * 8,
            });
        }
        Ok(segment.wrapping_add(bucket % SEGMENT_BUCKETS * 8))
    }

    fn directory(&self, slot: u64) -> Result<u64> {
        if slot >= self.map.get(word::DIRECTORY_SLOTS)? {
            return Err(ArenaError::Corrupt {
                what: "directory slot",
                offset: slot,
            });
        }
        self.map.get(DIRECTORY + slot * 8)
    }

    pub(super) fn add_segment(&mut self, slot: u64) -> Result<()> {
        let segment = self.map.allocate(SEGMENT_BUCKETS * 8)?;
        self.map.zero(segment, SEGMENT_BUCKETS * 8)?;
        self.map.put(DIRECTORY + slot * 8, segment)
    }

    pub(super) fn find(&self, hash: u64, key: &[u8]) -> Result<Option<Found>> {
        let mut link = self.bucket(hash)?;
        let mut steps = self.chain_limit()?;
        loop {
            let at = self.map.get(link)?;
            if at == 0 {
                return Ok(None);
            }
            let entry = self.entry(at)?;
            if entry.hash == hash
                && entry.key_len == key.len() as u64
                && self.map.bytes(entry.key_at(), entry.key_len)? == key
            {
                return Ok(Some(Found { entry, link }));
            }
            steps = next_step(steps, at)?;
            link = at;
        }
    }

    /// Returns the maximum number of entries in a valid chain; a longer chain is circular.
    pub(super) fn chain_limit(&self) -> Result<u64> {
        Ok(self.keys()?.saturating_add(1))
    }

    /// Splits one bucket if there are more keys than buckets. Without memory for the split, the
    /// chains just get longer.
    pub(super) fn grow(&mut self) -> Result<()> {
        let (level, split) = self.level_and_split()?;
        let new = (1 << level) + split;
        let slot = new / SEGMENT_BUCKETS;
        let slots = self.map.get(word::DIRECTORY_SLOTS)?;
        if self.keys()? <= new || slot >= slots || level >= MAX_TABLE_LEVEL {
            return Ok(());
        }
        if self.directory(slot)? == 0 {
            match self.add_segment(slot) {
                Err(ArenaError::Full) => return Ok(()),
                other => other?,
            }
        }
        self.move_upper_half(split, new, 1 << level)?;
        if split + 1 == 1 << level {
            self.map.put(word::TABLE_LEVEL, level + 1)?;
            self.map.put(word::SPLIT_BUCKET, 0)
        } else {
            self.map.put(word::SPLIT_BUCKET, split + 1)
        }
    }

    fn move_upper_half(&mut self, from: u64, to: u64, bit: u64) -> Result<()> {
        let to_word = self.bucket_word(to)?;
        let mut link = self.bucket_word(from)?;
        let mut moved = 0;
        let mut steps = self.chain_limit()?;
        loop {
            let at = self.map.get(link)?;
            if at == 0 {
                return self.map.put(to_word, moved);
            }
            let entry = self.entry(at)?;
            if entry.hash & bit != 0 {
                self.map.put(link, entry.next)?;
                self.map.put(at, moved)?;
                moved = at;
            } else {
                link = at;
            }
            steps = next_step(steps, at)?;
        }
    }

    /// Visits the entries of one bucket.
    pub(super) fn visit_bucket(
        &self,
        bucket: u64,
        mut visit: impl FnMut(Found) -> Result<()>,
    ) -> Result<()> {
        let mut link = self.bucket_word(bucket)?;
        let mut steps = self.chain_limit()?;
        loop {
            let at = self.map.get(link)?;
            if at == 0 {
                return Ok(());
            }
            let entry = self.entry(at)?;
            visit(Found { entry, link })?;
            steps = next_step(steps, at)?;
            link = at;
        }
    }

    /// Visits the live keys from bucket `cursor` on, until `at_least` keys were visited or ten
    /// times as many buckets were scanned. Returns the next cursor, 0 at the end.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn scan(
        &self,
        cursor: u64,
        at_least: u64,
        now: super::UnixMillis,
        mut visit: impl FnMut(&[u8]),
    ) -> Result<u64> {
        let buckets = self.buckets()?;
        let mut bucket = cursor;
        let last = cursor.saturating_add(at_least.saturating_mul(10));
        let mut seen = 0;
        while bucket < buckets && seen < at_least && bucket <= last {
            self.visit_bucket(bucket, |found| {
                if !found.entry.is_expired(now) {
                    seen += 1;
                    visit(self.map.bytes(found.entry.key_at(), found.entry.key_len)?);
                }
                Ok(())
            })?;
            bucket += 1;
        }
        Ok(if bucket >= buckets { 0 } else { bucket })
    }
}

fn next_step(steps: u64, at: u64) -> Result<u64> {
    steps.checked_sub(1).ok_or(ArenaError::Corrupt {
        what: "bucket that is a ring",
        offset: at,
    })
}
