//! The allocator: two-level segregated fit, in constant time; each block knows its neighbours (Masmano et al., "TLSF:
//! a new dynamic memory allocator for real-time systems").
//!
//! ```text
//!   block:  | size in bytes, bit 0: free | offset of the block before, 0 for the first | payload
//!   free:   payload begins with | next free of its class | previous free of its class |
//! ```
//!
//! Sizes are multiples of 16 and include the two header words. Two free blocks are never adjacent. The untouched end
//! of the arena is one large free block, which is used only if nothing smaller fits, so that unneeded memory is never
//! touched.

use super::layout::{FIRST_LEVELS, SECOND_LEVELS, heap_start, word};
use super::{ArenaError, Mapping, Result};

const GRANULE: u64 = 16;
const HEADER: u64 = 16;
const MIN_BLOCK: u64 = 32;
const FREE: u64 = 1;
/// Below this size, each multiple of the granule is a class of its own.
const LINEAR_LIMIT: u64 = GRANULE * SECOND_LEVELS;

/// A size class.
#[derive(Clone, Copy)]
struct Class {
    first: u64,
    second: u64,
}

impl Class {
    /// Returns the class of blocks with `size` bytes.
    fn of(size: u64) -> Self {
        if size < LINEAR_LIMIT {
            return Self {
                first: 0,
                second: size / GRANULE,
            };
        }
        let log = u64::from(size.ilog2());
        Self {
            first: (log - 7).min(FIRST_LEVELS - 1),
            second: (size >> (log - 4)) & (SECOND_LEVELS - 1),
        }
    }

    /// Returns the lowest class whose blocks all have at least `size` bytes.
    fn fitting(size: u64) -> Self {
        if size < LINEAR_LIMIT {
            return Self::of(size);
        }
        let step = 1 << (size.ilog2() - 4);
        Self::of(size + step - 1)
    }

    fn head(self) -> u64 {
        word::FREE_HEADS + (self.first * SECOND_LEVELS + self.second) * 8
    }

    fn bitmap(self) -> u64 {
        word::SECOND_BITMAPS + self.first * 8
    }
}

impl Mapping {
    /// Formats the heap as one free block.
    pub(crate) fn format_heap(&mut self) -> Result<()> {
        let start = heap_start(self.len());
        let heads = word::FREE_HEADS - word::FIRST_BITMAP + FIRST_LEVELS * SECOND_LEVELS * 8;
        self.zero(word::FIRST_BITMAP, heads)?;
        self.put(word::USED_BYTES, start)?;
        if self.get(word::TOUCHED_END)? < start + MIN_BLOCK {
            self.put(word::TOUCHED_END, start + MIN_BLOCK)?;
        }
        let size = (self.len() - start) / GRANULE * GRANULE;
        self.put(start + 8, 0)?;
        self.insert_free(start, size)
    }

    /// Allocates at least `bytes`. Returns the offset of the payload, which is aligned to 16.
    pub(crate) fn allocate(&mut self, bytes: u64) -> Result<u64> {
        let need = bytes
            .checked_add(HEADER)
            .and_then(|n| n.checked_next_multiple_of(GRANULE))
            .filter(|need| *need < self.len())
            .ok_or(ArenaError::Full)?
            .max(MIN_BLOCK);
        let (block, size) = self.find_free(need)?;
        self.remove_free(block, size)?;
        let rest = size - need;
        let taken = if rest >= MIN_BLOCK { need } else { size };
        if rest >= MIN_BLOCK {
            let tail = block + need;
            self.put(tail + 8, block)?;
            self.insert_free(tail, rest)?;
            self.set_previous_of(tail + rest, tail)?;
        }
        self.put(block, taken)?;
        let used = self.get(word::USED_BYTES)?;
        self.put(word::USED_BYTES, used.wrapping_add(taken))?;
        // The header and links of the free block after it were written too.
        let touched = (block + taken + MIN_BLOCK).min(self.len());
        if self.get(word::TOUCHED_END)? < touched {
            self.put(word::TOUCHED_END, touched)?;
        }
        Ok(block + HEADER)
    }

