//! Tracks the pages written since the last query, in a bitmap that the writer itself keeps.

/// Granularity in bytes.
const PAGE_BYTES: u64 = 4096;

#[derive(Debug)]
pub(super) struct DirtyPages {
    words: Vec<u64>,
    count: u64,
    /// Start of the search for the next run.
    cursor: usize,
}

impl DirtyPages {
    pub(super) fn new(len: u64) -> Self {
        let words = len.div_ceil(PAGE_BYTES * 64);
        Self {
            words: vec![0; super::index(words)],
            count: 0,
            cursor: 0,
        }
    }

    pub(super) fn mark(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        for page in offset / PAGE_BYTES..=(offset + len - 1) / PAGE_BYTES {
            let bit = 1 << (page % 64);
            if let Some(word) = self.words.get_mut(super::index(page / 64)) {
                self.count += u64::from(*word & bit == 0);
                *word |= bit;
            }
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.count * PAGE_BYTES
    }

    /// Takes a run of adjacent dirty pages of at most `max_bytes`, but at least one page. Returns
    /// its offset and length in bytes.
    pub(super) fn take(&mut self, max_bytes: u64) -> Option<(u64, u64)> {
        if self.count == 0 {
            return None;
        }
        let words = self.words.len();
        let at = (0..words)
            .map(|step| (self.cursor + step) % words)
            .find(|at| self.words[*at] != 0)?;
        self.cursor = at;
        let first = at as u64 * 64 + u64::from(self.words[at].trailing_zeros());
        let most = (max_bytes / PAGE_BYTES).max(1);
        let mut pages = 0;
        while pages < most && self.clear(first + pages) {
            pages += 1;
        }
        Some((first * PAGE_BYTES, pages * PAGE_BYTES))
    }

    fn clear(&mut self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        match self.words.get_mut(super::index(page / 64)) {
            Some(word) if *word & bit != 0 => {
                *word &= !bit;
                self.count -= 1;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    proptest::proptest! {
        #[test]
        fn every_written_page_is_taken_once(
            writes in proptest::collection::vec((0u64..1 << 20, 1u64..20_000), 0..40),
            max in 1u64..100_000,
        ) {
            let mut dirty = DirtyPages::new(1 << 21);
            let mut expected = BTreeSet::new();
            for (offset, len) in writes {
                dirty.mark(offset, len);
                expected.extend(offset / PAGE_BYTES..=(offset + len - 1) / PAGE_BYTES);
            }
            proptest::prop_assert_eq!(dirty.bytes(), expected.len() as u64 * PAGE_BYTES);
            while let Some((offset, len)) = dirty.take(max) {
                proptest::prop_assert!(len <= max.max(PAGE_BYTES));
                for page in offset / PAGE_BYTES..(offset + len) / PAGE_BYTES {
                    proptest::prop_assert!(expected.remove(&page));
                }
            }
            proptest::prop_assert!(expected.is_empty());
            proptest::prop_assert_eq!(dirty.bytes(), 0);
        }
    }
}
