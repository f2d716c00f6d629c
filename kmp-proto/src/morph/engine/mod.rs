//! The engine that drives one morph: holds "some phase", turns events into actions.

mod commit;
mod rollback;

use std::collections::VecDeque;

use super::events::{Action, Answer, CommitLimit, Event, Outcome, Step};
use super::phases::{
    Committable, Committing, Morph, Negotiating, Preparing, Transferring, Validated, Validating,
};
use super::{Config, FENCE_ATTEMPTS, FENCE_RETRY, FROZEN_STEP_TIMEOUT, Offer};
use crate::fence::FenceOrder;
use crate::message::{Side, TransferMode};
use crate::time::Instant;

#[derive(Debug)]
enum State {
    Preparing(Morph<Preparing>),
    Negotiating(Morph<Negotiating>),
    Transferring(Morph<Transferring>),
    Validating(Morph<Validating>),
    Committable(Morph<Committable>, Validated),
    Committing {
        morph: Morph<Committing>,
        step: Step,
        digest: u64,
    },
    /// After the commit record: only forward.
    Committed {
        step: Step,
        new_failed: Option<String>,
    },
    RollingBack {
        reason: String,
        new_fenced: bool,
        old_failed: Option<String>,
    },
    Done,
}

/// The engine of one morph.
#[derive(Debug)]
pub struct Engine {
    from_generation: u64,
    to_generation: u64,
    state: State,
    config: Config,
    deadline: Option<Instant>,
    retry_at: Option<Instant>,
    fence_attempts: u32,
    /// Refusals of the request that is under way after the outcome was decided: SERVE or the source's rollback. It is repeated, because giving up means to lose the workload's state.
    refusals: u32,
    died_while_recording: Deaths,
    actions: VecDeque<Action>,
}

/// Deaths seen while the commit record was being written. Whether it became durable is not known
/// then, so they count only afterwards.
#[derive(Debug, Default)]
struct Deaths {
    old: Option<String>,
    new: Option<String>,
}

impl Engine {
    /// Begins a morph. The target generation is being spawned.
    pub fn new(config: Config, from_generation: u64, to_generation: u64, now: Instant) -> Self {
        let state = State::Preparing(Morph::begin(config));
        let mut engine = Self::with(config, from_generation, to_generation, state);
        engine.deadline = Some(now + config.phase_timeout);
        engine.actions.push_back(Action::Prepare(Side::Source));
        engine
    }

    /// Goes on after a restart of the daemon: forward when the commit record was found, back
    /// otherwise.
    pub fn resume(
        config: Config,
        from_generation: u64,
        to_generation: u64,
        committed: bool,
        now: Instant,
    ) -> Self {
        let mut engine = Self::with(config, from_generation, to_generation, State::Done);
        if committed {
            engine.enter_committed(now);
        } else {
            let reason = "the daemon was restarted before the commit record".to_owned();
            engine.roll_back(reason, None, now);
        }
        engine
    }

    fn with(config: Config, from_generation: u64, to_generation: u64, state: State) -> Self {
        Self {
            from_generation,
            to_generation,
            state,
            config,
            deadline: None,
            retry_at: None,
            fence_attempts: 0,
            refusals: 0,
            died_while_recording: Deaths::default(),
            actions: VecDeque::new(),
        }
    }

    /// What it was begun with.
    pub fn config(&self) -> Config {
        self.config
    }

