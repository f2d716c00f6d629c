//! The phases after the commit record: the target owns the instance, and the morph ends with the source fenced.

use super::super::events::Outcome;
use super::super::reasons::TargetFailure;
use super::super::record::CommitRecord;
use super::{Morph, Pair};
use crate::fence::FenceCertificate;

/// The target is asked to serve, with the record that allows it.
#[derive(Debug)]
pub struct Serving {
    pub(in crate::morph) record: CommitRecord,
    pub(in crate::morph) refusals: u32,
}

/// The target serves; the source is asked to end its workload.
#[derive(Debug)]
pub struct Retiring {
    target_failure: Option<TargetFailure>,
}

/// The source is fenced.
#[derive(Debug)]
pub struct FencingSource {
    target_failure: Option<TargetFailure>,
    pub(in crate::morph) attempts: u32,
}

impl Morph<Serving> {
    /// Continues from a durable record, written by this daemon or by an earlier one.
    pub fn committed(record: CommitRecord) -> Self {
        let pair = Pair {
            source: record.source(),
            target: record.target(),
        };
        let phase = Serving {
            record,
            refusals: 0,
        };
        Self { pair, phase }
    }

    /// Records that the target serves.
    pub(in crate::morph) fn serves(self) -> Morph<Retiring> {
        let target_failure = None;
        Self::with(self.pair, Retiring { target_failure })
    }

    /// Records that the target will never serve.
    pub(in crate::morph) fn target_failed(self, how: TargetFailure) -> Morph<FencingSource> {
        let phase = FencingSource {
            target_failure: Some(how),
            attempts: 0,
        };
        Self::with(self.pair, phase)
    }
}

impl Morph<Retiring> {
    pub(in crate::morph) fn target_died(&mut self, how: String) {
        self.phase.target_failure = Some(TargetFailure::Died(how));
    }

    /// Records that the source's workload has ended, or the source no longer answers.
    pub(in crate::morph) fn retired(self) -> Morph<FencingSource> {
        let target_failure = self.phase.target_failure;
        let attempts = 0;
        Self::with(
            self.pair,
            FencingSource {
                target_failure,
                attempts,
            },
        )
    }
}

impl Morph<FencingSource> {
    pub(in crate::morph) fn target_died(&mut self, how: String) {
        self.phase.target_failure = Some(TargetFailure::Died(how));
    }

    pub(in crate::morph) fn target_failure(self) -> Option<TargetFailure> {
        self.phase.target_failure
    }

    /// Records that the source is fenced: the morph is over.
    ///
    /// # Errors
    /// The unchanged morph, if the certificate belongs to another generation.
    pub(in crate::morph) fn fenced(self, certificate: &FenceCertificate) -> Result<Outcome, Self> {
        if certificate.generation() != self.pair.source {
            return Err(self);
        }
        Ok(match self.phase.target_failure {
            None => Outcome::Committed,
            Some(how) => Outcome::CommittedButFailed(how),
        })
    }
}
