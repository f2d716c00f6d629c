//! Reasons for a rollback, and failures of the two sides.

use std::fmt;
use std::time::Duration;

use super::negotiation::PassedOver;
use super::stage::Phase;
use crate::message::{Check, Side, StateProvider};

/// Why a morph is rolled back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RollbackReason {
    /// Requested, with the requester's reason.
    #[error("{0}")]
    Requested(String),
    /// The target could not be started.
    #[error("{0}")]
    NotStarted(String),
    /// The negotiation found no provider that both sides can use.
    #[error("incompatible: {0}")]
    Incompatible(Box<Incompatible>),
    /// Checks of the target failed.
    #[error(transparent)]
    Invalid(Invalid),
    /// The estimate exceeds the budget, and no user can decide.
    #[error(transparent)]
    OverBudget(OverBudget),
    /// A side has failed, according to its detector.
    #[error("the {} kernel has failed: {}", .0.as_str(), .1)]
    Died(Side, String),
    /// A side refused a request.
    #[error("the {} kernel refused: {}", .0.as_str(), .1)]
    Refused(Side, String),
    /// A side did not answer a request.
    #[error("the {} kernel did not answer: {}", .0.as_str(), .1)]
    Unanswered(Side, String),
    /// A phase, or a step of the commit, exceeded its deadline.
    #[error("the phase {} took too long", .0.as_str())]
    TookTooLong(Phase),
    /// The state of the target differs from the frozen state of the source.
    #[error("the state differs: source {source_digest:#x}, target {target_digest:#x}")]
    DigestsDiffer {
        /// Digest of the frozen state.
        source_digest: u64,
        /// Digest of the activated state.
        target_digest: u64,
    },
    /// The journal could not write the commit record.
    #[error("the commit record could not be written: {0}")]
    NotRecorded(String),
    /// An earlier daemon left the morph without a commit record.
    #[error("the daemon was restarted before the commit record")]
    DaemonRestarted,
}

/// Why no provider can carry a morph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incompatible {
    /// The providers that the source can use, including those unknown to the daemon.
    pub source: Vec<StateProvider>,
    /// The providers that the target can use.
    pub target: Vec<StateProvider>,
    /// The providers known to the daemon, in its order of preference, with the reason why each is impossible.
    pub passed_over: Vec<PassedOver>,
}

/// A requirement for a provider that one side, or both together, do not meet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// A side does not have the provider.
    #[error("{} kernel: it does not have this provider", .0.as_str())]
    NotOffered(Side),
    /// A side has the provider but cannot use it, with the side's reason.
    #[error("{} kernel: {}", .0.as_str(), .1)]
    Unable(Side, String),
    /// A side cannot move a required kind of state.
    #[error("{} kernel: cannot move {}", .0.as_str(), .1)]
    StateKind(Side, &'static str),
    /// The versions of the state's format differ.
    #[error("the state's format: source version {source_version}, target version {target_version}")]
    StateVersion {
        /// The version that the source writes.
        source_version: u32,
        /// The version that the target reads.
        target_version: u32,
    },
    /// No transfer mode is supported by both sides and the backend.
    #[error("a way to move state that both sides and the backend have")]
    Mode,
}

/// The failed checks of a validation report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    pub(super) failed: Vec<Check>,
}

/// The estimated downtime is above the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the estimated downtime of {estimate:?} is above the budget of {budget:?}")]
pub struct OverBudget {
    /// The estimate.
    pub estimate: Duration,
    /// The budget.
    pub budget: Duration,
}

/// How the source failed during the rollback of its morph.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceFailure {
    /// Failed, according to its detector.
    #[error("{0}")]
    Died(String),
    /// The side refused every request to resume.
    #[error("it could not resume: {0}")]
    RefusedToResume(String),
}

/// How the target failed after the commit record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetFailure {
    /// Failed, according to its detector.
    #[error("{0}")]
    Died(String),
    /// The side refused every request to serve.
    #[error("it refused to serve: {0}")]
    RefusedToServe(String),
}

/// A list of providers, for people.
struct Listed<'a>(&'a [StateProvider]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (index, provider) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{provider}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Incompatible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, target) = (Listed(&self.source), Listed(&self.target));
        write!(
            f,
            "no state provider that both kernels can use (the source offers {source}, the target {target})"
        )?;
        for PassedOver { provider, why } in &self.passed_over {
            write!(f, ": {provider}: {why}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Incompatible {}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("validation failed: ")?;
        if self.failed.is_empty() {
            return f.write_str("the report lists no check");
        }
        for (index, check) in self.failed.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", check.name, check.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}
