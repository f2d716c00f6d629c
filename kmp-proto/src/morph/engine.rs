//! The engine that drives one morph: holds "some phase", turns events into actions.

use std::collections::VecDeque;
use std::time::Duration;

use super::phases::{
    Committable, Committing, Failed, Morph, Negotiating, Preparing, Transferring, Validated,
    Validating,
};
use super::{COMMITTABLE_TIMEOUT, Config, FENCE_ATTEMPTS, FENCE_RETRY, FROZEN_STEP_TIMEOUT, Offer};
use crate::fence::{FenceCertificate, FenceOrder};
use crate::message::{Check, Side, TransferMode};
use crate::time::Instant;

/// What the engine is told.
#[derive(Debug)]
pub enum Event {
    /// The new generation is healthy.
    NewHealthy,
    /// A side acknowledged MORPH_PREPARE.
    Prepared(Side),
    /// A side answered MORPH_NEGOTIATE.
    Offered(Side, Offer),
    /// The new side has a round in place.
    RoundApplied {
        /// Bytes sent in it.
        sent_bytes: u64,
        /// Bytes that changed meanwhile.
        dirty_bytes: u64,
        /// How long it took.
        took: Duration,
    },
    /// The new side's validation report.
    Report(Vec<Check>),
    /// Commit now, even over the budget when forced.
    CommitRequested {
        /// See [`Config::downtime_budget`].
        force: bool,
    },
    /// Go back.
    RollbackRequested(String),
    /// The old workload stands still; digest of its state.
    Frozen(u64),
    /// The new workload has taken over; digest of its state.
    Activated(u64),
    /// The commit record is durable.
    RecordDurable,
    /// The commit record could not be written.
    RecordFailed(String),
    /// The new workload serves.
    Serving,
    /// The old workload has ended.
    Retired,
    /// The fence of a side is confirmed.
    Fenced(Side, FenceCertificate),
    /// The fence of a side could not be confirmed.
    FenceUnconfirmed(Side, String),
    /// The old workload serves again.
    OldRunning,
    /// A side refused something.
    Refused(Side, String),
    /// A side has failed, by its detector's verdict.
    Died(Side, String),
    /// Time has passed.
    Tick,
}

/// A step of the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Old: FREEZE.
    Freezing,
    /// The last round.
    LastRound,
    /// New: ACTIVATE.
    Activating,
    /// The commit record.
    Recording,
    /// New: SERVE.
    Serving,
    /// Old: RETIRE.
    Retiring,
    /// The old generation's fence.
    FencingOld,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// MORPH_PREPARE to a side.
    Prepare(Side),
    /// MORPH_NEGOTIATE to a side.
    Negotiate(Side),
    /// Have a round sent and applied.
    Round {
        /// By reference or copied.
        mode: TransferMode,
        /// Its number.
        number: u32,
        /// The last one: the old workload stands still.
        last: bool,
    },
    /// MORPH_VALIDATE to the new side.
    Validate,
    /// It can be committed; this is the downtime to expect.
    Committable {
        /// The estimate.
        estimate: Duration,
    },
    /// The commit was refused, nothing has changed.
    CommitRefused(Failed),
    /// FREEZE to the old side.
    Freeze,
    /// ACTIVATE to the new side.
    Activate,
    /// Make the commit record durable.
    WriteCommitRecord,
    /// SERVE to the new side.
    Serve,
    /// RETIRE to the old side.
    Retire,
    /// Fence a side.
    Fence(Side, FenceOrder),
    /// MORPH_ROLLBACK to the old side: resume.
    ResumeOld,
    /// The phase has changed.
    Phase(&'static str),
    /// It is over.
    Finished(Outcome),
}

