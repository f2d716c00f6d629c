//! No work under way: the instance starts, serves or rests. New work begins here.

use super::ending::{Asked, End};
use super::failing::Failed;
use super::jobs::{Capturing, Morphing};
use super::{Engine, State, Taken};
use crate::instance::events::{
    Action, Doing, EndOrder, Event, Failure, PortOrder, Request, WatchOrder, Wish,
};
use crate::instance::{Condition, Desired};
use crate::time::Instant;

/// The shown reason while an instance's memory is captured.
const FROZEN: &str = "its memory is being captured";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Idle {
    /// Waits for the first healthy answer.
    Starting {
        /// True if a spawn waits for the answer.
        spawning: bool,
    },
    Serving,
    Resting(Rest),
}

/// Why nothing happens until an operator acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// The instance failed while auto-heal was off.
    Unhealed,
    /// The instance failed too often.
    Quarantined,
    /// A fence could not be confirmed, or a vmcore could not be captured.
    OperatorAction,
    /// The termination failed and must be requested again.
    NotEnded,
}

impl Rest {
    pub(super) fn condition(self) -> Condition {
        match self {
            Self::Unhealed => Condition::Failed,
            Self::Quarantined => Condition::Quarantined,
            Self::OperatorAction | Self::NotEnded => Condition::OperatorActionNeeded,
        }
    }
}

impl From<Desired> for Rest {
    fn from(desired: Desired) -> Self {
        match desired {
            Desired::Unhealed => Self::Unhealed,
            Desired::OperatorAction => Self::OperatorAction,
            Desired::Terminating => Self::NotEnded,
            // The first two are not states of rest: a daemon that finds them recovers or adopts the instance.
            Desired::Running | Desired::Recover | Desired::Resting => Self::Quarantined,
        }
    }
}

impl Idle {
    pub(super) fn desired(self) -> Desired {
        match self {
            Self::Starting { .. } | Self::Serving => Desired::Running,
            Self::Resting(Rest::Unhealed) => Desired::Unhealed,
            Self::Resting(Rest::Quarantined) => Desired::Resting,
            Self::Resting(Rest::OperatorAction) => Desired::OperatorAction,
            Self::Resting(Rest::NotEnded) => Desired::Terminating,
        }
    }
}

impl Engine {
    pub(super) fn idle(&mut self, idle: Idle, event: Event, now: Instant) -> Taken {
        if let Idle::Resting(_) = idle {
            // The generation is not watched, or an operator has to act first.
            return Taken::Not(State::Idle(idle));
        }
        match event {
            Event::Healthy => {
                self.healthy(now);
                self.show_serving();
                if idle == (Idle::Starting { spawning: true }) {
                    self.actions.push_back(Action::SpawnSucceeded);
                }
                Taken::To(State::Idle(Idle::Serving))
            }
            // The watch reports this only for an instance that was healthy once.
            Event::Silent(text) if idle == Idle::Serving => {
                self.show(Condition::Unresponsive, Some(text));
                Taken::To(State::Idle(idle))
            }
            Event::Answers if idle == Idle::Serving => {
                self.show_serving();
                Taken::To(State::Idle(idle))
            }
            Event::Failed(failure) => Taken::To(self.idle_failed(idle, failure, now)),
            Event::ProgramEnded(how) if self.end == End::NotAsked => match idle {
                Idle::Starting { spawning: true } => Taken::To(self.give_up_spawn(how)),
                _ => Taken::Not(State::Idle(idle)),
            },
            _ => Taken::Not(State::Idle(idle)),
        }
    }

    pub(super) fn healthy(&mut self, now: Instant) {
        self.restarts.healthy(now);
        self.ports(PortOrder::Aim);
    }

