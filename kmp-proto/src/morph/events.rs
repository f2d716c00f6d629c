//! What the morph engine is told, what it wants done, and how it ends.

use std::time::Duration;

use super::Offer;
use super::phases::Failed;
use crate::fence::{FenceCertificate, FenceOrder};
use crate::message::{Check, Side, TransferMode};

/// What the engine is told.
#[derive(Debug)]
pub enum Event {
    /// The new generation is healthy.
    NewHealthy,
    /// A side acknowledged MORPH_PREPARE.
    Prepared(Side),
    /// A side answered MORPH_NEGOTIATE.
    Offered(Side, Offer),
    /// The new side has a round in place.
    RoundApplied {
        /// Bytes sent in it.
        sent_bytes: u64,
        /// Bytes that changed meanwhile.
        dirty_bytes: u64,
        /// How long it took.
        took: Duration,
    },
    /// The first state is over and nobody has asked for its validation yet: from here it may wait
    /// for [`super::Config::expiry`].
    Held,
    /// The new side's validation report.
    Report(Vec<Check>),
    /// Commit now, if the estimate is within the limit.
    CommitRequested {
        /// The limit.
        limit: CommitLimit,
        /// Nobody is there to decide what follows an estimate above the limit: roll back then.
        or_roll_back: bool,
    },
    /// Go back.
    RollbackRequested(String),
    /// The old workload stands still; digest of its state.
    Frozen(u64),
    /// The new workload has taken over; digest of its state.
    Activated(u64),
    /// The commit record is durable.
    RecordDurable,
    /// The commit record could not be written.
    RecordFailed(String),
    /// The new workload serves.
    Serving,
    /// The old workload has ended.
    Retired,
    /// The fence of a side is confirmed.
    Fenced(Side, FenceCertificate),
    /// The fence of a side could not be confirmed.
    FenceUnconfirmed(Side, String),
    /// The old workload serves again.
    OldRunning,
    /// A side refused something.
    Refused(Side, String),
    /// A side did not answer a request: no channel, or no reply in time. Nothing is known of that side; its
    /// detector alone judges whether the side lives.
    Unanswered(Side, String),
    /// A side has failed, by its detector's verdict.
    Died(Side, String),
    /// Time has passed.
    Tick,
}

/// Whether an event belongs to the state in which it arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It does: its row of the transition table was taken.
    Accepted,
    /// It changes nothing there.
    Refused {
        /// The state's name in the transition table.
        state: &'static str,
    },
}

/// The downtime at which a commit is still wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitLimit {
    /// [`super::Config::downtime_budget`].
    Planned,
    /// Another budget.
    Within(Duration),
    /// Whatever it takes.
    None,
}

impl Event {
    /// The name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NewHealthy => "NewHealthy",
            Self::Prepared(_) => "Prepared",
            Self::Offered(..) => "Offered",
            Self::RoundApplied { .. } => "RoundApplied",
            Self::Held => "Held",
            Self::Report(_) => "Report",
            Self::CommitRequested { .. } => "CommitRequested",
            Self::RollbackRequested(_) => "RollbackRequested",
            Self::Frozen(_) => "Frozen",
            Self::Activated(_) => "Activated",
            Self::RecordDurable => "RecordDurable",
            Self::RecordFailed(_) => "RecordFailed",
            Self::Serving => "Serving",
            Self::Retired => "Retired",
            Self::Fenced(Side::Old, _) => "Fenced(old)",
            Self::Fenced(Side::New, _) => "Fenced(new)",
            Self::FenceUnconfirmed(Side::Old, _) => "FenceUnconfirmed(old)",
            Self::FenceUnconfirmed(Side::New, _) => "FenceUnconfirmed(new)",
            Self::OldRunning => "OldRunning",
            Self::Refused(Side::Old, _) => "Refused(old)",
            Self::Refused(Side::New, _) => "Refused(new)",
            Self::Unanswered(Side::Old, _) => "Unanswered(old)",
            Self::Unanswered(Side::New, _) => "Unanswered(new)",
            Self::Died(Side::Old, _) => "Died(old)",
            Self::Died(Side::New, _) => "Died(new)",
            Self::Tick => "Tick",
        }
    }
}

/// A step of the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Old: FREEZE.
    Freezing,
    /// The last round.
    LastRound,
    /// New: ACTIVATE.
    Activating,
    /// The commit record.
    Recording,
    /// New: SERVE.
    Serving,
    /// Old: RETIRE.
    Retiring,
    /// The old generation's fence.
    FencingOld,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// MORPH_PREPARE to a side.
    Prepare(Side),
    /// MORPH_NEGOTIATE to a side.
    Negotiate(Side),
    /// Have a round sent and applied.
    Round {
        /// By reference or copied.
        mode: TransferMode,
        /// Its number.
        number: u32,
        /// The last one: the old workload stands still.
        last: bool,
    },
    /// MORPH_VALIDATE to the new side.
    Validate,
    /// It can be committed; this is the downtime to expect.
    Committable {
        /// The estimate.
        estimate: Duration,
    },
    /// The commit was refused, nothing has changed.
    CommitRefused(Failed),
    /// FREEZE to the old side.
    Freeze,
    /// ACTIVATE to the new side.
    Activate,
    /// Make the commit record durable.
    WriteCommitRecord,
    /// SERVE to the new side.
    Serve,
    /// RETIRE to the old side.
    Retire,
    /// Fence a side.
    Fence(Side, FenceOrder),
    /// MORPH_ROLLBACK to the old side: resume.
    ResumeOld,
    /// The phase has changed.
    Phase(&'static str),
    /// It is over.
    Finished(Outcome),
}

impl Action {
    /// The name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Prepare(Side::Old) => "Prepare(old)",
            Self::Prepare(Side::New) => "Prepare(new)",
            Self::Negotiate(Side::Old) => "Negotiate(old)",
            Self::Negotiate(Side::New) => "Negotiate(new)",
            Self::Round { last: false, .. } => "Round",
            Self::Round { last: true, .. } => "Round(last)",
            Self::Validate => "Validate",
            Self::Committable { .. } => "Committable",
            Self::CommitRefused(_) => "CommitRefused",
            Self::Freeze => "Freeze",
            Self::Activate => "Activate",
            Self::WriteCommitRecord => "WriteCommitRecord",
            Self::Serve => "Serve",
            Self::Retire => "Retire",
            Self::Fence(Side::Old, _) => "Fence(old)",
            Self::Fence(Side::New, _) => "Fence(new)",
            Self::ResumeOld => "ResumeOld",
            Self::Phase(_) => "Phase",
            Self::Finished(outcome) => match outcome {
                Outcome::Committed => "Finished(Committed)",
                Outcome::CommittedButFailed(_) => "Finished(CommittedButFailed)",
                Outcome::RolledBack(_) => "Finished(RolledBack)",
                Outcome::OldFailed(_) => "Finished(OldFailed)",
                Outcome::OperatorActionNeeded(_) => "Finished(OperatorActionNeeded)",
            },
        }
    }
}

/// How a morph ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The new generation serves, the old one is fenced.
    Committed,
    /// The new generation is the instance, the old one is fenced, but the new one does not serve:
    /// it needs a recovery.
    CommittedButFailed(String),
    /// The old generation serves, the new one is fenced.
    RolledBack(String),
    /// The new generation is fenced and the old one has failed: it needs a recovery.
    OldFailed(String),
    /// A fence could not be confirmed.
    OperatorActionNeeded(String),
}
