//! The instance engine.
//!
//! | file | contents |
//! |---|---|
//! | `idle` | no work under way: starting, serving, resting; start of new work |
//! | `failing` | from a failure to the end of its recovery |
//! | `jobs` | morphs and captures |
//! | `ending` | wishes until they are in the journal, and the termination |

mod ending;
mod failing;
mod idle;
mod jobs;

use std::collections::VecDeque;

use super::events::{
    Action, Answer, Event, Failure, PortOrder, RecoveryEnd, RecoveryOrder, Successor, WatchOrder,
    Wish,
};
use super::{Condition, Desired, Stage};
use crate::recovery::RestartPolicy;
use crate::time::Instant;
use ending::{Asked, End};
use failing::{Failed, Recovering};
use idle::{Idle, Rest};
use jobs::{Capturing, Morphing};

#[derive(Debug)]
enum State {
    Idle(Idle),
    Asked(Asked),
    Failed(Failed),
    BackingOff(RecoveryOrder),
    Queued(RecoveryOrder),
    Recovering(Recovering),
    Morphing(Morphing),
    Capturing(Capturing),
    Ending,
    Gone,
}

/// The engine's reaction to an event.
enum Taken {
    To(State),
    Not(State),
}

/// The engine of one instance.
#[derive(Debug)]
pub struct Engine {
    state: State,
    end: End,
    auto_heal: bool,
    restarts: RestartPolicy,
    /// The instance was adopted as the successor of an unfinished recovery.
    succeeds: bool,
    /// True if this engine's owner watches the active generation.
    watched: bool,
    unwell: Unwell,
    condition: Condition,
    reason: Option<String>,
    actions: VecDeque<Action>,
}

/// Why a serving instance is not well.
#[derive(Debug, Default)]
struct Unwell {
    /// According to its agent.
    said: Option<String>,
    /// According to its load.
    load: Option<String>,
}

impl Engine {
    /// Returns an instance whose first generation was just spawned; an operation waits for it to serve.
    pub fn spawned(auto_heal: bool) -> Self {
        let spawning = true;
        let mut engine = Self::with(State::Idle(Idle::Starting { spawning }), auto_heal);
        engine.watch(WatchOrder::Begin);
        engine
    }

    /// Returns an instance that an earlier daemon left running. `succeeds`: that daemon has not finished the recovery
    /// that started the generation; the generation's first healthy answer, or its earlier end, ends that recovery.
    pub fn adopted(auto_heal: bool, succeeds: bool) -> Self {
        let spawning = false;
        let mut engine = Self::with(State::Idle(Idle::Starting { spawning }), auto_heal);
        engine.succeeds = succeeds;
        engine.watch(WatchOrder::Adopt);
        engine
    }

    /// Returns an instance that an earlier daemon left in a morph. `watched`: the instance, not the morph, watches
    /// the active generation.
    pub fn morphing(auto_heal: bool, watched: bool) -> Self {
        let mut engine = Self::with(State::Morphing(Morphing::default()), auto_heal);
        if watched {
            engine.watch(WatchOrder::Begin);
        }
        let reason = "finishing what was under way".to_owned();
        engine.show(Condition::Morphing, Some(reason));
        engine
    }

    /// Returns a resting instance, with its desired state and the reason.
    pub fn resting(auto_heal: bool, desired: Desired, reason: Option<String>) -> Self {
        let rest = Rest::from(desired);
        let mut engine = Self::with(State::Idle(Idle::Resting(rest)), auto_heal);
        (engine.condition, engine.reason) = (rest.condition(), reason);
        engine.ports(PortOrder::Close);
        engine
    }

    /// Returns an instance whose termination an earlier daemon began.
    pub fn ending(auto_heal: bool) -> Self {
        let mut engine = Self::with(State::Ending, auto_heal);
        engine.state = engine.end_now(true);
        engine
    }

