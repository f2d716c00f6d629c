//! The morph engine: phases, deadlines and retries around the typed transitions.
//!
//! | file | states |
//! |---|---|
//! | `open` | before the commit record is ordered: any failure rolls back |
//! | `recording` | the record's outcome is unknown |
//! | `committed` | after the record: only forward |
//! | `rollback` | rollback |

mod committed;
mod open;
mod recording;
mod rollback;

use std::collections::VecDeque;

use super::events::{Action, Answer, Event, Outcome};
use super::phases::{FencingTarget, Morph, Pair, Preparing, Recording, Serving};
use super::reasons::{RollbackReason, SourceFailure};
use super::record::CommitRecord;
use super::stage::{Phase, Stage};
use super::{
    Config, FENCE_ATTEMPTS, FENCE_RETRY, REQUEST_ATTEMPTS, REQUEST_RETRY, REQUEST_TIMEOUT,
};
use crate::fence::FenceOrder;
use crate::message::Side;
use crate::time::Instant;
use committed::Committed;
use open::Open;
use rollback::RollingBack;

#[derive(Debug)]
enum State {
    Open(Open),
    Recording(Morph<Recording>),
    Committed(Committed),
    RollingBack(RollingBack),
    /// Over, with the side that is the instance.
    Done(Side),
}

/// The result of an event.
enum Taken {
    /// The event applies here and leads to this state.
    To(State),
    /// The event changes nothing here.
    Not(State),
}

/// The engine of one morph.
#[derive(Debug)]
pub struct Engine {
    state: State,
    timers: Timers,
    actions: VecDeque<Action>,
}

/// The times at which the engine needs a tick.
#[derive(Debug, Default)]
struct Timers {
    deadline: Option<Instant>,
    retry_at: Option<Instant>,
}

impl Timers {
    fn until(deadline: Option<Instant>) -> Self {
        Self {
            deadline,
            retry_at: None,
        }
    }

    fn is_overdue(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|due| due <= now)
    }

    fn retry_is_due(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|due| due <= now)
    }
}

impl Engine {
    /// Begins a morph between two generations. The target is being spawned.
    pub fn new(config: Config, source: u64, target: u64, now: Instant) -> Self {
        let morph = Morph::<Preparing>::begin(config, source, target);
        let mut engine = Self::with(State::Open(Open::Preparing(morph)));
        engine.timers.deadline = Some(now + config.phase_timeout);
        engine.actions.push_back(Action::Prepare(Side::Source));
        engine
    }

    /// Resumes a morph that an earlier daemon left with its commit record: it moves only forward.
    pub fn resume_committed(record: CommitRecord, now: Instant) -> Self {
        let mut engine = Self::with(State::Done(Side::Target));
        engine.state = engine.serve(Morph::<Serving>::committed(record), now);
        engine
    }

    /// Resumes a morph that an earlier daemon left without a commit record: it rolls back.
    pub fn resume_uncommitted(source: u64, target: u64) -> Self {
        let mut engine = Self::with(State::Done(Side::Source));
        let pair = Pair { source, target };
        engine.state = engine.roll_back(pair, RollbackReason::DaemonRestarted, None);
        engine
    }

    fn with(state: State) -> Self {
        Self {
            state,
            timers: Timers::default(),
            actions: VecDeque::new(),
        }
    }

    /// Returns the phase.
    pub fn phase(&self) -> Phase {
        self.stage().phase()
    }

    /// Returns the state in the transition table.
    pub fn stage(&self) -> Stage {
        match &self.state {
            State::Open(open) => open.stage(),
            State::Recording(_) => Stage::Recording,
            State::Committed(committed) => committed.stage(),
            State::RollingBack(rolling_back) => rolling_back.stage(),
            State::Done(_) => Stage::Done,
        }
    }

    /// Returns the side that is the instance: the source until the commit record is known to be durable.
    pub fn owner(&self) -> Side {
        match &self.state {
            State::Open(_) | State::Recording(_) | State::RollingBack(_) => Side::Source,
            State::Committed(_) => Side::Target,
            State::Done(owner) => *owner,
        }
    }

    /// Returns the reason for the rollback, during a rollback.
    pub fn rollback_reason(&self) -> Option<&RollbackReason> {
        match &self.state {
            State::RollingBack(rolling_back) => Some(rolling_back.reason()),
            State::Open(_) | State::Recording(_) | State::Committed(_) | State::Done(_) => None,
        }
    }

    /// Returns the next action, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Returns the time at which [`Event::Tick`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let Timers { deadline, retry_at } = self.timers;
        [deadline, retry_at].into_iter().flatten().min()
    }

    /// Handles an event. An event that does not belong to the state changes nothing, and the answer says so.
    pub fn handle(&mut self, event: Event, now: Instant) -> Answer {
        let before = self.stage();
        let already = self.actions.len();
        let owner = self.owner();
        let state = std::mem::replace(&mut self.state, State::Done(owner));
        let taken = match state {
            State::Open(open) => self.open(open, event, now),
            State::Recording(morph) => self.recording(morph, event, now),
            State::Committed(committed) => self.committed(committed, event, now),
            State::RollingBack(rolling_back) => self.rolling_back(rolling_back, event, now),
            done @ State::Done(_) => Taken::Not(done),
        };
        let answer = match taken {
            Taken::To(state) => {
                self.state = state;
                Answer::Accepted
            }
            Taken::Not(state) => {
                self.state = state;
                Answer::Refused { stage: before }
            }
        };
        let after = self.phase();
        if before.phase() != after {
            // Report the phase before the actions that follow from it.
            self.actions.insert(already, Action::Phase(after));
        }
        answer
    }

    fn roll_back(
        &mut self,
        pair: Pair,
        reason: RollbackReason,
        source_failure: Option<SourceFailure>,
    ) -> State {
        let morph = Morph::<FencingTarget>::begin(pair, reason, source_failure);
        self.fence_target(morph)
    }

    fn order_fence(&mut self, side: Side, generation: u64) {
        self.timers = Timers::default();
        let order = FenceOrder::new(generation);
        self.actions.push_back(Action::Fence(side, order));
    }

    /// Schedules another attempt at a fence that was not confirmed. Returns false if `attempts` has reached the
    /// maximum.
    fn fence_again_later(&mut self, attempts: u32, now: Instant) -> bool {
        let again = attempts < FENCE_ATTEMPTS;
        self.timers.retry_at = again.then_some(now + FENCE_RETRY);
        again
    }

    /// Sends a request that is repeated until its side answers or is judged dead.
    fn ask(&mut self, request: Action, now: Instant) {
        self.timers = Timers::until(Some(now + REQUEST_TIMEOUT));
        self.actions.push_back(request);
    }

    /// Returns whether such a request is due again: its answer was a refusal or did not arrive.
    fn ask_is_due(&self, now: Instant) -> bool {
        self.timers.retry_is_due(now) || self.timers.is_overdue(now)
    }

    /// Schedules another attempt at a refused request, because giving up would lose the workload's state. Returns
    /// false if `refusals` has reached the maximum.
    fn ask_again_later(&mut self, refusals: u32, now: Instant) -> bool {
        let again = refusals < REQUEST_ATTEMPTS;
        self.timers.retry_at = again.then_some(now + REQUEST_RETRY);
        again
    }

    fn finish(&mut self, outcome: Outcome) -> State {
        self.timers = Timers::default();
        let owner = outcome.owner();
        self.actions.push_back(Action::Finished(outcome));
        State::Done(owner)
    }
}