    /// Returns the payload size of the allocated block at `payload`, bytes.
    pub(crate) fn usable(&self, payload: u64) -> Result<u64> {
        let (_, size) = self.allocated(payload)?;
        Ok(size - HEADER)
    }

    /// Frees a block.
    pub(crate) fn release(&mut self, payload: u64) -> Result<()> {
        let (mut block, mut size) = self.allocated(payload)?;
        let used = self.get(word::USED_BYTES)?;
        self.put(word::USED_BYTES, used.wrapping_sub(size))?;
        let next = block + size;
        if next + MIN_BLOCK <= self.len() {
            let word = self.get(next)?;
            if word & FREE != 0 {
                let next_size = word & !FREE;
                self.check_block(next, next_size)?;
                self.remove_free(next, next_size)?;
                size += next_size;
            }
        }
        let previous = self.get(block + 8)?;
        if previous != 0 {
            let word = self.get(previous)?;
            if word & FREE != 0 {
                let previous_size = word & !FREE;
                self.check_block(previous, previous_size)?;
                if previous.wrapping_add(previous_size) != block {
                    return Err(corrupt("block order", block));
                }
                self.remove_free(previous, previous_size)?;
                block = previous;
                size += previous_size;
            }
        }
        self.insert_free(block, size)?;
        self.set_previous_of(block + size, block)
    }

    /// Returns the block of `payload` and its size, if it is allocated.
    fn allocated(&self, payload: u64) -> Result<(u64, u64)> {
        let block = payload
            .checked_sub(HEADER)
            .filter(|block| *block >= heap_start(self.len()))
            .ok_or_else(|| corrupt("block offset", payload))?;
        let size = self.get(block)?;
        if size & FREE != 0 {
            return Err(corrupt("block that should be in use", block));
        }
        self.check_block(block, size)?;
        Ok((block, size))
    }

    fn check_block(&self, block: u64, size: u64) -> Result<()> {
        let fits = size.is_multiple_of(GRANULE)
            && size >= MIN_BLOCK
            && block.checked_add(size).is_some_and(|end| end <= self.len());
        if fits {
            Ok(())
        } else {
            Err(corrupt("block size", block))
        }
    }

    fn find_free(&self, need: u64) -> Result<(u64, u64)> {
        let class = Class::fitting(need);
        let above = self.get(class.bitmap())? & (!0 << class.second);
        let found = if above == 0 {
            let higher = !0u64 << (class.first + 1);
            let first = self.get(word::FIRST_BITMAP)? & higher;
            if first == 0 {
                return Err(ArenaError::Full);
            }
            let first = u64::from(first.trailing_zeros());
            let bits = self.get(word::SECOND_BITMAPS + first.min(FIRST_LEVELS - 1) * 8)?;
            Class {
                first,
                second: u64::from(bits.trailing_zeros()),
            }
        } else {
            Class {
                first: class.first,
                second: u64::from(above.trailing_zeros()),
            }
        };
        if found.first >= FIRST_LEVELS || found.second >= SECOND_LEVELS {
            return Err(corrupt("free list bitmap", word::FIRST_BITMAP));
        }
        let block = self.get(found.head())?;
        let size = self.get(block)? & !FREE;
        self.check_block(block, size)?;
        if size < need {
            return Err(corrupt("free list", block));
        }
        Ok((block, size))
    }

    fn insert_free(&mut self, block: u64, size: u64) -> Result<()> {
        let class = Class::of(size);
        let next = self.get(class.head())?;
        self.put(block, size | FREE)?;
        self.put(block + HEADER, next)?;
        self.put(block + HEADER + 8, 0)?;
        if next != 0 {
            self.put(next.wrapping_add(HEADER + 8), block)?;
        }
        self.put(class.head(), block)?;
        let second = self.get(class.bitmap())? | 1 << class.second;
        self.put(class.bitmap(), second)?;
        let first = self.get(word::FIRST_BITMAP)? | 1 << class.first;
        self.put(word::FIRST_BITMAP, first)
    }

