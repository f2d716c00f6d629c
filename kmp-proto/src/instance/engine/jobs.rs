//! Morphs, and captures on request.

use super::ending::End;
use super::idle::{Idle, Rest};
use super::{Engine, State, Taken};
use crate::instance::Condition;
use crate::instance::events::{Action, Event, Failure, JobNews, PortOrder, WatchOrder};
use crate::message::{FailureCause, Side};
use crate::morph::Outcome;
use crate::time::Instant;

/// A morph under way.
#[derive(Debug, Default)]
pub(super) struct Morphing {
    /// The watched generation, its source, failed. The morph is told, but may have ended before: then its outcome does
    /// not mention the failure, and no watch reports it again.
    failure: Option<Failure>,
}

/// A capture under way.
#[derive(Debug)]
pub(super) struct Capturing {
    pub(super) before: Idle,
    /// The failure of the generation in the meantime. It is handled once the memory has been read.
    pub(super) failure: Option<Failure>,
}

impl Engine {
    pub(super) fn morphing_on(
        &mut self,
        mut morphing: Morphing,
        event: Event,
        now: Instant,
    ) -> Taken {
        match event {
            Event::Failed(failure) => {
                self.tell(JobNews::SourceFailed(failure.text()));
                morphing.failure = Some(failure);
            }
            Event::SourceLeft => self.watch(WatchOrder::End),
            Event::MorphOver(outcome) => {
                return Taken::To(self.morph_over(morphing, outcome, now));
            }
            Event::JobGone => self.actions.push_back(Action::StartOver),
            _ => return Taken::Not(State::Morphing(morphing)),
        }
        Taken::To(State::Morphing(morphing))
    }

    fn morph_over(&mut self, was: Morphing, outcome: Outcome, now: Instant) -> State {
        if let End::AfterWork { force } = self.end {
            self.watched = true;
            return self.end_now(force);
        }
        let failed = |how: String| Failure {
            cause: FailureCause::KernelDead,
            evidence: vec![how],
        };
        let failure = match outcome {
            // Nothing has fenced a target that keeps its resources, so the source, which may serve, must not be healed
            // next to it.
            Outcome::OperatorActionNeeded {
                side: Side::Target,
                why,
                ..
            } => return self.rest(Rest::OperatorAction, Some(why)),
            Outcome::OperatorActionNeeded {
                side: Side::Source,
                why,
                target_failure: Some(_),
            } => {
                self.watched = true;
                self.watch(WatchOrder::End);
                let state = self.rest(Rest::OperatorAction, Some(why));
                self.ports(PortOrder::Close);
                return state;
            }
            Outcome::Committed
            | Outcome::OperatorActionNeeded {
                side: Side::Source,
                target_failure: None,
                ..
            } => {
                self.watch(WatchOrder::TakeOver);
                self.show_serving();
                return State::Idle(Idle::Serving);
            }
            Outcome::RolledBack(_) => {
                if let Some(failure) = was.failure {
                    // The morph ended before it was told.
                    self.show(Condition::Failed, Some(failure.text()));
                    return self.heal(failure, now);
                }
                if !self.watched {
                    self.watch(WatchOrder::Begin);
                }
                self.show_serving();
                return State::Idle(Idle::Serving);
            }
            Outcome::CommittedButFailed(failure) => failed(failure.to_string()),
            Outcome::SourceFailed { failure, .. } => failed(failure.to_string()),
        };
        // The generation is the target, which the session has watched until now, or the source.
        self.watched = true;
        self.show(Condition::Failed, Some(failure.text()));
        self.heal(failure, now)
    }

    /// The silence of a frozen generation says nothing. Its end is a failure, which is handled once its memory has been
    /// read.
    pub(super) fn capturing(
        &mut self,
        mut capturing: Capturing,
        event: Event,
        now: Instant,
    ) -> Taken {
        match event {
            Event::Failed(failure) => {
                let text = failure.text();
                let reason = format!("{text}; it is recovered when its memory has been read");
                self.show(Condition::Failed, Some(reason));
                capturing.failure = Some(failure);
                Taken::To(State::Capturing(capturing))
            }
            Event::CaptureOver => Taken::To(match capturing.failure {
                Some(failure) => self.idle_failed(capturing.before, failure, now),
                None => {
                    if self.watched {
                        self.watch(WatchOrder::Resume);
                    }
                    State::Idle(capturing.before)
                }
            }),
            _ => Taken::Not(State::Capturing(capturing)),
        }
    }
}
