//! Events and actions of the morph engine, and its results.

use std::time::Duration;

use super::negotiation::{Choice, Offer};
use super::reasons::{OverBudget, RollbackReason, SourceFailure, TargetFailure};
use super::record::{CommitOrder, CommitRecord};
use super::stage::{Phase, Stage};
use crate::fence::{FenceCertificate, FenceOrder};
use crate::message::{Check, Side, StateProvider, TransferMode};

/// The events of the engine.
#[derive(Debug)]
pub enum Event {
    /// The target generation is healthy.
    TargetHealthy,
    /// The target could not be started.
    NotStarted(String),
    /// A side acknowledged MORPH_PREPARE.
    Prepared(Side),
    /// A side answered MORPH_NEGOTIATE.
    Offered(Side, Offer),
    /// The target has applied a round.
    RoundApplied {
        /// Bytes sent in the round.
        sent_bytes: u64,
        /// Bytes that changed in the meantime.
        dirty_bytes: u64,
        /// Duration of the round.
        took: Duration,
    },
    /// A user requests the validation.
    ValidationRequested,
    /// The target's validation report.
    Report(Vec<Check>),
    /// Commit now, if the estimate is within the limit.
    CommitRequested {
        /// The limit.
        limit: CommitLimit,
        /// If no user can decide about an estimate above the limit: roll back.
        or_roll_back: bool,
    },
    /// A rollback was requested, with the requester's reason.
    RollbackRequested(String),
    /// The source workload is frozen; digest of its state.
    Frozen(u64),
    /// The target workload has taken over; digest of its state.
    Activated(u64),
    /// The commit record is durable.
    RecordDurable(CommitRecord),
    /// The commit record could not be written.
    RecordFailed(String),
    /// The target workload serves.
    Serving,
    /// The source workload has ended.
    Retired,
    /// The fence of a side is confirmed.
    Fenced(Side, FenceCertificate),
    /// The fence of a side could not be confirmed.
    FenceUnconfirmed(Side, String),
    /// The source workload serves again.
    SourceRunning,
    /// A side refused a request.
    Refused(Side, String),
    /// A side did not answer a request: no channel, or no reply in time. The state of that side is unknown; only
    /// its detector decides whether it is alive.
    Unanswered(Side, String),
    /// A side has failed, according to its detector.
    Died(Side, String),
    /// Time has passed.
    Tick,
}

/// Whether an event belongs to the state in which it arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The event belongs to the state: a row of the transition table was taken.
    Accepted,
    /// The event changes nothing in this state.
    Refused {
        /// The state in which it changes nothing.
        stage: Stage,
    },
}

/// The maximum downtime for a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitLimit {
    /// [`super::Config::downtime_budget`].
    Planned,
    /// Another budget.
    Within(Duration),
    /// No limit.
    None,
}

impl Event {
    /// Returns the name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::TargetHealthy => "TargetHealthy",
            Self::NotStarted(_) => "NotStarted",
            Self::Prepared(_) => "Prepared",
            Self::Offered(..) => "Offered",
            Self::RoundApplied { .. } => "RoundApplied",
            Self::ValidationRequested => "ValidationRequested",
            Self::Report(_) => "Report",
            Self::CommitRequested { .. } => "CommitRequested",
            Self::RollbackRequested(_) => "RollbackRequested",
            Self::Frozen(_) => "Frozen",
            Self::Activated(_) => "Activated",
            Self::RecordDurable(_) => "RecordDurable",
            Self::RecordFailed(_) => "RecordFailed",
            Self::Serving => "Serving",
            Self::Retired => "Retired",
            Self::Fenced(Side::Source, _) => "Fenced(source)",
            Self::Fenced(Side::Target, _) => "Fenced(target)",
            Self::FenceUnconfirmed(Side::Source, _) => "FenceUnconfirmed(source)",
            Self::FenceUnconfirmed(Side::Target, _) => "FenceUnconfirmed(target)",
            Self::SourceRunning => "SourceRunning",
            Self::Refused(Side::Source, _) => "Refused(source)",
            Self::Refused(Side::Target, _) => "Refused(target)",
            Self::Unanswered(Side::Source, _) => "Unanswered(source)",
            Self::Unanswered(Side::Target, _) => "Unanswered(target)",
            Self::Died(Side::Source, _) => "Died(source)",
            Self::Died(Side::Target, _) => "Died(target)",
            Self::Tick => "Tick",
        }
    }
}