    fn remove_free(&mut self, block: u64, size: u64) -> Result<()> {
        let class = Class::of(size);
        let next = self.get(block + HEADER)?;
        let previous = self.get(block + HEADER + 8)?;
        if next != 0 {
            self.put(next.wrapping_add(HEADER + 8), previous)?;
        }
        if previous != 0 {
            return self.put(previous.wrapping_add(HEADER), next);
        }
        self.put(class.head(), next)?;
        if next == 0 {
            let second = self.get(class.bitmap())? & !(1 << class.second);
            self.put(class.bitmap(), second)?;
            if second == 0 {
                let first = self.get(word::FIRST_BITMAP)? & !(1 << class.first);
                self.put(word::FIRST_BITMAP, first)?;
            }
        }
        Ok(())
    }

    fn set_previous_of(&mut self, block: u64, previous: u64) -> Result<()> {
        if block + MIN_BLOCK <= self.len() {
            self.put(block + 8, previous)?;
        }
        Ok(())
    }
}

fn corrupt(what: &'static str, offset: u64) -> ArenaError {
    ArenaError::Corrupt { what, offset }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heap() -> Mapping {
        let mut map = Mapping::create(1 << 20).unwrap();
        map.format_heap().unwrap();
        map
    }

    #[test]
    fn what_is_released_becomes_one_block_again() {
        let mut map = heap();
        let untouched = map.get(word::USED_BYTES).unwrap();
        let most = (map.len() - heap_start(map.len())) * 9 / 10;
        let blocks: Vec<u64> = (0..500).map(|n| map.allocate(n * 3).unwrap()).collect();
        for block in blocks
            .iter()
            .step_by(2)
            .chain(blocks.iter().skip(1).step_by(2))
        {
            map.release(*block).unwrap();
        }
        assert_eq!(map.get(word::USED_BYTES).unwrap(), untouched);
        map.allocate(most).unwrap();
    }

    #[test]
    fn a_full_heap_says_so_and_recovers() {
        let mut map = heap();
        let mut blocks = Vec::new();
        while let Ok(block) = map.allocate(1000) {
            blocks.push(block);
        }
        assert!(blocks.len() > 900, "{}", blocks.len());
        assert!(matches!(map.allocate(1000), Err(ArenaError::Full)));
        assert!(matches!(map.allocate(u64::MAX), Err(ArenaError::Full)));
        map.release(blocks.pop().unwrap()).unwrap();
        map.allocate(1000).unwrap();
    }

    #[test]
    fn a_double_release_is_found() {
        let mut map = heap();
        let block = map.allocate(100).unwrap();
        map.release(block).unwrap();
        assert!(matches!(
            map.release(block),
            Err(ArenaError::Corrupt { .. })
        ));
    }

    proptest::proptest! {
        #[test]
        fn blocks_never_overlap(
            ops in proptest::collection::vec((0u64..5000, proptest::bool::ANY), 1..300),
        ) {
            let mut map = heap();
            let mut live: Vec<(u64, u64)> = Vec::new();
            for (size, release) in ops {
                if release && !live.is_empty() {
                    let (block, _) = live.swap_remove(crate::arena::index(size) % live.len());
                    map.release(block).unwrap();
                } else if let Ok(block) = map.allocate(size) {
                    let end = block + map.usable(block).unwrap();
                    proptest::prop_assert!(end >= block + size && end <= map.len());
                    for (other, other_end) in &live {
                        proptest::prop_assert!(end <= *other || *other_end <= block);
                    }
                    live.push((block, end));
                }
            }
        }
    }
}
