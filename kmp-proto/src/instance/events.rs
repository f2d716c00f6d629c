//! Events and requests of the instance engine, and its actions.

use std::time::Duration;

use super::{Desired, Stage};
use crate::message::FailureCause;
use crate::morph;
use crate::time::Instant;

/// A failure and its evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The verdict.
    pub cause: FailureCause,
    /// The evidence of the failure.
    pub evidence: Vec<String>,
}

impl Failure {
    /// Returns all evidence in one line.
    pub fn text(&self) -> String {
        self.evidence.join("; ")
    }
}

/// An event for the engine.
#[derive(Debug)]
pub enum Event {
    /// The watched generation answers and is healthy.
    Healthy,
    /// The generation is silent, with the duration of the silence.
    Silent(String),
    /// The generation answers again.
    Answers,
    /// The health that its agent reports has changed: the problem, if any.
    Said(Option<String>),
    /// Its load has changed: the problem, if any.
    Load(Option<String>),
    /// The watched generation has failed.
    Failed(Failure),
    /// Its program ended before the generation served.
    ProgramEnded(String),
    /// The policy has changed.
    Policy {
        /// Whether a failed instance is recovered automatically.
        auto_heal: bool,
    },
    /// A request.
    Asked(Request),
    /// A wish is in the journal.
    Recorded(Wish),
    /// A wish could not be written.
    NotRecorded(Wish),
    /// The back-off is over.
    BackOffOver,
    /// The recovery is admitted.
    Granted,
    /// The recovery has started a successor, which is watched from here on.
    SuccessorStarted,
    /// The recovery is over.
    RecoveryOver(RecoveryEnd),
    /// The morph fences its source: the end of that generation is not a failure.
    SourceLeft,
    /// The morph is over.
    MorphOver(morph::Outcome),
    /// The capture is over.
    CaptureOver,
    /// A recovery or a morph has ended without a report: it panicked.
    JobGone,
    /// An ended generation still holds resources.
    Unreturned(String),
    /// The instance has been terminated and forgotten.
    Ended,
    /// The instance could not be terminated.
    NotEnded(String),
}

/// A request about an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fence the generation and start a successor, whatever its state.
    Recover,
    /// Move the instance to another kernel.
    Morph,
    /// Capture the instance's memory.
    Capture,
    /// Terminate the instance.
    Terminate {
        /// Skip the clean shutdown, and end a morph too.
        force: bool,
    },
}

/// A job that prevents a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Its spawn is under way.
    Spawning,
    /// The instance does not run.
    NotRunning,
    /// A recovery is under way.
    Recovering,
    /// A morph is under way.
    Morphing,
    /// A capture is under way.
    Capturing,
    /// A termination is under way.
    Terminating,
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

/// A wish, written to the journal before the engine acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To recover the instance.
    Recover,
    /// To terminate the instance.
    Terminate,
}

impl Wish {
    /// Returns the desired state of the instance once the wish is in the journal.
    pub const fn desired(self) -> Desired {
        match self {
            Self::Recover => Desired::Recover,
            Self::Terminate => Desired::Terminating,
        }
    }
}

/// Whether a recovery starts a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Successor {
    /// Yes: the policy heals.
    ByPolicy,
    /// Yes: an operator requested the recovery.
    Asked,
    /// No: the instance failed too often.
    None,
}

/// An order to begin a recovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveryOrder {
    /// The failure to recover from.
    pub failure: Failure,
    /// Whether it starts a successor.
    pub successor: Successor,
    /// The time of the decision.
    pub decided_at: Instant,
}

/// How a recovery ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecoveryEnd {
    /// The successor is healthy.
    Recovered,
    /// The successor failed.
    SuccessorFailed(String),
    /// The generation is fenced, and no successor was started.
    Quarantined,
    /// An operator has to act.
    OperatorActionNeeded(String),
}

/// An action for the shell.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// About the watch of the active generation.
    Watch(WatchOrder),
    /// About the published ports.
    Ports(PortOrder),
    /// [`Engine::condition`](super::Engine::condition) or its reason has changed.
    Show,
    /// [`Engine::desired`](super::Engine::desired) or its reason has changed: write it.
    Save,
    /// Write a wish; [`Event::Recorded`] or [`Event::NotRecorded`] answers.
    Record(Wish),
    /// [`Event::BackOffOver`] is due after this time.
    BackOff(Duration),
    /// [`Event::BackOffOver`] is no longer due.
    CancelBackOff,
    /// Ask for the admission of a recovery; [`Event::Granted`] answers.
    Queue,
    /// Begin a recovery.
    Recover(RecoveryOrder),
    /// An admitted recovery is over.
    ReturnGrant,
    /// Begin the requested morph.
    Morph,
    /// Begin the requested capture.
    Capture,
    /// Inform the recovery or the morph under way.
    Tell(JobNews),
    /// End the record of an earlier daemon's recovery, whose successor was adopted.
    EndRecovery(RecoveryEnd),
    /// End the operation that waits for the spawn with success.
    SpawnSucceeded,
    /// Fail the operation that waits for a spawn or a recovery: the instance is being terminated.
    Disappoint,
    /// Terminate the instance; [`Event::Ended`] or [`Event::NotEnded`] answers.
    End(EndOrder),
    /// Part of the instance's state is lost: start again from the journal.
    StartOver,
    /// Nothing is left to do.
    Stop,
}

