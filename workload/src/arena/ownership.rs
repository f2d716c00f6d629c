//! Ownership of the arena: one word, changed only by compare-and-swap.
//!
//! ```text
//!   word = epoch << 2 | phase
//!
//!   (0, Empty) --create--> (1, Serving) <--resume / freeze--> (1, Frozen) --claim--> (2, Serving)
//! ```
//!
//! Invariants: an owner remembers the epoch it claimed and writes only while the word contains that epoch and
//! `Serving`. `resume` by the old owner and `claim` by the new one start from the same value, so exactly one of them
//! succeeds, in whatever order and however often they are tried.

use std::sync::atomic::Ordering;

use super::layout::word;
use super::{ArenaError, Mapping, Result};

/// The contents of the ownership word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// Number of owners of the arena so far.
    pub epoch: u64,
    /// The phase of the owner.
    pub phase: OwnershipPhase,
}

/// The phase of an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnershipPhase {
    /// Not set up yet.
    Empty,
    /// The owner may write.
    Serving,
    /// The owner does not write; the next owner may claim the arena.
    Frozen,
}

impl Ownership {
    const fn to_word(self) -> u64 {
        self.epoch << 2
            | match self.phase {
                OwnershipPhase::Empty => 0,
                OwnershipPhase::Serving => 1,
                OwnershipPhase::Frozen => 2,
            }
    }

    fn from_word(word: u64) -> Result<Self> {
        let phase = match word & 3 {
            0 => OwnershipPhase::Empty,
            1 => OwnershipPhase::Serving,
            2 => OwnershipPhase::Frozen,
            _ => {
                return Err(ArenaError::Corrupt {
                    what: "ownership word",
                    offset: word::OWNERSHIP,
                });
            }
        };
        Ok(Self {
            epoch: word >> 2,
            phase,
        })
    }
}

impl Mapping {
    /// Returns the current ownership.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`] if the word is invalid.
    pub fn ownership(&self) -> Result<Ownership> {
        Ownership::from_word(self.word(word::OWNERSHIP)?.load(Ordering::Acquire))
    }

    /// Returns whether the owner of `epoch` may write.
    pub(crate) fn is_serving(&self, epoch: u64) -> bool {
        let phase = OwnershipPhase::Serving;
        let mine = Ownership { epoch, phase }.to_word();
        self.word(word::OWNERSHIP)
            .is_ok_and(|word| word.load(Ordering::Relaxed) == mine)
    }

    /// Changes the ownership from `from` to `to`, if it is `from`.
    ///
    /// # Errors
    /// [`ArenaError::NotOwner`] with the actual ownership.
    pub(crate) fn change_owner(&mut self, from: Ownership, to: Ownership) -> Result<()> {
        let result = self.word(word::OWNERSHIP)?.compare_exchange(
            from.to_word(),
            to.to_word(),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        match result {
            Ok(_) => {
                self.note_write(word::OWNERSHIP, 8);
                Ok(())
            }
            Err(found) => Err(ArenaError::NotOwner(Ownership::from_word(found)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resume_and_claim_race_and_one_wins() {
        let mut old = Mapping::create(1 << 20).unwrap();
        let fd = old.fd().try_clone_to_owned().unwrap();
        let mut new = Mapping::open(fd, 1 << 20).unwrap();
        let at = |epoch, phase| Ownership { epoch, phase };
        let empty = at(0, OwnershipPhase::Empty);
        let serving = at(1, OwnershipPhase::Serving);
        let frozen = at(1, OwnershipPhase::Frozen);
        let claimed = at(2, OwnershipPhase::Serving);
        old.change_owner(empty, serving).unwrap();
        let error = new.change_owner(frozen, claimed).unwrap_err();
        assert!(matches!(error, ArenaError::NotOwner(found) if found == serving));
        old.change_owner(serving, frozen).unwrap();
        new.change_owner(frozen, claimed).unwrap();
        let error = old.change_owner(frozen, serving).unwrap_err();
        assert!(matches!(error, ArenaError::NotOwner(found) if found == claimed));
        assert!(new.is_serving(2) && !old.is_serving(1));
    }
}