    /// Returns an instance that failed while no daemon watched, or whose recovery an earlier daemon has not
    /// finished. `decided`: that daemon's decision; without one, the policy decides.
    pub fn failed(
        auto_heal: bool,
        failure: Failure,
        decided: Option<Successor>,
        now: Instant,
    ) -> Self {
        let mut engine = Self::with(State::Gone, auto_heal);
        engine.show(Condition::Failed, Some(failure.text()));
        engine.state = match decided {
            None => engine.heal(failure, now),
            Some(successor) => {
                engine.ports(PortOrder::HoldForAWhile);
                engine.queue(RecoveryOrder {
                    failure,
                    successor,
                    decided_at: now,
                })
            }
        };
        engine
    }

    fn with(state: State, auto_heal: bool) -> Self {
        Self {
            state,
            end: End::NotAsked,
            auto_heal,
            restarts: RestartPolicy::new(),
            succeeds: false,
            watched: false,
            unwell: Unwell::default(),
            condition: Condition::Starting,
            reason: None,
            actions: VecDeque::new(),
        }
    }

    /// Returns the state in the transition table.
    pub fn stage(&self) -> Stage {
        match &self.state {
            State::Idle(Idle::Starting { .. }) => Stage::Starting,
            State::Idle(Idle::Serving) => Stage::Serving,
            State::Idle(Idle::Resting(_)) => Stage::Resting,
            State::Asked(_) => Stage::Asked,
            State::Failed(_) => Stage::Failed,
            State::BackingOff(_) => Stage::BackingOff,
            State::Queued(_) => Stage::Queued,
            State::Recovering(_) => Stage::Recovering,
            State::Morphing(_) => Stage::Morphing,
            State::Capturing(_) => Stage::Capturing,
            State::Ending => Stage::Ending,
            State::Gone => Stage::Gone,
        }
    }

    /// Returns the condition that users see.
    pub fn condition(&self) -> Condition {
        self.condition
    }

    /// Returns the reason for the condition; `None` if it needs none.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Returns the desired state of the instance, including wishes in the journal.
    pub fn desired(&self) -> Desired {
        if self.end.is_recorded() {
            return Desired::Terminating;
        }
        match &self.state {
            State::Ending | State::Gone => Desired::Terminating,
            State::Idle(idle) => idle.desired(),
            State::Asked(asked) => asked.before.desired(),
            State::BackingOff(order) | State::Queued(order) => order.desired(),
            State::Recovering(recovering) => recovering.desired(),
            State::Capturing(capturing) => capturing.before.desired(),
            State::Failed(_) | State::Morphing(_) => Desired::Running,
        }
    }

    /// Returns why the instance rests, or is about to rest.
    pub fn rests_because(&self) -> Option<String> {
        match &self.state {
            State::Idle(Idle::Resting(_)) => self.reason.clone(),
            State::BackingOff(order) | State::Queued(order) => order.rests_because(),
            State::Recovering(recovering) => recovering.rests_because.clone(),
            _ => None,
        }
    }

    /// Returns whether the watched generation was healthy once: only then do failures of its program count.
    pub fn has_served(&self) -> bool {
        match &self.state {
            State::Idle(idle) => *idle == Idle::Serving,
            State::Asked(asked) => asked.before == Idle::Serving,
            State::Capturing(capturing) => capturing.before == Idle::Serving,
            State::Morphing(_) => true,
            State::Failed(_)
            | State::BackingOff(_)
            | State::Queued(_)
            | State::Recovering(_)
            | State::Ending
            | State::Gone => false,
        }
    }

    /// Returns whether the spawn is under way and may fail.
    pub fn is_spawning(&self) -> bool {
        matches!(self.state, State::Idle(Idle::Starting { spawning: true }))
            && matches!(self.end, End::NotAsked)
    }

    /// Returns whether the instance serves, is well, and has no work under way: it can then help others.
    pub fn is_well(&self) -> bool {
        matches!(self.state, State::Idle(Idle::Serving)) && self.condition == Condition::Running
    }

    /// Returns the pending actions, in order.
    pub fn actions(&self) -> impl ExactSizeIterator<Item = &Action> {
        self.actions.iter()
    }

    /// Returns the next action, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Handles an event. An event that does not belong to the state changes nothing, and the answer says so.
    pub fn handle(&mut self, event: Event, now: Instant) -> Answer {
        let stage = self.stage();
        let state = std::mem::replace(&mut self.state, State::Gone);
        match self.take(state, event, now) {
            Taken::To(state) => {
                self.state = state;
                self.end_earlier_recovery();
                Answer::Accepted
            }
            Taken::Not(state) => {
                self.state = state;
                Answer::Refused { stage }
            }
        }
    }