    /// The phase's name in journal, API and logs.
    pub fn phase(&self) -> &'static str {
        match &self.state {
            State::Preparing(_) => "preparing",
            State::Negotiating(_) => "negotiating",
            State::Transferring(_) => "transferring",
            State::Validating(_) => "validating",
            State::Committable(..) => "committable",
            State::Committing { .. } | State::Committed { .. } => "committing",
            State::RollingBack { .. } => "rolling_back",
            State::Done => "done",
        }
    }

    /// The state's name in the transition table: the phase, and its step where it has steps.
    pub fn state(&self) -> &'static str {
        match &self.state {
            State::Committing { step, .. } | State::Committed { step, .. } => match step {
                Step::Freezing => "committing.freezing",
                Step::LastRound => "committing.last_round",
                Step::Activating => "committing.activating",
                Step::Recording => "committing.recording",
                Step::Serving => "committed.serving",
                Step::Retiring => "committed.retiring",
                Step::FencingSource => "committed.fencing_source",
            },
            State::RollingBack {
                new_fenced: false, ..
            } => "rolling_back.fencing_target",
            State::RollingBack {
                new_fenced: true, ..
            } => "rolling_back.resuming_source",
            _ => self.phase(),
        }
    }

    /// The next action, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Event::Tick`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [self.deadline, self.retry_at].into_iter().flatten().min()
    }

    /// Takes an event. One that does not belong to the state changes nothing, and the answer says so.
    pub fn handle(&mut self, event: Event, now: Instant) -> Answer {
        let (state, name) = (self.state(), event.name());
        let mut rows = super::TRANSITIONS.iter().copied().flatten();
        let answer = match rows.any(|row| row.state == state && row.event == name) {
            true => Answer::Accepted,
            false => Answer::Refused { state },
        };
        self.take(event, now);
        answer
    }

    fn take(&mut self, event: Event, now: Instant) {
        let before = self.phase();
        let already = self.actions.len();
        let state = std::mem::replace(&mut self.state, State::Done);
        match state {
            State::Done => {}
            State::RollingBack {
                reason,
                new_fenced,
                old_failed,
            } => {
                self.rolling_back(reason, new_fenced, old_failed, event, now);
            }
            State::Committed { step, new_failed } => self.committed(step, new_failed, event, now),
            before_record => self.before_record(before_record, event, now),
        }
        let after = self.phase();
        if before != after {
            // The change is told before what follows from it.
            self.actions.insert(already, Action::Phase(after));
        }
    }

    fn before_record(&mut self, state: State, event: Event, now: Instant) {
        let recording = matches!(
            state,
            State::Committing {
                step: Step::Recording,
                ..
            }
        );
        match event {
            Event::Died(Side::Target, how) if recording => {
                self.died_while_recording.new = Some(how);
                self.state = state;
            }
            Event::Died(Side::Source, how) if recording => {
                self.died_while_recording.old = Some(how);
                self.state = state;
            }
            event if recording => self.forward(state, event, now),
            Event::RollbackRequested(reason) => self.roll_back(reason, None, now),
            Event::Died(Side::Target, how) => {
                self.roll_back(format!("the target kernel has failed: {how}"), None, now);
            }
            Event::Died(Side::Source, how) => {
                self.roll_back(
                    format!("the source kernel has failed: {how}"),
                    Some(how),
                    now,
                );
            }
            Event::Refused(side, text) => {
                self.roll_back(
                    format!("the {} kernel refused: {text}", side.as_str()),
                    None,
                    now,
                );
            }
            Event::Unanswered(side, text) => {
                let reason = format!("the {} kernel did not answer: {text}", side.as_str());
                self.roll_back(reason, None, now);
            }
            Event::Tick if self.deadline.is_some_and(|due| due <= now) => {
                self.state = state;
                let phase = self.phase();
                self.roll_back(format!("the phase {phase} took too long"), None, now);
            }
            event => self.forward(state, event, now),
        }
    }

    fn forward(&mut self, state: State, event: Event, now: Instant) {
        self.state = match (state, event) {
            (State::Preparing(morph), event) => self.preparing(morph, event, now),
            (State::Negotiating(morph), Event::Offered(side, offer)) => {
                return self.negotiating(morph, side, offer, now);
            }
            (
                State::Transferring(mut morph),
                Event::RoundApplied {
                    sent_bytes,
                    dirty_bytes,
                    took,
                },
            ) => {
                let budget = self.config.downtime_budget;
                let phase = &mut morph.phase;
                self.deadline = Some(now + self.config.phase_timeout);
                let more = phase.rounds.applied(budget, sent_bytes, dirty_bytes, took);
                if more && phase.mode == TransferMode::Rounds {
                    phase.rounds.number += 1;
                    let (mode, number) = (phase.mode, phase.rounds.number);
                    self.actions.push_back(Action::Round {
                        mode,
                        number,
                        last: false,
                    });
                    State::Transferring(morph)
                } else {
                    self.actions.push_back(Action::Validate);
                    State::Validating(morph.transferred())
                }
            }
            (State::Transferring(morph), Event::Held) => {
                self.deadline = Some(now + self.config.expiry);
                State::Transferring(morph)
            }
            (State::Validating(morph), Event::Report(checks)) => match morph.on_report(&checks) {
                Ok((morph, proof)) => {
                    self.deadline = Some(now + self.config.expiry);
                    self.actions.push_back(Action::Committable {
                        estimate: morph.estimate(),
                    });
                    State::Committable(morph, proof)
                }
                Err(failed) => return self.roll_back(failed.to_string(), None, now),
            },
            (
                State::Committable(mut morph, proof),
                Event::CommitRequested {
                    limit,
                    or_roll_back,
                },
            ) => {
                if let CommitLimit::Within(budget) = limit {
                    morph.config.downtime_budget = budget;
                }
                match morph.commit(proof, limit == CommitLimit::None) {
                    Ok(morph) => {
                        self.deadline = Some(now + FROZEN_STEP_TIMEOUT);
                        self.actions.push_back(Action::Freeze);
                        State::Committing {
                            morph,
                            step: Step::Freezing,
                            digest: 0,
                        }
                    }
                    Err((_, _, refused)) if or_roll_back => {
                        return self.roll_back(refused.to_string(), None, now);
                    }
                    Err((morph, proof, refused)) => {
                        self.actions.push_back(Action::CommitRefused(refused));
                        State::Committable(morph, proof)
                    }
                }
            }
            (
                State::Committing {
                    morph,
                    step,
                    digest,
                },
                event,
            ) => {
                return self.committing(morph, step, digest, event, now);
            }
            (state, _) => state,
        };
    }

    fn preparing(&mut self, mut morph: Morph<Preparing>, event: Event, now: Instant) -> State {
        match event {
            Event::TargetHealthy if !morph.phase.new_healthy => {
                morph.phase.new_healthy = true;
                self.actions.push_back(Action::Prepare(Side::Target));
            }
            Event::Prepared(Side::Source) => morph.phase.old_ready = true,
            // One that was not asked for says nothing: the target is asked once it is healthy.
            Event::Prepared(Side::Target) => morph.phase.new_ready = morph.phase.new_healthy,
            _ => {}
        }
        if !(morph.phase.old_ready && morph.phase.new_ready) {
            return State::Preparing(morph);
        }
        self.deadline = Some(now + self.config.phase_timeout);
        self.actions.push_back(Action::Negotiate(Side::Source));
        self.actions.push_back(Action::Negotiate(Side::Target));
        State::Negotiating(morph.ready())
    }

    fn negotiating(
        &mut self,
        mut morph: Morph<Negotiating>,
        side: Side,
        offer: Offer,
        now: Instant,
    ) {
        match side {
            Side::Source => morph.phase.old = Some(offer),
            Side::Target => morph.phase.new = Some(offer),
        }
        let (Some(old), Some(new)) = (&morph.phase.old, &morph.phase.new) else {
            self.state = State::Negotiating(morph);
            return;
        };
        match super::negotiate(&self.config, old, new) {
            Ok(mode) => {
                let exchanges = super::exchanges(old, new);
                self.deadline = Some(now + self.config.phase_timeout);
                self.actions.push_back(Action::Round {
                    mode,
                    number: 1,
                    last: false,
                });
                self.state = State::Transferring(morph.agreed(mode, exchanges));
            }
            Err(missing) => {
                self.roll_back(format!("incompatible: {}", missing.join("; ")), None, now);
            }
        }
    }

    fn order_fence(&mut self, side: Side) {
        self.retry_at = None;
        self.fence_attempts += 1;
        let generation = match side {
            Side::Source => self.from_generation,
            Side::Target => self.to_generation,
        };
        self.actions
            .push_back(Action::Fence(side, FenceOrder::new(generation)));
    }

    fn retry_due(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|due| due <= now)
    }

    fn fence_later(&mut self, reason: String, now: Instant, state: State) {
        if self.fence_attempts >= FENCE_ATTEMPTS {
            return self.finish(Outcome::OperatorActionNeeded(reason));
        }
        self.retry_at = Some(now + FENCE_RETRY);
        self.state = state;
    }

    fn finish(&mut self, outcome: Outcome) {
        self.deadline = None;
        self.retry_at = None;
        self.actions.push_back(Action::Finished(outcome));
        self.state = State::Done;
    }
}
