//! The states after the commit record: the morph always ends with the source fenced.

use super::{Engine, State, Taken, Timers};
use crate::message::Side;
use crate::morph::events::{Action, Event, Outcome};
use crate::morph::phases::{FencingSource, Morph, Retiring, Serving};
use crate::morph::reasons::TargetFailure;
use crate::morph::stage::Stage;
use crate::morph::{FROZEN_STEP_TIMEOUT, REQUEST_RETRY};
use crate::time::Instant;

#[derive(Debug)]
pub(super) enum Committed {
    Serving(Morph<Serving>),
    Retiring(Morph<Retiring>),
    FencingSource(Morph<FencingSource>),
}

impl Committed {
    pub(super) fn stage(&self) -> Stage {
        match self {
            Self::Serving(_) => Stage::Serving,
            Self::Retiring(_) => Stage::Retiring,
            Self::FencingSource(_) => Stage::FencingSource,
        }
    }
}

impl From<Committed> for Taken {
    fn from(committed: Committed) -> Self {
        Self::To(State::Committed(committed))
    }
}

impl Engine {
    pub(super) fn committed(&mut self, committed: Committed, event: Event, now: Instant) -> Taken {
        match committed {
            Committed::Serving(morph) => self.serving(morph, event, now),
            Committed::Retiring(morph) => self.retiring(morph, event, now),
            Committed::FencingSource(morph) => self.fencing_source(morph, event, now),
        }
    }

    pub(super) fn serve(&mut self, morph: Morph<Serving>, now: Instant) -> State {
        self.ask(Action::Serve(morph.phase.record.clone()), now);
        State::Committed(Committed::Serving(morph))
    }

    fn serving(&mut self, mut morph: Morph<Serving>, event: Event, now: Instant) -> Taken {
        match event {
            Event::Serving => {
                self.timers = Timers::until(Some(now + FROZEN_STEP_TIMEOUT));
                self.actions.push_back(Action::Retire);
                Committed::Retiring(morph.serves()).into()
            }
            Event::Died(Side::Target, how) => {
                let morph = morph.target_failed(TargetFailure::Died(how));
                Taken::To(self.fence_source(morph))
            }
            Event::Refused(Side::Target, text) => {
                morph.phase.refusals += 1;
                if self.ask_again_later(morph.phase.refusals, now) {
                    return Committed::Serving(morph).into();
                }
                let morph = morph.target_failed(TargetFailure::RefusedToServe(text));
                Taken::To(self.fence_source(morph))
            }
            Event::Unanswered(Side::Target, _) => {
                self.timers.retry_at = Some(now + REQUEST_RETRY);
                Committed::Serving(morph).into()
            }
            Event::Tick if self.ask_is_due(now) => Taken::To(self.serve(morph, now)),
            _ => Taken::Not(State::Committed(Committed::Serving(morph))),
        }
    }

    fn retiring(&mut self, mut morph: Morph<Retiring>, event: Event, now: Instant) -> Taken {
        match event {
            Event::Retired
            | Event::Refused(Side::Source, _)
            | Event::Unanswered(Side::Source, _)
            | Event::Died(Side::Source, _) => Taken::To(self.fence_source(morph.retired())),
            Event::Tick if self.timers.is_overdue(now) => {
                Taken::To(self.fence_source(morph.retired()))
            }
            Event::Died(Side::Target, how) => {
                morph.target_died(how);
                Committed::Retiring(morph).into()
            }
            _ => Taken::Not(State::Committed(Committed::Retiring(morph))),
        }
    }

    pub(super) fn fence_source(&mut self, mut morph: Morph<FencingSource>) -> State {
        morph.phase.attempts += 1;
        self.order_fence(Side::Source, morph.pair.source);
        State::Committed(Committed::FencingSource(morph))
    }

    fn fencing_source(
        &mut self,
        mut morph: Morph<FencingSource>,
        event: Event,
        now: Instant,
    ) -> Taken {
        let unchanged = |morph| Taken::Not(State::Committed(Committed::FencingSource(morph)));
        match event {
            Event::Fenced(Side::Source, certificate) => match morph.fenced(&certificate) {
                Ok(outcome) => Taken::To(self.finish(outcome)),
                Err(morph) => unchanged(morph),
            },
            Event::FenceUnconfirmed(Side::Source, why) => {
                if self.fence_again_later(morph.phase.attempts, now) {
                    return Committed::FencingSource(morph).into();
                }
                Taken::To(self.finish(Outcome::OperatorActionNeeded {
                    side: Side::Source,
                    why,
                    target_failure: morph.target_failure(),
                }))
            }
            Event::Tick if self.timers.retry_is_due(now) => Taken::To(self.fence_source(morph)),
            Event::Died(Side::Target, how) => {
                morph.target_died(how);
                Committed::FencingSource(morph).into()
            }
            _ => unchanged(morph),
        }
    }
}
