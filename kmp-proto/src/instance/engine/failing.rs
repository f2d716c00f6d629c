//! From a failure to the end of its recovery.

use std::time::Duration;

use super::ending::End;
use super::idle::{Idle, Rest};
use super::{Engine, State, Taken};
use crate::instance::events::{
    Action, Event, Failure, JobNews, PortOrder, RecoveryEnd, RecoveryOrder, Successor, WatchOrder,
};
use crate::instance::{Condition, Desired};
use crate::message::FailureCause;
use crate::recovery::Decision;
use crate::time::Instant;

/// A failure whose handling waits until a termination is written or refused.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) before: Idle,
    pub(super) failure: Failure,
}

/// A recovery under way.
#[derive(Debug)]
pub(super) struct Recovering {
    successor: Successor,
    /// Why the instance rests afterwards, if it does.
    pub(super) rests_because: Option<String>,
    /// True once a successor was started.
    started: bool,
    /// The successor failed. The recovery is told, but may have ended before: then its end does not mention the failure,
    /// and no watch reports it again.
    failure: Option<Failure>,
}

impl RecoveryOrder {
    pub(super) fn desired(&self) -> Desired {
        desired(self.successor)
    }

    pub(super) fn rests_because(&self) -> Option<String> {
        (self.successor == Successor::None).then(|| self.failure.text())
    }
}

impl Recovering {
    pub(super) fn desired(&self) -> Desired {
        match self.started {
            true => Desired::Running,
            false => desired(self.successor),
        }
    }
}

fn desired(successor: Successor) -> Desired {
    match successor {
        Successor::ByPolicy => Desired::Running,
        Successor::Asked => Desired::Recover,
        Successor::None => Desired::Resting,
    }
}

impl Engine {
    /// Applies the policy to a failure.
    pub(super) fn heal(&mut self, failure: Failure, now: Instant) -> State {
        self.watch(WatchOrder::End);
        self.ports(PortOrder::HoldForAWhile);
        if self.end != End::NotAsked {
            return State::Failed(Failed {
                before: Idle::Serving,
                failure,
            });
        }
        if !self.auto_heal {
            self.ports(PortOrder::Close);
            self.actions.push_back(Action::Save);
            return State::Idle(Idle::Resting(Rest::Unhealed));
        }
        let mut order = RecoveryOrder {
            failure,
            successor: Successor::ByPolicy,
            decided_at: now,
        };
        match self.restarts.failed(now) {
            Decision::RecoverAfter(Duration::ZERO) => self.queue(order),
            Decision::RecoverAfter(wait) => {
                self.actions.push_back(Action::BackOff(wait));
                State::BackingOff(order)
            }
            Decision::Quarantine { failures } => {
                let why = format!("{failures} failures in a row: quarantined");
                order.failure.evidence.push(why);
                order.successor = Successor::None;
                // Another daemon may have to finish the recovery.
                self.actions.push_back(Action::Save);
                self.queue(order)
            }
        }
    }

    pub(super) fn queue(&mut self, order: RecoveryOrder) -> State {
        self.actions.push_back(Action::Queue);
        State::Queued(order)
    }

    pub(super) fn backing_off(&mut self, order: RecoveryOrder, event: Event) -> Taken {
        match event {
            Event::BackOffOver => Taken::To(self.queue(order)),
            _ => Taken::Not(State::BackingOff(order)),
        }
    }

    pub(super) fn queued(&mut self, order: RecoveryOrder, event: Event) -> Taken {
        let Event::Granted = event else {
            return Taken::Not(State::Queued(order));
        };
        let (successor, rests_because) = (order.successor, order.rests_because());
        self.show(Condition::Recovering, Some(order.failure.text()));
        self.actions.push_back(Action::Recover(order));
        Taken::To(State::Recovering(Recovering {
            successor,
            rests_because,
            started: false,
            failure: None,
        }))
    }

    pub(super) fn recovering(
        &mut self,
        mut recovering: Recovering,
        event: Event,
        now: Instant,
    ) -> Taken {
        match event {
            Event::SuccessorStarted => {
                recovering.started = true;
                // What failed before was another generation.
                recovering.failure = None;
                self.watch(WatchOrder::End);
                // A recorded termination was already reported to the recovery.
                if !self.end.is_recorded() {
                    self.watch(WatchOrder::Begin);
                }
            }
            Event::Healthy => {
                self.healthy(now);
                self.tell(JobNews::SuccessorHealthy);
            }
            Event::Failed(failure) => {
                self.ports(PortOrder::Hold);
                self.tell(JobNews::SuccessorFailed(failure.text()));
                recovering.failure = Some(failure);
            }
            Event::RecoveryOver(end) => {
                self.actions.push_back(Action::ReturnGrant);
                return Taken::To(self.recovery_over(recovering, end, now));
            }
            Event::JobGone => self.actions.push_back(Action::StartOver),
            _ => return Taken::Not(State::Recovering(recovering)),
        }
        Taken::To(State::Recovering(recovering))
    }

    fn recovery_over(&mut self, was: Recovering, end: RecoveryEnd, now: Instant) -> State {
        if let End::AfterWork { force } = self.end {
            return self.end_now(force);
        }
        match end {
            RecoveryEnd::Recovered => match was.failure {
                // The recovery ended before it was told.
                Some(failure) => {
                    self.show(Condition::Failed, Some(failure.text()));
                    self.heal(failure, now)
                }
                None => {
                    self.show_serving();
                    State::Idle(Idle::Serving)
                }
            },
            RecoveryEnd::SuccessorFailed(reason) => {
                let cause = was.failure.map(|failure| failure.cause);
                let failure = Failure {
                    cause: cause.unwrap_or(FailureCause::KernelDead),
                    evidence: vec![reason],
                };
                self.show(Condition::Failed, Some(failure.text()));
                self.heal(failure, now)
            }
            RecoveryEnd::Quarantined => {
                let state = self.rest(Rest::Quarantined, was.rests_because);
                self.ports(PortOrder::Close);
                state
            }
            RecoveryEnd::OperatorActionNeeded(why) => {
                let state = self.rest(Rest::OperatorAction, Some(why));
                self.ports(PortOrder::Close);
                state
            }
        }
    }

    pub(super) fn rest(&mut self, rest: Rest, reason: Option<String>) -> State {
        self.show(rest.condition(), reason);
        self.actions.push_back(Action::Save);
        State::Idle(Idle::Resting(rest))
    }

    pub(super) fn tell(&mut self, news: JobNews) {
        self.actions.push_back(Action::Tell(news));
    }
}
