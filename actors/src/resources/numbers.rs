//! Numbers that only grow or must be unique: generations, recoveries, morph sessions, context ids.

use std::collections::BTreeMap;

use crate::resources::pool::Holder;

/// Lowest context id of an instance: 0 to 2 are reserved (vsock(7)).
pub const CID_FIRST: u32 = 3;

/// The allocator of these numbers.
#[derive(Debug, Default)]
pub struct Numbers {
    /// Last generation, by instance name.
    pub generations: BTreeMap<String, u64>,
    /// Last recovery.
    pub recovery: u64,
    /// Last morph session.
    pub session: u64,
    /// Context ids in use, with their generations.
    pub cids: BTreeMap<u32, Holder>,
}

impl Numbers {
    /// Returns the next generation of `instance`. It counts once its row is in the journal.
    pub fn next_generation(&mut self, instance: &str) -> u64 {
        let last = self.generations.entry(instance.to_owned()).or_default();
        *last += 1;
        *last
    }

    /// Returns the next recovery.
    pub fn next_recovery(&mut self) -> u64 {
        self.recovery += 1;
        self.recovery
    }

    /// Returns the next morph session.
    pub fn next_session(&mut self) -> u64 {
        self.session += 1;
        self.session
    }

    /// Allocates a context id that no live generation uses.
    pub fn take_cid(&mut self, holder: Holder) -> u32 {
        let mut cid = CID_FIRST;
        while self.cids.contains_key(&cid) {
            cid += 1;
        }
        self.cids.insert(cid, holder);
        cid
    }

    /// Frees a context id, unless another generation holds it by now: a generation can be released twice.
    pub fn give_cid_back(&mut self, cid: u32, holder: &Holder) {
        if self.cids.get(&cid) == Some(holder) {
            self.cids.remove(&cid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_that_is_released_again_gives_no_other_ones_context_id_back() {
        let mut numbers = Numbers::default();
        let (first, second) = (("a".to_owned(), 1), ("b".to_owned(), 1));
        let cid = numbers.take_cid(first.clone());
        numbers.give_cid_back(cid, &first);
        assert_eq!(numbers.take_cid(second.clone()), cid);
        numbers.give_cid_back(cid, &first);
        assert_ne!(numbers.take_cid(first), cid);
        numbers.give_cid_back(cid, &second);
        assert_eq!(numbers.take_cid(second), cid);
    }
}