/// About the watch of the active generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchOrder {
    /// Begin a watch.
    Begin,
    /// Begin the watch of a generation that an earlier daemon watched.
    Adopt,
    /// Take over the watch of a morph's target; begin one if the morph had none.
    TakeOver,
    /// End the watch.
    End,
    /// Ignore silence for a while.
    Pause,
    /// Stop ignoring silence.
    Resume,
}

/// About the published ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortOrder {
    /// Direct connections to the active generation.
    Aim,
    /// Let connections wait.
    Hold,
    /// Let connections wait, and refuse them if nothing serves for a long time.
    HoldForAWhile,
    /// Refuse connections unless a process may serve.
    Close,
}

/// News for a job in progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobNews {
    /// The recovery: its successor is healthy.
    SuccessorHealthy,
    /// The recovery: its successor failed, or is no longer wanted.
    SuccessorFailed(String),
    /// The morph: the source failed.
    SourceFailed(String),
    /// The morph: neither side serves again.
    Terminated,
}

/// How an instance is ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndOrder {
    /// On request.
    Asked {
        /// Skip the clean shutdown.
        force: bool,
    },
    /// The spawn failed, with the reason.
    SpawnFailed(String),
}

impl Event {
    /// Returns the name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Healthy => "Healthy",
            Self::Silent(_) => "Silent",
            Self::Answers => "Answers",
            Self::Said(_) => "Said",
            Self::Load(_) => "Load",
            Self::Failed(_) => "Failed",
            Self::ProgramEnded(_) => "ProgramEnded",
            Self::Policy { .. } => "Policy",
            Self::Asked(Request::Recover) => "Asked(recover)",
            Self::Asked(Request::Morph) => "Asked(morph)",
            Self::Asked(Request::Capture) => "Asked(capture)",
            Self::Asked(Request::Terminate { .. }) => "Asked(terminate)",
            Self::Recorded(Wish::Recover) => "Recorded(recover)",
            Self::Recorded(Wish::Terminate) => "Recorded(terminate)",
            Self::NotRecorded(Wish::Recover) => "NotRecorded(recover)",
            Self::NotRecorded(Wish::Terminate) => "NotRecorded(terminate)",
            Self::BackOffOver => "BackOffOver",
            Self::Granted => "Granted",
            Self::SuccessorStarted => "SuccessorStarted",
            Self::RecoveryOver(end) => match end {
                RecoveryEnd::Recovered => "RecoveryOver(Recovered)",
                RecoveryEnd::SuccessorFailed(_) => "RecoveryOver(SuccessorFailed)",
                RecoveryEnd::Quarantined => "RecoveryOver(Quarantined)",
                RecoveryEnd::OperatorActionNeeded(_) => "RecoveryOver(OperatorActionNeeded)",
            },
            Self::MorphOver(outcome) => match outcome {
                morph::Outcome::Committed => "MorphOver(Committed)",
                morph::Outcome::CommittedButFailed(_) => "MorphOver(CommittedButFailed)",
                morph::Outcome::RolledBack(_) => "MorphOver(RolledBack)",
                morph::Outcome::SourceFailed { .. } => "MorphOver(SourceFailed)",
                morph::Outcome::OperatorActionNeeded { .. } => "MorphOver(OperatorActionNeeded)",
            },
            Self::SourceLeft => "SourceLeft",
            Self::CaptureOver => "CaptureOver",
            Self::JobGone => "JobGone",
            Self::Unreturned(_) => "Unreturned",
            Self::Ended => "Ended",
            Self::NotEnded(_) => "NotEnded",
        }
    }
}

impl Action {
    /// Returns the name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Watch(WatchOrder::Begin) => "Watch(begin)",
            Self::Watch(WatchOrder::Adopt) => "Watch(adopt)",
            Self::Watch(WatchOrder::TakeOver) => "Watch(take over)",
            Self::Watch(WatchOrder::End) => "Watch(end)",
            Self::Watch(WatchOrder::Pause) => "Watch(pause)",
            Self::Watch(WatchOrder::Resume) => "Watch(resume)",
            Self::Ports(PortOrder::Aim) => "Ports(aim)",
            Self::Ports(PortOrder::Hold) => "Ports(hold)",
            Self::Ports(PortOrder::HoldForAWhile) => "Ports(hold for a while)",
            Self::Ports(PortOrder::Close) => "Ports(close)",
            Self::Show => "Show",
            Self::Save => "Save",
            Self::Record(Wish::Recover) => "Record(recover)",
            Self::Record(Wish::Terminate) => "Record(terminate)",
            Self::BackOff(_) => "BackOff",
            Self::CancelBackOff => "CancelBackOff",
            Self::Queue => "Queue",
            Self::Recover(_) => "Recover",
            Self::ReturnGrant => "ReturnGrant",
            Self::Morph => "Morph",
            Self::Capture => "Capture",
            Self::Tell(JobNews::SuccessorHealthy) => "Tell(SuccessorHealthy)",
            Self::Tell(JobNews::SuccessorFailed(_)) => "Tell(SuccessorFailed)",
            Self::Tell(JobNews::SourceFailed(_)) => "Tell(SourceFailed)",
            Self::Tell(JobNews::Terminated) => "Tell(Terminated)",
            Self::EndRecovery(_) => "EndRecovery",
            Self::SpawnSucceeded => "SpawnSucceeded",
            Self::Disappoint => "Disappoint",
            Self::End(_) => "End",
            Self::StartOver => "StartOver",
            Self::Stop => "Stop",
        }
    }
}
