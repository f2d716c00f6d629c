//! Wishes on their way into the journal, and the end of the instance.

use super::failing::Failed;
use super::idle::{Idle, Rest};
use super::{Engine, State, Taken};
use crate::instance::events::{
    Action, EndOrder, Event, Failure, JobNews, PortOrder, RecoveryOrder, Successor, WatchOrder,
    Wish,
};
use crate::instance::{ASKED_FOR, Condition};
use crate::message::FailureCause;
use crate::time::Instant;

/// What a job is told whose instance is to be ended.
pub(super) const TERMINATED: &str = "it was terminated meanwhile";
/// A wanted end, before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    NotAsked,
    /// It is being written. Until then the instance is watched, and what is under way goes on.
    Recording {
        force: bool,
    },
    /// It is in the journal, and begins when the recovery or morph under way is over.
    AfterWork {
        force: bool,
    },
}

impl End {
    pub(super) fn is_recorded(self) -> bool {
        matches!(self, Self::AfterWork { .. })
    }
}

/// A recovery that is asked for is being written.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) before: Idle,
    /// It failed meanwhile.
    pub(super) failure: Option<Failure>,
}

impl Engine {
    pub(super) fn recovery_asked(&mut self, mut asked: Asked, event: Event, now: Instant) -> Taken {
        match event {
            Event::Recorded(Wish::Recover) => {
                self.restarts.forgive();
                self.watch(WatchOrder::End);
                self.ports(PortOrder::HoldForAWhile);
                let failure = Failure {
                    cause: FailureCause::Operator,
                    evidence: vec![ASKED_FOR.to_owned()],
                };
                Taken::To(self.queue(RecoveryOrder {
                    failure,
                    successor: Successor::Asked,
                    decided_at: now,
                }))
            }
            Event::NotRecorded(Wish::Recover) => Taken::To(match asked.failure {
                Some(failure) => self.idle_failed(asked.before, failure, now),
                None => State::Idle(asked.before),
            }),
            Event::Failed(failure) => {
                // What was asked for follows from this as well.
                self.show(Condition::Failed, Some(failure.text()));
                self.ports(PortOrder::Hold);
                asked.failure = Some(failure);
                Taken::To(State::Asked(asked))
            }
            Event::Healthy if !matches!(asked.before, Idle::Resting(_)) => {
                self.healthy(now);
                self.show_serving();
                asked.before = Idle::Serving;
                Taken::To(State::Asked(asked))
            }
            _ => Taken::Not(State::Asked(asked)),
        }
    }

    /// Its end is in the journal.
    pub(super) fn end_recorded(&mut self, state: State) -> Taken {
        let End::Recording { force } = self.end else {
            return Taken::Not(state);
        };
        match state {
            State::Recovering(recovering) => {
                // Its fence is finished first; a successor is not waited for any longer.
                self.end = End::AfterWork { force };
                self.tell(JobNews::SuccessorFailed(TERMINATED.to_owned()));
                return Taken::To(State::Recovering(recovering));
            }
            State::Morphing(morphing) => {
                self.end = End::AfterWork { force };
                self.tell(JobNews::Terminated);
                return Taken::To(State::Morphing(morphing));
            }
            // A recovery that waits has had no effect yet.
            State::BackingOff(_) => self.actions.push_back(Action::CancelBackOff),
            _ => {}
        }
        Taken::To(self.end_now(force))
    }

    /// Its end could not be written: what happened meanwhile is dealt with now.
    pub(super) fn end_not_recorded(&mut self, state: State, now: Instant) -> Taken {
        let End::Recording { .. } = self.end else {
            return Taken::Not(state);
        };
        self.end = End::NotAsked;
        Taken::To(match state {
            State::Failed(Failed { before, failure }) => self.idle_failed(before, failure, now),
            state => state,
        })
    }

    pub(super) fn end_now(&mut self, force: bool) -> State {
        self.end = End::NotAsked;
        self.actions.push_back(Action::Disappoint);
        self.show(Condition::Terminating, None);
        self.ports(PortOrder::Hold);
        self.watch(WatchOrder::End);
        self.actions
            .push_back(Action::End(EndOrder::Asked { force }));
        State::Ending
    }

    pub(super) fn ending_on(&mut self, event: Event) -> Taken {
        match event {
            Event::Unreturned(what) => {
                self.show(Condition::Terminating, Some(what));
                Taken::To(State::Ending)
            }
            Event::Ended => {
                self.actions.push_back(Action::Stop);
                Taken::To(State::Gone)
            }
            Event::NotEnded(why) => {
                self.show(Condition::OperatorActionNeeded, Some(why));
                self.ports(PortOrder::Close);
                Taken::To(State::Idle(Idle::Resting(Rest::NotEnded)))
            }
            _ => Taken::Not(State::Ending),
        }
    }
}
