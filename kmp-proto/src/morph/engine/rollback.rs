//! Rollback: the target is fenced, then the source serves again.

use super::{Engine, State, Taken};
use crate::message::Side;
use crate::morph::REQUEST_RETRY;
use crate::morph::events::{Action, Event, Outcome};
use crate::morph::phases::{FencingTarget, Morph, Resuming, Undone};
use crate::morph::reasons::{RollbackReason, SourceFailure};
use crate::morph::stage::Stage;
use crate::time::Instant;

#[derive(Debug)]
pub(super) enum RollingBack {
    FencingTarget(Morph<FencingTarget>),
    Resuming(Morph<Resuming>),
}

impl RollingBack {
    pub(super) fn stage(&self) -> Stage {
        match self {
            Self::FencingTarget(_) => Stage::FencingTarget,
            Self::Resuming(_) => Stage::Resuming,
        }
    }

    pub(super) fn reason(&self) -> &RollbackReason {
        match self {
            Self::FencingTarget(morph) => &morph.phase.reason,
            Self::Resuming(morph) => &morph.phase.reason,
        }
    }
}

impl From<RollingBack> for Taken {
    fn from(rolling_back: RollingBack) -> Self {
        Self::To(State::RollingBack(rolling_back))
    }
}

impl Engine {
    pub(super) fn rolling_back(
        &mut self,
        rolling_back: RollingBack,
        event: Event,
        now: Instant,
    ) -> Taken {
        if matches!(event, Event::RollbackRequested(_)) {
            return rolling_back.into();
        }
        match rolling_back {
            RollingBack::FencingTarget(morph) => self.fencing_target(morph, event, now),
            RollingBack::Resuming(morph) => self.resuming(morph, event, now),
        }
    }

    pub(super) fn fence_target(&mut self, mut morph: Morph<FencingTarget>) -> State {
        morph.phase.attempts += 1;
        self.order_fence(Side::Target, morph.pair.target);
        State::RollingBack(RollingBack::FencingTarget(morph))
    }

    fn fencing_target(
        &mut self,
        mut morph: Morph<FencingTarget>,
        event: Event,
        now: Instant,
    ) -> Taken {
        let unchanged = |morph| Taken::Not(State::RollingBack(RollingBack::FencingTarget(morph)));
        match event {
            Event::Fenced(Side::Target, certificate) => match morph.fenced(certificate) {
                Ok(Undone::Resume(morph)) => Taken::To(self.resume(morph, now)),
                Ok(Undone::Over(outcome)) => Taken::To(self.finish(outcome)),
                Err(morph) => unchanged(morph),
            },
            Event::FenceUnconfirmed(Side::Target, why) => {
                if self.fence_again_later(morph.phase.attempts, now) {
                    return RollingBack::FencingTarget(morph).into();
                }
                Taken::To(self.finish(Outcome::OperatorActionNeeded {
                    side: Side::Target,
                    why,
                    target_failure: None,
                }))
            }
            Event::Tick if self.timers.retry_is_due(now) => Taken::To(self.fence_target(morph)),
            Event::Died(Side::Source, how) => {
                morph.source_died(how);
                RollingBack::FencingTarget(morph).into()
            }
            _ => unchanged(morph),
        }
    }

    fn resume(&mut self, morph: Morph<Resuming>, now: Instant) -> State {
        let certificate = morph.phase.target_fenced.clone();
        self.ask(Action::ResumeSource(certificate), now);
        State::RollingBack(RollingBack::Resuming(morph))
    }

    fn resuming(&mut self, mut morph: Morph<Resuming>, event: Event, now: Instant) -> Taken {
        match event {
            Event::SourceRunning => Taken::To(self.finish(morph.resumed())),
            Event::Refused(Side::Source, text) => {
                morph.phase.refusals += 1;
                if self.ask_again_later(morph.phase.refusals, now) {
                    return RollingBack::Resuming(morph).into();
                }
                let failure = SourceFailure::RefusedToResume(text);
                Taken::To(self.finish(morph.source_failed(failure)))
            }
            Event::Unanswered(Side::Source, _) => {
                self.timers.retry_at = Some(now + REQUEST_RETRY);
                RollingBack::Resuming(morph).into()
            }
            Event::Tick if self.ask_is_due(now) => Taken::To(self.resume(morph, now)),
            Event::Died(Side::Source, how) => {
                Taken::To(self.finish(morph.source_failed(SourceFailure::Died(how))))
            }
            _ => Taken::Not(State::RollingBack(RollingBack::Resuming(morph))),
        }
    }
}
