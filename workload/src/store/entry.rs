//! One key and its value: a block of the arena.
//!
//! ```text
//!   +0  next entry of the bucket   +8  hash of the key   +16 expires at, Unix ms; 0: never
//!   +24 key length (low 32 bits), CRC-32 of the value (high)      +32 value length
//!   +40 key, value
//! ```

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use super::{Expiry, Store, TimeToLive, UnixMillis};
use crate::arena::layout::word;
use crate::arena::{ArenaError, Result};

/// Maximum length of a key, in bytes.
pub const MAX_KEY_BYTES: usize = 64 * 1024;

const HEADER: u64 = 40;
const HASH: u64 = 8;
const EXPIRES: u64 = 16;
const LENGTHS: u64 = 24;
const VALUE_LEN: u64 = 32;

/// An entry's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) at: u64,
    pub(super) next: u64,
    pub(super) hash: u64,
    pub(super) expires: UnixMillis,
    pub(super) key_len: u64,
    pub(super) value_crc: u32,
    pub(super) value_len: u64,
}

impl Entry {
    pub(super) fn key_at(&self) -> u64 {
        self.at + HEADER
    }

    pub(super) fn value_at(&self) -> u64 {
        self.key_at() + self.key_len
    }

    pub(super) fn is_expired(&self, now: UnixMillis) -> bool {
        self.expires != 0 && self.expires <= now
    }

    /// Returns the entry's part of the content digest.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut mixed = self.hash;
        for part in [
            u64::from(self.value_crc),
            self.value_len,
            self.expires,
            self.key_len,
        ] {
            // The finalizer of SplitMix64.
            mixed = mixed.wrapping_add(part).wrapping_add(0x9e37_79b9_7f4a_7c15);
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^= mixed >> 31;
        }
        mixed
    }
}

/// The location of an entry: its offset, and the word that links to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) entry: Entry,
    pub(super) link: u64,
}

impl Store {
    pub(super) fn hash(&self, key: &[u8]) -> Result<u64> {
        let k0 = self.map.get(word::HASH_KEY_0)?;
        let k1 = self.map.get(word::HASH_KEY_1)?;
        let mut hasher = SipHasher13::new_with_keys(k0, k1);
        hasher.write(key);
        Ok(hasher.finish())
    }

    pub(super) fn entry(&self, at: u64) -> Result<Entry> {
        let lengths = self.map.get(at.wrapping_add(LENGTHS))?;
        #[allow(clippy::cast_possible_truncation)] // The high half of 64 bits is 32 bits.
        let value_crc = (lengths >> 32) as u32;
        let entry = Entry {
            at,
            next: self.map.get(at)?,
            hash: self.map.get(at.wrapping_add(HASH))?,
            expires: self.map.get(at.wrapping_add(EXPIRES))?,
            key_len: lengths & 0xffff_ffff,
            value_crc,
            value_len: self.map.get(at.wrapping_add(VALUE_LEN))?,
        };
        // From here on, sums of these values cannot overflow.
        let end = (at + HEADER + entry.key_len).checked_add(entry.value_len);
        if end.is_some_and(|end| end <= self.map.len()) {
            Ok(entry)
        } else {
            Err(ArenaError::Corrupt {
                what: "entry's length",
                offset: at,
            })
        }
    }

    fn write_entry(&mut self, entry: &Entry) -> Result<()> {
        self.map.put(entry.at, entry.next)?;
        self.map.put(entry.at + HASH, entry.hash)?;
        self.map.put(entry.at + EXPIRES, entry.expires)?;
        let lengths = u64::from(entry.value_crc) << 32 | entry.key_len;
        self.map.put(entry.at + LENGTHS, lengths)?;
        self.map.put(entry.at + VALUE_LEN, entry.value_len)
    }

    /// Adds an entry to the totals (`add` true) or subtracts it.
    pub(super) fn account(&mut self, entry: &Entry, add: bool) -> Result<()> {
        let step = |value: u64, by: u64| {
            if add {
                value.wrapping_add(by)
            } else {
                value.wrapping_sub(by)
            }
        };
        let digest = self.map.get(word::DIGEST)?;
        self.map
            .put(word::DIGEST, step(digest, entry.fingerprint()))?;
        let keys = self.map.get(word::KEYS)?;
        self.map.put(word::KEYS, step(keys, 1))?;
        if entry.expires != 0 {
            let expiring = self.map.get(word::KEYS_WITH_EXPIRY)?;
            self.map.put(word::KEYS_WITH_EXPIRY, step(expiring, 1))?;
        }
        Ok(())
    }

