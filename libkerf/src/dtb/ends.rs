//! Finds the offset of a name in a strings block. A name may be the tail of a longer one: libfdt and dtc share
//! tails too.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;

use crate::tree::MAX_NAME_BYTES;

/// The tails of all strings of a block, each with a hash computed from its last byte backwards, so that all tails of a
/// string take one pass. The hash has a random factor, so no input can be constructed with many equal hashes.
pub(super) struct Ends {
    factor: u64,
    places: HashMap<u64, u32>,
}

impl Default for Ends {
    fn default() -> Self {
        Self {
            // An odd factor loses no bits.
            factor: RandomState::new().hash_one(0) | 1,
            places: HashMap::new(),
        }
    }
}

impl Ends {
    /// Adds the strings of the block from `start` on. Bytes without a NUL after them are not a string.
    pub(super) fn add(&mut self, strings: &[u8], start: usize) {
        let mut at = start;
        for string in strings[start..].split_inclusive(|byte| *byte == 0) {
            if let Some((0, string)) = string.split_last() {
                self.add_one(at, string);
            }
            at += string.len();
        }
    }

    /// Adds the tails of one string, up to the maximum length of a name. Of two equal tails the first one counts.
    fn add_one(&mut self, start: usize, string: &[u8]) {
        let mut number = 0;
        for (place, byte) in string.iter().enumerate().rev() {
            number = self.next(number, *byte);
            if string.len() - place > MAX_NAME_BYTES {
                break;
            }
            let Ok(offset) = u32::try_from(start + place) else {
                break;
            };
            self.places.entry(number).or_insert(offset);
        }
    }

    /// Returns the first offset of a name. A name whose hash collides with another tail's is not found, and is then
    /// written again.
    pub(super) fn find(&self, strings: &[u8], name: &str) -> Option<usize> {
        let bytes = name.bytes().rev();
        let number = bytes.fold(0, |number, byte| self.next(number, byte));
        let place = *self.places.get(&number)? as usize;
        is_at(strings, place, name.as_bytes()).then_some(place)
    }

    fn next(&self, number: u64, byte: u8) -> u64 {
        number
            .wrapping_add(u64::from(byte) + 1)
            .wrapping_mul(self.factor)
            .rotate_left(23)
    }
}

/// Returns whether this string is at this offset.
fn is_at(strings: &[u8], offset: usize, string: &[u8]) -> bool {
    let rest = strings.get(offset..).unwrap_or_default();
    rest.starts_with(string) && rest.get(string.len()) == Some(&0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_counts_and_may_be_the_end_of_a_longer_string() {
        let mut strings = b"numa-node-id\0id\0cut".to_vec();
        let mut ends = Ends::default();
        ends.add(&strings, 0);
        assert_eq!(ends.find(&strings, "id"), Some(10));
        assert_eq!(ends.find(&strings, "numa-node-id"), Some(0));
        assert_eq!(ends.find(&strings, "numa"), None);
        assert_eq!(ends.find(&strings, "cut"), None, "it has no end");
        let start = strings.len();
        strings.extend_from_slice(b"x\0");
        ends.add(&strings, start);
        assert_eq!(ends.find(&strings, "x"), Some(start));
    }
}
