//! The engine of a morph.

use std::time::Duration;

use kmp_proto::fence::FenceOrder;
use kmp_proto::message::{Check, CheckResult, ProviderOffer, Side, StateProvider, capability};
use kmp_proto::morph::{
    Action, CommitLimit, CommitOrder, CommitRecord, Config, Engine, Event, Offer, Outcome,
    RollbackReason, SourceFailure, Stage, TargetFailure,
};
use kmp_proto::time::Instant;

use super::{Gen, certify, text};
use crate::arena::Machine;

/// The digest of the workload's state.
const DIGEST: u64 = 5;

/// How a morph ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MorphEnd {
    Committed,
    CommittedButFailed,
    RolledBack,
    SourceFailed,
    /// A fence was not confirmed: of this side, and whether the target failed too.
    Operator(Side, bool),
}

impl MorphEnd {
    fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Committed => Self::Committed,
            Outcome::CommittedButFailed(_) => Self::CommittedButFailed,
            Outcome::RolledBack(_) => Self::RolledBack,
            Outcome::SourceFailed { .. } => Self::SourceFailed,
            Outcome::OperatorActionNeeded {
                side,
                target_failure,
                ..
            } => Self::Operator(*side, target_failure.is_some()),
        }
    }

    pub(super) fn outcome(self) -> Outcome {
        let reason = RollbackReason::DaemonRestarted;
        match self {
            Self::Committed => Outcome::Committed,
            Self::CommittedButFailed => Outcome::CommittedButFailed(TargetFailure::Died(text())),
            Self::RolledBack => Outcome::RolledBack(reason),
            Self::SourceFailed => Outcome::SourceFailed {
                reason,
                failure: SourceFailure::Died(text()),
            },
            Self::Operator(side, failed) => Outcome::OperatorActionNeeded {
                side,
                why: text(),
                target_failure: failed.then(|| TargetFailure::Died(text())),
            },
        }
    }

    /// The side that is the instance now.
    pub(crate) fn owner(self) -> Side {
        self.outcome().owner()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MorphOrigin {
    Begin(Gen, Gen),
    Committed(Gen, Gen),
    Uncommitted(Gen, Gen),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MorphEvent {
    TargetHealthy,
    NotStarted,
    Prepared(Side),
    Offered(Side),
    RoundApplied,
    Report,
    Commit,
    RollbackRequested,
    Frozen,
    Activated,
    RecordDurable,
    RecordFailed,
    Serving,
    Retired,
    Fenced(Side),
    FenceUnconfirmed(Side),
    SourceRunning,
    Refused(Side),
    Unanswered(Side),
    Died(Side),
    Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MorphEffect {
    Prepare(Side),
    Negotiate(Side),
    Round,
    LastRound,
    Validate,
    Committable,
    Freeze,
    Activate,
    WriteCommitRecord,
    Serve,
    Retire,
    Fence(Side),
    ResumeSource,
    Finished(MorphEnd),
}

/// A morph's engine, and the orders that it has given and nobody has carried out yet.
pub(crate) struct MorphMachine {
    engine: Engine,
    record: Option<CommitOrder>,
    fence: Option<FenceOrder>,
}

fn offer() -> Offer {
    Offer {
        providers: vec![ProviderOffer {
            provider: StateProvider::Cooperative,
            memory_bytes: 0,
            dirty_bytes_per_s: 0,
            state_kinds: capability::MEMORY,
            modes: capability::BY_REFERENCE,
            state_version: 1,
            why_not: String::new(),
        }],
        ..Offer::default()
    }
}

fn config() -> Config {
    Config {
        phase_timeout: Duration::from_secs(60),
        expiry: Duration::from_secs(600),
        downtime_budget: Duration::from_millis(10),
        step_overhead: Duration::from_millis(1),
        preference: StateProvider::ALL,
        required_kinds: capability::MEMORY,
        possible_modes: capability::BY_REFERENCE,
        validate_on_request: false,
    }
}

impl MorphMachine {
    /// The engine's own event, with the token of the order that was carried out.
    fn real(&mut self, event: MorphEvent) -> Option<Event> {
        Some(match event {
            MorphEvent::TargetHealthy => Event::TargetHealthy,
            MorphEvent::NotStarted => Event::NotStarted(text()),
            MorphEvent::Prepared(side) => Event::Prepared(side),
            MorphEvent::Offered(side) => Event::Offered(side, offer()),
            MorphEvent::RoundApplied => Event::RoundApplied {
                sent_bytes: 0,
                dirty_bytes: 0,
                took: Duration::ZERO,
            },
            MorphEvent::Report => Event::Report(vec![Check {
                name: "index".to_owned(),
                result: CheckResult::Passed,
                duration_us: 1,
                detail: String::new(),
            }]),
            MorphEvent::Commit => Event::CommitRequested {
                limit: CommitLimit::Planned,
                or_roll_back: true,
            },
            MorphEvent::RollbackRequested => Event::RollbackRequested(text()),
            MorphEvent::Frozen => Event::Frozen(DIGEST),
            MorphEvent::Activated => Event::Activated(DIGEST),
            MorphEvent::RecordDurable => Event::RecordDurable(self.record.take()?.recorded()),
            MorphEvent::RecordFailed => {
                self.record.take()?;
                Event::RecordFailed(text())
            }
            MorphEvent::Serving => Event::Serving,
            MorphEvent::Retired => Event::Retired,
            MorphEvent::Fenced(side) => Event::Fenced(side, certify(self.fence.take()?)),
            MorphEvent::FenceUnconfirmed(side) => {
                self.fence.take()?;
                Event::FenceUnconfirmed(side, text())
            }
            MorphEvent::SourceRunning => Event::SourceRunning,
            MorphEvent::Refused(side) => Event::Refused(side, text()),
            MorphEvent::Unanswered(side) => Event::Unanswered(side, text()),
            MorphEvent::Died(side) => Event::Died(side, text()),
            MorphEvent::Tick => Event::Tick,
        })
    }

    fn effect(&mut self, action: Action) -> Option<MorphEffect> {
        Some(match action {
            Action::Prepare(side) => MorphEffect::Prepare(side),
            Action::Negotiate(side) => MorphEffect::Negotiate(side),
            Action::Round { last: false, .. } => MorphEffect::Round,
            Action::Round { last: true, .. } => MorphEffect::LastRound,
            Action::Validate => MorphEffect::Validate,
            Action::Committable(_) => MorphEffect::Committable,
            Action::Freeze => MorphEffect::Freeze,
            Action::Activate => MorphEffect::Activate,
            Action::WriteCommitRecord(order) => {
                self.record = Some(order);
                MorphEffect::WriteCommitRecord
            }
            Action::Serve(_) => MorphEffect::Serve,
            Action::Retire => MorphEffect::Retire,
            Action::Fence(side, order) => {
                self.fence = Some(order);
                MorphEffect::Fence(side)
            }
            Action::ResumeSource(_) => MorphEffect::ResumeSource,
            Action::Finished(outcome) => MorphEffect::Finished(MorphEnd::of(&outcome)),
            Action::Chosen(_)
            | Action::Transferred
            | Action::CommitRefused(_)
            | Action::Phase(_) => return None,
        })
    }
}

impl Machine for MorphMachine {
    type Origin = MorphOrigin;
    type Event = MorphEvent;
    type Effect = MorphEffect;
    type Facts = (Stage, Side);

    fn begin(origin: MorphOrigin) -> Self {
        let zero = Instant::from_nanos(0);
        let engine = match origin {
            MorphOrigin::Begin(source, target) => {
                Engine::new(config(), source.into(), target.into(), zero)
            }
            MorphOrigin::Committed(source, target) => {
                let record = CommitRecord::restore_from_journal(source.into(), target.into());
                Engine::resume_committed(record, zero)
            }
            MorphOrigin::Uncommitted(source, target) => {
                Engine::resume_uncommitted(source.into(), target.into())
            }
        };
        Self {
            engine,
            record: None,
            fence: None,
        }
    }

    fn handle(&mut self, event: MorphEvent, now: Instant) {
        // Without its order, nobody can report that one was carried out.
        if let Some(event) = self.real(event) {
            self.engine.handle(event, now);
        }
    }

    fn effects(&mut self) -> Vec<MorphEffect> {
        let mut effects = Vec::new();
        while let Some(action) = self.engine.poll_action() {
            effects.extend(self.effect(action));
        }
        effects
    }

    fn timeout(&self) -> Option<Instant> {
        self.engine.poll_timeout()
    }

    fn facts(&self) -> (Stage, Side) {
        (self.engine.stage(), self.engine.owner())
    }

    fn print(&self) -> String {
        format!("{:?} {:?} {:?}", self.engine, self.record, self.fence)
    }

    fn is_tick(event: MorphEvent) -> bool {
        event == MorphEvent::Tick
    }

    fn stage(&self) -> &'static str {
        self.engine.stage().as_str()
    }

    fn name(event: MorphEvent) -> &'static str {
        match event {
            MorphEvent::Commit => "CommitRequested",
            MorphEvent::TargetHealthy => "TargetHealthy",
            MorphEvent::NotStarted => "NotStarted",
            MorphEvent::Prepared(_) => "Prepared",
            MorphEvent::Offered(_) => "Offered",
            MorphEvent::RoundApplied => "RoundApplied",
            MorphEvent::Report => "Report",
            MorphEvent::RollbackRequested => "RollbackRequested",
            MorphEvent::Frozen => "Frozen",
            MorphEvent::Activated => "Activated",
            MorphEvent::RecordDurable => "RecordDurable",
            MorphEvent::RecordFailed => "RecordFailed",
            MorphEvent::Serving => "Serving",
            MorphEvent::Retired => "Retired",
            MorphEvent::SourceRunning => "SourceRunning",
            MorphEvent::Tick => "Tick",
            MorphEvent::Fenced(Side::Source) => "Fenced(source)",
            MorphEvent::Fenced(Side::Target) => "Fenced(target)",
            MorphEvent::FenceUnconfirmed(Side::Source) => "FenceUnconfirmed(source)",
            MorphEvent::FenceUnconfirmed(Side::Target) => "FenceUnconfirmed(target)",
            MorphEvent::Refused(Side::Source) => "Refused(source)",
            MorphEvent::Refused(Side::Target) => "Refused(target)",
            MorphEvent::Unanswered(Side::Source) => "Unanswered(source)",
            MorphEvent::Unanswered(Side::Target) => "Unanswered(target)",
            MorphEvent::Died(Side::Source) => "Died(source)",
            MorphEvent::Died(Side::Target) => "Died(target)",
        }
    }
}