    /// Handles a failure of the generation while no work is under way.
    pub(super) fn idle_failed(&mut self, idle: Idle, failure: Failure, now: Instant) -> State {
        if let Idle::Resting(_) = idle {
            // An operator has to act first.
            return State::Idle(idle);
        }
        if self.end != End::NotAsked {
            self.show(Condition::Failed, Some(failure.text()));
            self.watch(WatchOrder::End);
            self.ports(PortOrder::HoldForAWhile);
            let before = idle;
            return State::Failed(Failed { before, failure });
        }
        if idle == (Idle::Starting { spawning: true }) {
            return self.give_up_spawn(failure.text());
        }
        self.show(Condition::Failed, Some(failure.text()));
        self.heal(failure, now)
    }

    /// Fails a spawn. Only an instance that has served is healed: the user learns at once that the instance does not
    /// start.
    fn give_up_spawn(&mut self, reason: String) -> State {
        self.show(Condition::Failed, Some(reason.clone()));
        self.ports(PortOrder::Hold);
        self.watch(WatchOrder::End);
        let order = EndOrder::SpawnFailed(reason);
        self.actions.push_back(Action::End(order));
        State::Ending
    }

    /// Checks whether a request can be carried out now.
    ///
    /// # Errors
    /// The job that prevents the request.
    pub fn may(&self, request: Request) -> Result<(), Doing> {
        self.check(&self.state, request)
    }

    fn check(&self, state: &State, request: Request) -> Result<(), Doing> {
        if self.end != End::NotAsked {
            return Err(Doing::Terminating);
        }
        let doing = match state {
            State::Idle(idle) => return self.check_idle(*idle, request),
            State::Ending | State::Gone => Doing::Terminating,
            State::Asked(_)
            | State::Failed(_)
            | State::BackingOff(_)
            | State::Queued(_)
            | State::Recovering(_) => Doing::Recovering,
            State::Morphing(_) => Doing::Morphing,
            State::Capturing(_) => Doing::Capturing,
        };
        match (request, doing) {
            // Unfinished work gives way to the termination.
            (Request::Terminate { .. }, Doing::Recovering)
            | (Request::Terminate { force: true }, Doing::Morphing) => Ok(()),
            _ => Err(doing),
        }
    }

    fn check_idle(&self, idle: Idle, request: Request) -> Result<(), Doing> {
        match (request, idle) {
            (Request::Recover, Idle::Starting { spawning: true }) => Err(Doing::Spawning),
            (Request::Morph, Idle::Starting { .. } | Idle::Resting(_)) => Err(Doing::NotRunning),
            (Request::Morph, Idle::Serving) => match self.condition {
                Condition::Running | Condition::Degraded => Ok(()),
                _ => Err(Doing::NotRunning),
            },
            _ => Ok(()),
        }
    }

    pub(super) fn asked(&mut self, state: State, request: Request) -> Taken {
        if self.check(&state, request).is_err() {
            return Taken::Not(state);
        }
        match (request, state) {
            (Request::Recover, State::Idle(before)) => {
                self.actions.push_back(Action::Record(Wish::Recover));
                let failure = None;
                Taken::To(State::Asked(Asked { before, failure }))
            }
            (Request::Morph, State::Idle(_)) => {
                self.show(Condition::Morphing, None);
                self.actions.push_back(Action::Morph);
                Taken::To(State::Morphing(Morphing::default()))
            }
            (Request::Capture, State::Idle(before)) => {
                if self.watched {
                    self.watch(WatchOrder::Pause);
                    self.ports(PortOrder::Hold);
                }
                if matches!(
                    self.condition,
                    Condition::Running | Condition::Degraded | Condition::Unresponsive
                ) {
                    self.show(Condition::Unresponsive, Some(FROZEN.to_owned()));
                }
                self.actions.push_back(Action::Capture);
                let failure = None;
                Taken::To(State::Capturing(Capturing { before, failure }))
            }
            (Request::Terminate { force }, state) => {
                self.end = End::Recording { force };
                self.actions.push_back(Action::Record(Wish::Terminate));
                Taken::To(state)
            }
            (_, state) => Taken::Not(state),
        }
    }
}
