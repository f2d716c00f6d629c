//! The engine of a recovery.

use kmp_proto::fence::FenceOrder;
use kmp_proto::recovery::{Action, Afterwards, CapturePolicy, Engine, Event, Outcome};
use kmp_proto::time::Instant;

use super::{Gen, certify, text};
use crate::arena::Machine;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RecoveryOrigin {
    /// The generation is to be fenced; whether a successor follows.
    New(Gen, bool),
    /// The journal has its certificate.
    Fenced(Gen, bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RecoveryEvent {
    Fenced,
    FenceUnconfirmed,
    Captured,
    CaptureFailed,
    Released,
    SuccessorStarted,
    SuccessorHealthy(Gen),
    SuccessorFailed,
    Tick,
}

/// How a recovery ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum End {
    Recovered,
    SuccessorFailed,
    Quarantined,
    Operator,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecoveryEffect {
    Fence,
    Capture,
    Reclaim,
    Respawn,
    Finished(End),
}

/// A recovery's engine, and the order to fence that nobody has carried out yet.
pub(crate) struct RecoveryMachine {
    engine: Engine,
    fence: Option<FenceOrder>,
}

impl RecoveryMachine {
    fn real(&mut self, event: RecoveryEvent) -> Option<Event> {
        Some(match event {
            RecoveryEvent::Fenced => Event::Fenced(certify(self.fence.take()?)),
            RecoveryEvent::FenceUnconfirmed => {
                self.fence.take()?;
                Event::FenceUnconfirmed(text())
            }
            RecoveryEvent::Captured => Event::Captured,
            RecoveryEvent::CaptureFailed => Event::CaptureFailed(text()),
            RecoveryEvent::Released => Event::Released,
            RecoveryEvent::SuccessorStarted => Event::SuccessorStarted,
            RecoveryEvent::SuccessorHealthy(generation) => Event::SuccessorHealthy {
                generation: generation.into(),
            },
            RecoveryEvent::SuccessorFailed => Event::SuccessorFailed(text()),
            RecoveryEvent::Tick => Event::Tick,
        })
    }

    fn effect(&mut self, action: Action) -> Option<RecoveryEffect> {
        Some(match action {
            Action::Fence(order) => {
                self.fence = Some(order);
                RecoveryEffect::Fence
            }
            Action::Capture(_) => RecoveryEffect::Capture,
            Action::Reclaim(_) => RecoveryEffect::Reclaim,
            Action::Respawn(_) => RecoveryEffect::Respawn,
            Action::Finished(outcome) => RecoveryEffect::Finished(match outcome {
                Outcome::Recovered => End::Recovered,
                Outcome::SuccessorFailed(_) => End::SuccessorFailed,
                Outcome::Quarantined => End::Quarantined,
                Outcome::OperatorActionNeeded(_) => End::Operator,
            }),
            Action::NoticeSurvivors | Action::Complete { .. } => return None,
        })
    }
}

impl Machine for RecoveryMachine {
    type Origin = RecoveryOrigin;
    type Event = RecoveryEvent;
    type Effect = RecoveryEffect;
    type Facts = ();

    fn begin(origin: RecoveryOrigin) -> Self {
        let then = |respawn| match respawn {
            true => Afterwards::Respawn,
            false => Afterwards::Quarantine,
        };
        let engine = match origin {
            RecoveryOrigin::New(failed, respawn) => {
                Engine::new(failed.into(), CapturePolicy::On, then(respawn))
            }
            RecoveryOrigin::Fenced(failed, respawn) => {
                let certificate = certify(FenceOrder::new(failed.into()));
                Engine::resume_fenced(certificate, CapturePolicy::On, then(respawn))
            }
        };
        Self {
            engine,
            fence: None,
        }
    }

    fn handle(&mut self, event: RecoveryEvent, now: Instant) {
        if let Some(event) = self.real(event) {
            self.engine.handle(event, now);
        }
    }

    fn effects(&mut self) -> Vec<RecoveryEffect> {
        let mut effects = Vec::new();
        while let Some(action) = self.engine.poll_action() {
            effects.extend(self.effect(action));
        }
        effects
    }

    fn timeout(&self) -> Option<Instant> {
        self.engine.poll_timeout()
    }

    fn facts(&self) {}

    fn print(&self) -> String {
        format!("{:?} {:?}", self.engine, self.fence)
    }

    fn is_tick(event: RecoveryEvent) -> bool {
        event == RecoveryEvent::Tick
    }

    fn stage(&self) -> &'static str {
        self.engine.phase()
    }

    fn name(event: RecoveryEvent) -> &'static str {
        match event {
            RecoveryEvent::Fenced => "Fenced",
            RecoveryEvent::FenceUnconfirmed => "FenceUnconfirmed",
            RecoveryEvent::Captured => "Captured",
            RecoveryEvent::CaptureFailed => "CaptureFailed",
            RecoveryEvent::Released => "Released",
            RecoveryEvent::SuccessorStarted => "SuccessorStarted",
            RecoveryEvent::SuccessorHealthy(_) => "SuccessorHealthy",
            RecoveryEvent::SuccessorFailed => "SuccessorFailed",
            RecoveryEvent::Tick => "Tick",
        }
    }
}
