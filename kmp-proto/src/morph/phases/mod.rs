//! The phases of a morph as types: each owns only the data of its phase, and each transition consumes it.
//!
//! | file | phases |
//! |---|---|
//! | `open` | up to the validation: the source serves, and a rollback is always possible |
//! | `commit` | from the freeze to the commit record |
//! | `committed` | after the record: only forward |
//! | `rollback` | rollback |

mod commit;
mod committed;
mod open;
mod rollback;

pub use commit::{Activating, Freezing, LastRound, Recording};
pub use committed::{FencingSource, Retiring, Serving};
pub use open::{Committable, Held, Negotiating, Preparing, Transferring, Validating};
pub use rollback::{FencingTarget, Resuming};

pub(super) use commit::Recorded;
pub(super) use open::{Agreement, Preparation, Progress, Round};
pub(super) use rollback::Undone;

/// A morph in the phase `P`.
#[derive(Debug)]
pub struct Morph<P> {
    pub(super) pair: Pair,
    pub(super) phase: P,
}

/// The generations of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) source: u64,
    pub(super) target: u64,
}

impl<P> Morph<P> {
    fn with<Q>(pair: Pair, phase: Q) -> Morph<Q> {
        Morph { pair, phase }
    }
}