/// How a morph ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The new generation serves, the old one is fenced.
    Committed,
    /// The new generation is the instance, the old one is fenced, but the new one does not serve:
    /// it needs a recovery.
    CommittedButFailed(String),
    /// The old generation serves, the new one is fenced.
    RolledBack(String),
    /// The new generation is fenced and the old one has failed: it needs a recovery.
    OldFailed(String),
    /// A fence could not be confirmed.
    OperatorActionNeeded(String),
}

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
    /// Begins a morph. The new generation is being spawned.
    pub fn new(config: Config, from_generation: u64, to_generation: u64, now: Instant) -> Self {
        let state = State::Preparing(Morph::begin(config));
        let mut engine = Self::with(config, from_generation, to_generation, state);
        engine.deadline = Some(now + config.phase_timeout);
        engine.actions.push_back(Action::Prepare(Side::Old));
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
            died_while_recording: Deaths::default(),
            actions: VecDeque::new(),
        }
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

    /// The next action, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Event::Tick`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [self.deadline, self.retry_at].into_iter().flatten().min()
    }

    /// Takes an event. One that does not belong to the phase changes nothing.
    pub fn handle(&mut self, event: Event, now: Instant) {
        let before = self.phase();
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
            self.actions.push_front(Action::Phase(after));
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
            Event::Died(Side::New, how) if recording => {
                self.died_while_recording.new = Some(how);
                self.state = state;
            }
            Event::Died(Side::Old, how) if recording => {
                self.died_while_recording.old = Some(how);
                self.state = state;
            }
            event if recording => self.forward(state, event, now),
            Event::RollbackRequested(reason) => self.roll_back(reason, None, now),
            Event::Died(Side::New, how) => {
                self.roll_back(format!("the new kernel has failed: {how}"), None, now);
            }
            Event::Died(Side::Old, how) => {
                self.roll_back(format!("the old kernel has failed: {how}"), Some(how), now);
            }
            Event::Refused(side, text) => {
                self.roll_back(
                    format!("the {} kernel refused: {text}", side.as_str()),
                    None,
                    now,
                );
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
                if phase.rounds.applied(budget, sent_bytes, dirty_bytes, took) {
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
            (State::Validating(morph), Event::Report(checks)) => match morph.on_report(&checks) {
                Ok((morph, proof)) => {
                    self.deadline = Some(now + COMMITTABLE_TIMEOUT);
                    self.actions.push_back(Action::Committable {
                        estimate: morph.estimate(),
                    });
                    State::Committable(morph, proof)
                }
                Err(failed) => return self.roll_back(failed.to_string(), None, now),
            },
            (State::Committable(morph, proof), Event::CommitRequested { force }) => {
                match morph.commit(proof, force) {
                    Ok(morph) => {
                        self.deadline = Some(now + FROZEN_STEP_TIMEOUT);
                        self.actions.push_back(Action::Freeze);
                        State::Committing {
                            morph,
                            step: Step::Freezing,
                            digest: 0,
                        }
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
            Event::NewHealthy if !morph.phase.new_healthy => {
                morph.phase.new_healthy = true;
                self.actions.push_back(Action::Prepare(Side::New));
            }
            Event::Prepared(Side::Old) => morph.phase.old_ready = true,
            Event::Prepared(Side::New) => morph.phase.new_ready = true,
            _ => {}
        }
        if !(morph.phase.old_ready && morph.phase.new_ready) {
            return State::Preparing(morph);
        }
        self.deadline = Some(now + self.config.phase_timeout);
        self.actions.push_back(Action::Negotiate(Side::Old));
        self.actions.push_back(Action::Negotiate(Side::New));
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
            Side::Old => morph.phase.old = Some(offer),
            Side::New => morph.phase.new = Some(offer),
        }
        let (Some(old), Some(new)) = (&morph.phase.old, &morph.phase.new) else {
            self.state = State::Negotiating(morph);
            return;
        };
        match super::negotiate(&self.config, old, new) {
            Ok(mode) => {
                self.deadline = Some(now + self.config.phase_timeout);
                self.actions.push_back(Action::Round {
                    mode,
                    number: 1,
                    last: false,
                });
                self.state = State::Transferring(morph.agreed(mode));
            }
            Err(missing) => {
                self.roll_back(format!("incompatible: {}", missing.join("; ")), None, now);
            }
        }
    }

    fn committing(
        &mut self,
        mut morph: Morph<Committing>,
        step: Step,
        digest: u64,
        event: Event,
        now: Instant,
    ) {
        let (step, digest, action) = match (step, event) {
            (Step::Freezing, Event::Frozen(digest)) => {
                morph.phase.rounds.number += 1;
                let (mode, number) = (morph.phase.mode, morph.phase.rounds.number);
                (
                    Step::LastRound,
                    digest,
                    Action::Round {
                        mode,
                        number,
                        last: true,
                    },
                )
            }
            (Step::LastRound, Event::RoundApplied { .. }) => {
                (Step::Activating, digest, Action::Activate)
            }
            (Step::Activating, Event::Activated(other)) if other != digest => {
                let reason = format!("the state differs: old {digest:#x}, new {other:#x}");
                return self.roll_back(reason, None, now);
            }
            (Step::Activating, Event::Activated(_)) => {
                (Step::Recording, digest, Action::WriteCommitRecord)
            }
            (Step::Recording, Event::RecordFailed(why)) => {
                let reason = format!("the commit record could not be written: {why}");
                let old_failed = self.died_while_recording.old.take();
                return self.roll_back(reason, old_failed, now);
            }
            (Step::Recording, Event::RecordDurable) => return self.enter_committed(now),
            (step, _) => {
                self.state = State::Committing {
                    morph,
                    step,
                    digest,
                };
                return;
            }
        };
        // While the record is being written its outcome is unknown: no deadline may roll back.
        let timed = step != Step::Recording;
        self.deadline = timed.then_some(now + FROZEN_STEP_TIMEOUT);
        self.actions.push_back(action);
        self.state = State::Committing {
            morph,
            step,
            digest,
        };
    }

    fn enter_committed(&mut self, now: Instant) {
        self.deadline = Some(now + self.config.phase_timeout);
        self.actions.push_back(Action::Serve);
        self.state = State::Committed {
            step: Step::Serving,
            new_failed: None,
        };
    }

    /// After the commit record: whatever happens, the end is the old generation fenced.
    fn committed(&mut self, step: Step, new_failed: Option<String>, event: Event, now: Instant) {
        let overdue = self.deadline.is_some_and(|due| due <= now);
        let mut failed = new_failed;
        let next = match (step, event) {
            (Step::Serving, Event::Serving) => Step::Retiring,
            (Step::Serving, Event::Died(Side::New, how)) => {
                failed = Some(how);
                Step::FencingOld
            }
            (Step::Serving, Event::Refused(Side::New, text)) => {
                failed = Some(format!("it refused to serve: {text}"));
                Step::FencingOld
            }
            (Step::Serving, Event::Tick) if overdue => {
                failed = Some("it did not say that it serves".to_owned());
                Step::FencingOld
            }
            (
                Step::Retiring,
                Event::Retired | Event::Refused(Side::Old, _) | Event::Died(Side::Old, _),
            ) => Step::FencingOld,
            (Step::Retiring, Event::Tick) if overdue => Step::FencingOld,
            (Step::FencingOld, Event::Fenced(Side::Old, certificate))
                if certificate.generation() == self.from_generation =>
            {
                return self.finish(match failed {
                    None => Outcome::Committed,
                    Some(how) => Outcome::CommittedButFailed(how),
                });
            }
            (Step::FencingOld, Event::FenceUnconfirmed(Side::Old, reason)) => {
                return self.fence_later(
                    reason,
                    now,
                    State::Committed {
                        step,
                        new_failed: failed,
                    },
                );
            }
            (Step::FencingOld, Event::Tick) if self.retry_due(now) => {
                self.order_fence(Side::Old);
                step
            }
            (step, Event::Died(Side::New, how)) => {
                failed = Some(how);
                step
            }
            (step, _) => step,
        };
        if next != step {
            match next {
                Step::Retiring => {
                    self.deadline = Some(now + FROZEN_STEP_TIMEOUT);
                    self.actions.push_back(Action::Retire);
                }
                _ => {
                    self.deadline = None;
                    self.order_fence(Side::Old);
                }
            }
        }
        self.state = State::Committed {
            step: next,
            new_failed: failed,
        };
    }

    fn roll_back(&mut self, reason: String, old_failed: Option<String>, _now: Instant) {
        self.deadline = None;
        self.order_fence(Side::New);
        self.state = State::RollingBack {
            reason,
            new_fenced: false,
            old_failed,
        };
    }

    /// First the new generation is fenced, then the old one resumes.
    fn rolling_back(
        &mut self,
        reason: String,
        new_fenced: bool,
        old_failed: Option<String>,
        event: Event,
        now: Instant,
    ) {
        let overdue = self.deadline.is_some_and(|due| due <= now);
        match event {
            Event::Fenced(Side::New, certificate)
                if !new_fenced && certificate.generation() == self.to_generation =>
            {
                if let Some(how) = old_failed {
                    return self.finish(Outcome::OldFailed(how));
                }
                self.deadline = Some(now + FROZEN_STEP_TIMEOUT);
                self.actions.push_back(Action::ResumeOld);
                self.state = State::RollingBack {
                    reason,
                    new_fenced: true,
                    old_failed: None,
                };
            }
            Event::FenceUnconfirmed(Side::New, why) if !new_fenced => {
                let state = State::RollingBack {
                    reason,
                    new_fenced,
                    old_failed,
                };
                self.fence_later(why, now, state);
            }
            Event::Tick if !new_fenced && self.retry_due(now) => {
                self.order_fence(Side::New);
                self.state = State::RollingBack {
                    reason,
                    new_fenced,
                    old_failed,
                };
            }
            Event::OldRunning if new_fenced => self.finish(Outcome::RolledBack(reason)),
            Event::Refused(Side::Old, text) if new_fenced => {
                self.finish(Outcome::OldFailed(format!("it could not resume: {text}")));
            }
            Event::Tick if new_fenced && overdue => {
                let how = "it did not say that it serves again".to_owned();
                self.finish(Outcome::OldFailed(how));
            }
            Event::Died(Side::Old, how) if new_fenced => self.finish(Outcome::OldFailed(how)),
            Event::Died(Side::Old, how) => {
                self.state = State::RollingBack {
                    reason,
                    new_fenced,
                    old_failed: Some(how),
                };
            }
            _ => {
                self.state = State::RollingBack {
                    reason,
                    new_fenced,
                    old_failed,
                }
            }
        }
    }

    fn order_fence(&mut self, side: Side) {
        self.retry_at = None;
        self.fence_attempts += 1;
        let generation = match side {
            Side::Old => self.from_generation,
            Side::New => self.to_generation,
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
