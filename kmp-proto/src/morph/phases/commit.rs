//! The phases from the freeze to the commit record, while the workload is frozen.

use super::super::reasons::{RollbackReason, SourceFailure, TargetFailure};
use super::super::record::{CommitOrder, CommitRecord};
use super::committed::{FencingSource, Serving};
use super::{Morph, Pair};
use crate::message::{Side, StateProvider, TransferMode};

/// The source is asked to freeze.
#[derive(Debug)]
pub struct Freezing {
    pub(super) provider: StateProvider,
    pub(super) mode: TransferMode,
    /// Number of the last round before the freeze.
    pub(super) round: u32,
}

/// The changes since the previous round are being transferred.
#[derive(Debug)]
pub struct LastRound {
    pub(in crate::morph) provider: StateProvider,
    pub(in crate::morph) mode: TransferMode,
    pub(in crate::morph) round: u32,
    digest: u64,
}

/// The target is asked to take over the frozen state.
#[derive(Debug)]
pub struct Activating {
    digest: u64,
}

/// The journal writes the commit record. Until the journal answers, the record may or may not be durable: a side's
/// death counts only afterwards, and no deadline causes a rollback.
#[derive(Debug, Default)]
pub struct Recording {
    source_died: Option<String>,
    target_died: Option<String>,
}

/// The next phase after the commit record.
pub(in crate::morph) enum Recorded {
    /// The target serves next.
    Serve(Morph<Serving>),
    /// The target died in the meantime.
    TargetFailed(Morph<FencingSource>),
}

impl Morph<Freezing> {
    /// Records that the source is frozen; `digest` is the digest of its state.
    pub(in crate::morph) fn frozen(self, digest: u64) -> Morph<LastRound> {
        let Freezing {
            provider,
            mode,
            round,
        } = self.phase;
        let phase = LastRound {
            provider,
            mode,
            round: round + 1,
            digest,
        };
        Self::with(self.pair, phase)
    }
}

impl Morph<LastRound> {
    /// Records that the last round is in place.
    pub(in crate::morph) fn applied(self) -> Morph<Activating> {
        let digest = self.phase.digest;
        Self::with(self.pair, Activating { digest })
    }
}

impl Morph<Activating> {
    /// Records that the target has taken over; `digest` is the digest of its state. The only origin of a
    /// [`CommitOrder`].
    ///
    /// # Errors
    /// If the digests differ.
    pub(in crate::morph) fn activated(
        self,
        digest: u64,
    ) -> Result<(Morph<Recording>, CommitOrder), (Pair, RollbackReason)> {
        if digest != self.phase.digest {
            let reason = RollbackReason::DigestsDiffer {
                source_digest: self.phase.digest,
                target_digest: digest,
            };
            return Err((self.pair, reason));
        }
        let order = CommitOrder::new(self.pair.source, self.pair.target);
        Ok((Self::with(self.pair, Recording::default()), order))
    }
}

impl Morph<Recording> {
    pub(in crate::morph) fn died(&mut self, side: Side, how: String) {
        match side {
            Side::Source => self.phase.source_died = Some(how),
            Side::Target => self.phase.target_died = Some(how),
        }
    }

    /// Records that the commit record is durable.
    ///
    /// # Errors
    /// The unchanged morph, if the record belongs to another morph.
    pub(in crate::morph) fn recorded(self, record: CommitRecord) -> Result<Recorded, Self> {
        if (record.source(), record.target()) != (self.pair.source, self.pair.target) {
            return Err(self);
        }
        let serving = Morph::<Serving>::committed(record);
        Ok(match self.phase.target_died {
            None => Recorded::Serve(serving),
            Some(how) => Recorded::TargetFailed(serving.target_failed(TargetFailure::Died(how))),
        })
    }

    /// Records that the commit record could not be written. Also returns a failure of the source in the meantime.
    pub(in crate::morph) fn not_recorded(self) -> (Pair, Option<SourceFailure>) {
        (self.pair, self.phase.source_died.map(SourceFailure::Died))
    }
}