/// An action that the caller must carry out.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// MORPH_PREPARE to a side.
    Prepare(Side),
    /// MORPH_NEGOTIATE to a side.
    Negotiate(Side),
    /// The negotiation has chosen a provider.
    Chosen(Choice),
    /// Transfer and apply a round.
    Round {
        /// The state provider to use.
        provider: StateProvider,
        /// By reference or copied.
        mode: TransferMode,
        /// Its number.
        number: u32,
        /// Whether this is the last round: the source workload is frozen.
        last: bool,
    },
    /// MORPH_VALIDATE to the target.
    Validate,
    /// The first round is applied; the engine waits for [`Event::ValidationRequested`].
    Transferred,
    /// The morph can be committed; this is the expected downtime.
    Committable(Estimate),
    /// The commit was refused; nothing has changed.
    CommitRefused(OverBudget),
    /// FREEZE to the source.
    Freeze,
    /// ACTIVATE to the target.
    Activate,
    /// Make the commit record durable.
    WriteCommitRecord(CommitOrder),
    /// SERVE to the target, which the record allows.
    Serve(CommitRecord),
    /// RETIRE to the source.
    Retire,
    /// Fence a side.
    Fence(Side, FenceOrder),
    /// MORPH_ROLLBACK to the source: resume, which the target's certificate allows.
    ResumeSource(FenceCertificate),
    /// The phase has changed.
    Phase(Phase),
    /// The morph is over.
    Finished(Outcome),
}

impl Action {
    /// Returns the name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Prepare(Side::Source) => "Prepare(source)",
            Self::Prepare(Side::Target) => "Prepare(target)",
            Self::Negotiate(Side::Source) => "Negotiate(source)",
            Self::Negotiate(Side::Target) => "Negotiate(target)",
            Self::Chosen(_) => "Chosen",
            Self::Round { last: false, .. } => "Round",
            Self::Round { last: true, .. } => "Round(last)",
            Self::Validate => "Validate",
            Self::Transferred => "Transferred",
            Self::Committable(_) => "Committable",
            Self::CommitRefused(_) => "CommitRefused",
            Self::Freeze => "Freeze",
            Self::Activate => "Activate",
            Self::WriteCommitRecord(_) => "WriteCommitRecord",
            Self::Serve(_) => "Serve",
            Self::Retire => "Retire",
            Self::Fence(Side::Source, _) => "Fence(source)",
            Self::Fence(Side::Target, _) => "Fence(target)",
            Self::ResumeSource(_) => "ResumeSource",
            Self::Phase(_) => "Phase",
            Self::Finished(outcome) => match outcome {
                Outcome::Committed => "Finished(Committed)",
                Outcome::CommittedButFailed(_) => "Finished(CommittedButFailed)",
                Outcome::RolledBack(_) => "Finished(RolledBack)",
                Outcome::SourceFailed { .. } => "Finished(SourceFailed)",
                Outcome::OperatorActionNeeded { .. } => "Finished(OperatorActionNeeded)",
            },
        }
    }
}

/// How a morph ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The target serves, the source is fenced.
    Committed,
    /// The target is the instance, the source is fenced, but the target does not serve: it needs a recovery.
    CommittedButFailed(TargetFailure),
    /// The source serves, the target is fenced.
    RolledBack(RollbackReason),
    /// The target is fenced and the source has failed: it needs a recovery.
    SourceFailed {
        /// Why the morph was rolled back.
        reason: RollbackReason,
        /// How the source failed.
        failure: SourceFailure,
    },
    /// The fence of a side could not be confirmed.
    OperatorActionNeeded {
        /// The side: the source after the commit record, else the target.
        side: Side,
        /// The reason.
        why: String,
        /// How the target failed after the commit record, if it did: then neither side serves.
        target_failure: Option<TargetFailure>,
    },
}

impl Outcome {
    /// Returns the side that is the instance now.
    pub const fn owner(&self) -> Side {
        match self {
            Self::Committed | Self::CommittedButFailed(_) => Side::Target,
            Self::RolledBack(_) | Self::SourceFailed { .. } => Side::Source,
            Self::OperatorActionNeeded { side, .. } => match side {
                Side::Source => Side::Target,
                Side::Target => Side::Source,
            },
        }
    }
}

/// The expected downtime of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Measured in this morph: the exchanges with both sides, and the last round.
    pub measured: Duration,
    /// The remaining cost of the steps: [`super::Config::step_overhead`].
    pub overhead: Duration,
}

impl Estimate {
    /// Returns the sum.
    pub fn total(self) -> Duration {
        self.measured.saturating_add(self.overhead)
    }
}
