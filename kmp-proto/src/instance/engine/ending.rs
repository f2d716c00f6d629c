//! Wishes until they are in the journal, and the termination of the instance.

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

/// The reason given to a job whose instance is terminated.
pub(super) const TERMINATED: &str = "it was terminated meanwhile";
/// A requested termination that has not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    NotAsked,
    /// The wish is being written. Until it is durable, the instance is watched, and work under way continues.
    Recording {
        force: bool,
    },
    /// The wish is in the journal. The termination begins when the recovery or morph under way is over.
    AfterWork {
        force: bool,
    },
}

impl End {
    pub(super) fn is_recorded(self) -> bool {
        matches!(self, Self::AfterWork { .. })
    }
}

/// A recovery request that is being written.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) before: Idle,
    /// The failure of the instance in the meantime, if any.
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
                // The failure leads to the requested recovery as well.
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

    /// Records that the termination is in the journal.
    pub(super) fn end_recorded(&mut self, state: State) -> Taken {
        let End::Recording { force } = self.end else {
            return Taken::Not(state);
        };
        match state {
            State::Recovering(recovering) => {
                // The recovery finishes its fence first, but no longer waits for a successor.
                self.end = End::AfterWork { force };
                self.tell(JobNews::SuccessorFailed(TERMINATED.to_owned()));
                return Taken::To(State::Recovering(recovering));
            }
            State::Morphing(morphing) => {
                self.end = End::AfterWork { force };
                self.tell(JobNews::Terminated);
                return Taken::To(State::Morphing(morphing));
            }
            // A waiting recovery has had no effect yet.
            State::BackingOff(_) => self.actions.push_back(Action::CancelBackOff),
            _ => {}
        }
        Taken::To(self.end_now(force))
    }

    /// Records that the termination could not be written: handles the events that it had postponed.
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
