//! Rollback: the target is fenced, then the source serves again.

use super::super::events::Outcome;
use super::super::reasons::{RollbackReason, SourceFailure};
use super::{Morph, Pair};
use crate::fence::FenceCertificate;

/// The target is fenced.
#[derive(Debug)]
pub struct FencingTarget {
    pub(in crate::morph) reason: RollbackReason,
    source_failure: Option<SourceFailure>,
    pub(in crate::morph) attempts: u32,
}

/// The source is asked to serve again, with the certificate that allows it.
#[derive(Debug)]
pub struct Resuming {
    pub(in crate::morph) reason: RollbackReason,
    pub(in crate::morph) target_fenced: FenceCertificate,
    pub(in crate::morph) refusals: u32,
}

/// The next phase after the target's fence.
pub(in crate::morph) enum Undone {
    /// The source serves next.
    Resume(Morph<Resuming>),
    /// The source has failed too.
    Over(Outcome),
}

impl Morph<FencingTarget> {
    /// Starts a rollback from any phase before the commit record.
    pub(in crate::morph) fn begin(
        pair: Pair,
        reason: RollbackReason,
        source_failure: Option<SourceFailure>,
    ) -> Self {
        let phase = FencingTarget {
            reason,
            source_failure,
            attempts: 0,
        };
        Self { pair, phase }
    }

    pub(in crate::morph) fn source_died(&mut self, how: String) {
        self.phase.source_failure = Some(SourceFailure::Died(how));
    }

    /// Records that the target is fenced. The only origin of a [`Resuming`].
    ///
    /// # Errors
    /// The unchanged morph, if the certificate belongs to another generation.
    pub(in crate::morph) fn fenced(self, certificate: FenceCertificate) -> Result<Undone, Self> {
        if certificate.generation() != self.pair.target {
            return Err(self);
        }
        let reason = self.phase.reason;
        if let Some(failure) = self.phase.source_failure {
            return Ok(Undone::Over(Outcome::SourceFailed { reason, failure }));
        }
        let phase = Resuming {
            reason,
            target_fenced: certificate,
            refusals: 0,
        };
        Ok(Undone::Resume(Self::with(self.pair, phase)))
    }
}

impl Morph<Resuming> {
    /// Records that the source serves again.
    pub(in crate::morph) fn resumed(self) -> Outcome {
        Outcome::RolledBack(self.phase.reason)
    }

    /// Records that the source will never serve again.
    pub(in crate::morph) fn source_failed(self, failure: SourceFailure) -> Outcome {
        let reason = self.phase.reason;
        Outcome::SourceFailed { reason, failure }
    }
}
