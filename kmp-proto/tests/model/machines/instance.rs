//! The engine of an instance.

use kmp_proto::instance::{
    Action, Condition, Desired, Engine, Event, Failure, JobNews, RecoveryEnd, Request, Stage,
    Successor, WatchOrder,
};
use kmp_proto::message::FailureCause;
use kmp_proto::time::Instant;

use super::morph::MorphEnd;
use super::recovery::End;
use super::text;
use crate::arena::Machine;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum InstanceOrigin {
    /// Adopted; whether as the successor of a recovery that is not over.
    Adopted(bool),
    /// In a morph; whether its active generation is watched.
    Morphing(bool),
    Resting(Wanted),
    /// It failed; whether it was decided before that a successor follows.
    Failed(Option<bool>),
}

/// [`Desired`], which is not `Hash`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Wanted {
    Running,
    Unhealed,
    Resting,
    OperatorAction,
}

impl Wanted {
    fn of(desired: Desired) -> Self {
        match desired {
            Desired::Unhealed => Self::Unhealed,
            Desired::Resting => Self::Resting,
            Desired::OperatorAction => Self::OperatorAction,
            // The model has nobody who asks for these.
            Desired::Running | Desired::Recover | Desired::Terminating => Self::Running,
        }
    }

    fn real(self) -> Desired {
        match self {
            Self::Running => Desired::Running,
            Self::Unhealed => Desired::Unhealed,
            Self::Resting => Desired::Resting,
            Self::OperatorAction => Desired::OperatorAction,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum InstanceEvent {
    Healthy,
    Failed,
    AskedMorph,
    BackOffOver,
    Granted,
    SuccessorStarted,
    RecoveryOver(End),
    SourceLeft,
    MorphOver(MorphEnd),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InstanceEffect {
    Watch(WatchOrder),
    Save(Wanted),
    /// Begin a recovery; whether with a successor.
    Recover(bool),
    Morph,
    TellHealthy,
    TellSuccessorFailed,
    TellSourceFailed,
    EndRecovery,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InstanceFacts {
    pub(crate) stage: Stage,
    pub(crate) may_morph: bool,
    /// A person is asked to act, or was told why nothing goes on.
    pub(crate) asks_person: bool,
}

/// The engine of one instance.
pub(crate) struct InstanceMachine(Engine);

fn failure() -> Failure {
    Failure {
        cause: FailureCause::KernelDead,
        evidence: vec![text()],
    }
}

impl InstanceMachine {
    fn effect(&self, action: Action) -> Option<InstanceEffect> {
        Some(match action {
            Action::Watch(order) => InstanceEffect::Watch(order),
            Action::Save => InstanceEffect::Save(Wanted::of(self.0.desired())),
            Action::Recover(order) => InstanceEffect::Recover(order.successor != Successor::None),
            Action::Morph => InstanceEffect::Morph,
            Action::Tell(JobNews::SuccessorHealthy) => InstanceEffect::TellHealthy,
            Action::Tell(JobNews::SuccessorFailed(_)) => InstanceEffect::TellSuccessorFailed,
            Action::Tell(JobNews::SourceFailed(_)) => InstanceEffect::TellSourceFailed,
            Action::EndRecovery(_) => InstanceEffect::EndRecovery,
            // Ports, what people see, and what the stage says as well.
            _ => return None,
        })
    }
}

impl Machine for InstanceMachine {
    type Origin = InstanceOrigin;
    type Event = InstanceEvent;
    type Effect = InstanceEffect;
    type Facts = InstanceFacts;

    fn begin(origin: InstanceOrigin) -> Self {
        const HEALS: bool = true;
        Self(match origin {
            InstanceOrigin::Adopted(succeeds) => Engine::adopted(HEALS, succeeds),
            InstanceOrigin::Morphing(watched) => Engine::morphing(HEALS, watched),
            InstanceOrigin::Resting(desired) => {
                Engine::resting(HEALS, desired.real(), Some(text()))
            }
            InstanceOrigin::Failed(decided) => {
                let decided = decided.map(|successor| match successor {
                    true => Successor::ByPolicy,
                    false => Successor::None,
                });
                Engine::failed(HEALS, failure(), decided, Instant::from_nanos(0))
            }
        })
    }

    fn handle(&mut self, event: InstanceEvent, now: Instant) {
        let event = match event {
            InstanceEvent::Healthy => Event::Healthy,
            InstanceEvent::Failed => Event::Failed(failure()),
            InstanceEvent::AskedMorph => Event::Asked(Request::Morph),
            InstanceEvent::BackOffOver => Event::BackOffOver,
            InstanceEvent::Granted => Event::Granted,
            InstanceEvent::SuccessorStarted => Event::SuccessorStarted,
            InstanceEvent::RecoveryOver(end) => Event::RecoveryOver(match end {
                End::Recovered => RecoveryEnd::Recovered,
                End::SuccessorFailed => RecoveryEnd::SuccessorFailed(text()),
                End::Quarantined => RecoveryEnd::Quarantined,
                End::Operator => RecoveryEnd::OperatorActionNeeded(text()),
            }),
            InstanceEvent::SourceLeft => Event::SourceLeft,
            InstanceEvent::MorphOver(end) => Event::MorphOver(end.outcome()),
        };
        self.0.handle(event, now);
    }

    fn effects(&mut self) -> Vec<InstanceEffect> {
        let mut effects = Vec::new();
        while let Some(action) = self.0.poll_action() {
            effects.extend(self.effect(action));
        }
        effects
    }

    fn timeout(&self) -> Option<Instant> {
        None
    }

    fn facts(&self) -> InstanceFacts {
        InstanceFacts {
            stage: self.0.stage(),
            may_morph: self.0.may(Request::Morph).is_ok(),
            asks_person: matches!(
                self.0.condition(),
                Condition::OperatorActionNeeded | Condition::Quarantined
            ),
        }
    }

    fn print(&self) -> String {
        format!("{:?}", self.0)
    }

    fn is_tick(_: InstanceEvent) -> bool {
        false
    }

    fn stage(&self) -> &'static str {
        self.0.stage().as_str()
    }

    fn name(event: InstanceEvent) -> &'static str {
        match event {
            InstanceEvent::Healthy => "Healthy",
            InstanceEvent::Failed => "Failed",
            InstanceEvent::AskedMorph => "Asked(morph)",
            InstanceEvent::BackOffOver => "BackOffOver",
            InstanceEvent::Granted => "Granted",
            InstanceEvent::SuccessorStarted => "SuccessorStarted",
            InstanceEvent::SourceLeft => "SourceLeft",
            InstanceEvent::RecoveryOver(end) => match end {
                End::Recovered => "RecoveryOver(Recovered)",
                End::SuccessorFailed => "RecoveryOver(SuccessorFailed)",
                End::Quarantined => "RecoveryOver(Quarantined)",
                End::Operator => "RecoveryOver(OperatorActionNeeded)",
            },
            InstanceEvent::MorphOver(end) => match end {
                MorphEnd::Committed => "MorphOver(Committed)",
                MorphEnd::CommittedButFailed => "MorphOver(CommittedButFailed)",
                MorphEnd::RolledBack => "MorphOver(RolledBack)",
                MorphEnd::SourceFailed => "MorphOver(SourceFailed)",
                MorphEnd::Operator(..) => "MorphOver(OperatorActionNeeded)",
            },
        }
    }
}