    /// Ends the recovery of an earlier daemon once its successor was healthy, or can no longer start.
    fn end_earlier_recovery(&mut self) {
        let (before, failure) = match &self.state {
            State::Idle(before) => (before, None),
            State::Asked(asked) => (&asked.before, asked.failure.as_ref()),
            State::Capturing(capturing) => (&capturing.before, capturing.failure.as_ref()),
            State::Failed(failed) => (&failed.before, Some(&failed.failure)),
            _ => (&Idle::Resting(Rest::NotEnded), None),
        };
        let end = match (before, failure) {
            (Idle::Starting { .. }, None) => return,
            (Idle::Serving, None) => RecoveryEnd::Recovered,
            (_, failure) => RecoveryEnd::SuccessorFailed(match (failure, &self.reason) {
                (Some(failure), _) => failure.text(),
                (None, Some(reason)) => reason.clone(),
                (None, None) => "its successor was ended".to_owned(),
            }),
        };
        if std::mem::take(&mut self.succeeds) {
            self.actions.push_back(Action::EndRecovery(end));
        }
    }

    fn take(&mut self, state: State, event: Event, now: Instant) -> Taken {
        match event {
            Event::Said(said) => {
                self.unwell.said = said;
                self.reassess(state)
            }
            Event::Load(load) => {
                self.unwell.load = load;
                self.reassess(state)
            }
            Event::Policy { auto_heal } => {
                self.auto_heal = auto_heal;
                Taken::To(state)
            }
            Event::Asked(request) => self.asked(state, request),
            Event::Recorded(Wish::Terminate) => self.end_recorded(state),
            Event::NotRecorded(Wish::Terminate) => self.end_not_recorded(state, now),
            event => match state {
                State::Idle(idle) => self.idle(idle, event, now),
                State::Asked(asked) => self.recovery_asked(asked, event, now),
                State::BackingOff(order) => self.backing_off(order, event),
                State::Queued(order) => self.queued(order, event),
                State::Recovering(recovering) => self.recovering(recovering, event, now),
                State::Morphing(morphing) => self.morphing_on(morphing, event, now),
                State::Capturing(capturing) => self.capturing(capturing, event, now),
                State::Ending => self.ending_on(event),
                state @ (State::Failed(_) | State::Gone) => Taken::Not(state),
            },
        }
    }

    /// Records the reported health. It counts while the instance serves, or once it serves again.
    fn reassess(&mut self, state: State) -> Taken {
        let serves = matches!(self.condition, Condition::Running | Condition::Degraded);
        if serves && matches!(state, State::Idle(Idle::Serving)) {
            self.show_serving();
        }
        Taken::To(state)
    }

    fn watch(&mut self, order: WatchOrder) {
        match order {
            WatchOrder::Begin | WatchOrder::Adopt | WatchOrder::TakeOver => {
                // A new watch reports the agent's last status again.
                self.unwell = Unwell::default();
                self.watched = true;
            }
            WatchOrder::End if !self.watched => return,
            WatchOrder::End => self.watched = false,
            WatchOrder::Pause | WatchOrder::Resume => {}
        }
        self.actions.push_back(Action::Watch(order));
    }

    fn ports(&mut self, order: PortOrder) {
        self.actions.push_back(Action::Ports(order));
    }

    fn show(&mut self, condition: Condition, reason: Option<String>) {
        if (self.condition, &self.reason) == (condition, &reason) {
            return;
        }
        (self.condition, self.reason) = (condition, reason);
        self.actions.push_back(Action::Show);
    }

    /// Shows an instance that answers: running, or degraded by its agent's last report or by its load.
    fn show_serving(&mut self) {
        let Unwell { said, load } = &self.unwell;
        match said.as_ref().or(load.as_ref()).cloned() {
            Some(reason) => self.show(Condition::Degraded, Some(reason)),
            None => self.show(Condition::Running, None),
        }
    }
}