    /// Returns the live entry of a key. An expired one stays for [`Store::expire_some`].
    fn live(&self, key: &[u8], now: UnixMillis) -> Result<Option<Found>> {
        let found = self.find(self.hash(key)?, key)?;
        Ok(found.filter(|found| !found.entry.is_expired(now)))
    }

    /// Returns the value of a key.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn get(&self, key: &[u8], now: UnixMillis) -> Result<Option<&[u8]>> {
        match self.live(key, now)? {
            Some(Found { entry, .. }) => {
                Ok(Some(self.map.bytes(entry.value_at(), entry.value_len)?))
            }
            None => Ok(None),
        }
    }

    /// Returns whether the key exists.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn contains(&self, key: &[u8], now: UnixMillis) -> Result<bool> {
        Ok(self.live(key, now)?.is_some())
    }

    /// Returns the length of a value in bytes.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn value_len(&self, key: &[u8], now: UnixMillis) -> Result<Option<u64>> {
        Ok(self.live(key, now)?.map(|found| found.entry.value_len))
    }

    /// Returns the remaining time to live of a key.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`].
    pub fn time_to_live(&self, key: &[u8], now: UnixMillis) -> Result<TimeToLive> {
        Ok(match self.live(key, now)? {
            None => TimeToLive::NoKey,
            Some(Found { entry, .. }) if entry.expires == 0 => TimeToLive::Never,
            Some(Found { entry, .. }) => TimeToLive::Millis(entry.expires - now),
        })
    }

    /// Stores a value.
    ///
    /// # Errors
    /// [`ArenaError::Full`], with no change; [`ArenaError::NotOwner`]; [`ArenaError::Corrupt`].
    pub fn set(&mut self, key: &[u8], value: &[u8], expiry: Expiry, now: UnixMillis) -> Result<()> {
        self.change(|store| store.put_value(key, &[value], expiry, now))
    }

    /// Appends to a value, or stores it, and returns its new length.
    ///
    /// # Errors
    /// As [`Store::set`].
    pub fn append(&mut self, key: &[u8], tail: &[u8], now: UnixMillis) -> Result<u64> {
        self.change(|store| {
            let hash = store.hash(key)?;
            let Some(found) = store.find(hash, key)? else {
                store.insert(hash, key, &[tail], 0)?;
                return Ok(tail.len() as u64);
            };
            if found.entry.is_expired(now) {
                store.put_value(key, &[tail], Expiry::Never, now)?;
                return Ok(tail.len() as u64);
            }
            store.extend(found, key, tail)
        })
    }

    fn extend(&mut self, found: Found, key: &[u8], tail: &[u8]) -> Result<u64> {
        let Found { entry: old, link } = found;
        let value_len = old.value_len + tail.len() as u64;
        let need = HEADER + old.key_len + value_len;
        let mut entry = Entry {
            value_len,
            value_crc: extend_crc(old.value_crc, tail),
            ..old
        };
        if need > self.map.usable(old.at)? {
            // A value that grows once is likely to grow again: reserve half of its size in addition.
            entry.at = match self.map.allocate(need + value_len / 2) {
                Err(ArenaError::Full) => self.map.allocate(need)?,
                other => other?,
            };
            self.map.write(entry.key_at(), key)?;
            let (from, to) = (old.value_at(), entry.value_at());
            self.map.copy_within(from, to, old.value_len)?;
        }
        self.map.write(entry.value_at() + old.value_len, tail)?;
        self.account(&old, false)?;
        self.write_entry(&entry)?;
        self.account(&entry, true)?;
        if entry.at != old.at {
            self.map.put(link, entry.at)?;
            self.map.release(old.at)?;
        }
        Ok(value_len)
    }

    /// Stores the concatenation of `value`.
    pub(super) fn put_value(
        &mut self,
        key: &[u8],
        value: &[&[u8]],
        expiry: Expiry,
        now: UnixMillis,
    ) -> Result<()> {
        let hash = self.hash(key)?;
        let found = self.find(hash, key)?;
        let expires = match expiry {
            Expiry::Never => 0,
            Expiry::At(at) => at.max(1),
            Expiry::Keep => found
                .filter(|found| !found.entry.is_expired(now))
                .map_or(0, |found| found.entry.expires),
        };
        match found {
            None => self.insert(hash, key, value, expires),
            Some(found) => self.replace(found, key, value, expires),
        }
    }

    fn insert(&mut self, hash: u64, key: &[u8], value: &[&[u8]], expires: u64) -> Result<()> {
        let link = self.bucket(hash)?;
        let next = self.map.get(link)?;
        let at = self.write_new(hash, key, value, expires, next)?;
        self.map.put(link, at)?;
        self.grow()
    }

    fn replace(&mut self, found: Found, key: &[u8], value: &[&[u8]], expires: u64) -> Result<()> {
        let Found { entry: old, link } = found;
        let value_len = value.iter().map(|part| part.len() as u64).sum::<u64>();
        let need = HEADER + old.key_len + value_len;
        let usable = self.map.usable(old.at)?;
        if need > usable || need < usable / 2 {
            let at = self.write_new(old.hash, key, value, expires, old.next)?;
            self.map.put(link, at)?;
            self.account(&old, false)?;
            return self.map.release(old.at);
        }
        let entry = Entry {
            expires,
            value_crc: crc(value),
            value_len,
            ..old
        };
        self.account(&old, false)?;
        self.write_value(&entry, value)?;
        self.write_entry(&entry)?;
        self.account(&entry, true)
    }

    fn write_new(
        &mut self,
        hash: u64,
        key: &[u8],
        value: &[&[u8]],
        expires: u64,
        next: u64,
    ) -> Result<u64> {
        let value_len = value.iter().map(|part| part.len() as u64).sum::<u64>();
        let key_len = key.len() as u64;
        let at = self.map.allocate(HEADER + key_len + value_len)?;
        let entry = Entry {
            at,
            next,
            hash,
            expires,
            key_len,
            value_crc: crc(value),
            value_len,
        };
        self.write_entry(&entry)?;
        self.map.write(entry.key_at(), key)?;
        self.write_value(&entry, value)?;
        self.account(&entry, true)?;
        Ok(at)
    }

    fn write_value(&mut self, entry: &Entry, value: &[&[u8]]) -> Result<()> {
        let mut at = entry.value_at();
        for part in value {
            self.map.write(at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Removes a key. Returns whether it existed.
    ///
    /// # Errors
    /// [`ArenaError::NotOwner`], [`ArenaError::Corrupt`].
    pub fn remove(&mut self, key: &[u8], now: UnixMillis) -> Result<bool> {
        self.change(|store| match store.find(store.hash(key)?, key)? {
            None => Ok(false),
            Some(found) => {
                store.unlink(found)?;
                Ok(!found.entry.is_expired(now))
            }
        })
    }

    pub(super) fn unlink(&mut self, found: Found) -> Result<()> {
        self.map.put(found.link, found.entry.next)?;
        self.account(&found.entry, false)?;
        self.map.release(found.entry.at)
    }

    /// Sets or removes the expiry time of a key. Returns whether the key exists and, for
    /// [`Expiry::Never`], had an expiry time. [`Expiry::Keep`] changes nothing.
    ///
    /// # Errors
    /// [`ArenaError::NotOwner`], [`ArenaError::Corrupt`].
    pub fn set_expiry(&mut self, key: &[u8], expiry: Expiry, now: UnixMillis) -> Result<bool> {
        self.change(|store| {
            let Some(Found { entry: old, .. }) = store.live(key, now)? else {
                return Ok(false);
            };
            let expires = match expiry {
                Expiry::Keep => return Ok(true),
                Expiry::Never => 0,
                Expiry::At(at) => at.max(1),
            };
            let entry = Entry { expires, ..old };
            store.account(&old, false)?;
            store.write_entry(&entry)?;
            store.account(&entry, true)?;
            Ok(expires != 0 || old.expires != 0)
        })
    }
}

/// Computes the CRC-32 of a value in parts.
pub(super) fn crc(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}

fn extend_crc(crc: u32, tail: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(crc);
    hasher.update(tail);
    hasher.finalize()
}
