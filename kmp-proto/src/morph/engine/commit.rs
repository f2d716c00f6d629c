//! The commit: the steps in which the source generation is frozen, and what follows the commit record.

use super::{Engine, State};
use crate::message::Side;
use crate::morph::events::{Action, Event, Outcome, Step};
use crate::morph::phases::{Committing, Morph};
use crate::morph::{FROZEN_STEP_TIMEOUT, REQUEST_ATTEMPTS, REQUEST_RETRY, REQUEST_TIMEOUT};
use crate::time::Instant;

impl Engine {
    pub(super) fn committing(
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

    pub(super) fn enter_committed(&mut self, now: Instant) {
        let new_failed = self.died_while_recording.new.take();
        let step = if new_failed.is_some() {
            self.deadline = None;
            self.order_fence(Side::Source);
            Step::FencingSource
        } else {
            self.ask_now(Action::Serve, now);
            Step::Serving
        };
        self.state = State::Committed { step, new_failed };
    }

    /// Sends a request that is repeated until its side answers or is judged dead.
    pub(super) fn ask_now(&mut self, request: Action, now: Instant) {
        self.retry_at = None;
        self.deadline = Some(now + REQUEST_TIMEOUT);
        self.actions.push_back(request);
    }

    /// Such a request is due again: its answer was a refusal or did not come.
    pub(super) fn ask_is_due(&self, now: Instant) -> bool {
        self.retry_due(now) || self.deadline.is_some_and(|due| due <= now)
    }

    /// A request that must not be given up lightly was refused: it is repeated. False when it was
    /// repeated often enough.
    pub(super) fn ask_again_later(&mut self, now: Instant) -> bool {
        self.refusals += 1;
        let again = self.refusals < REQUEST_ATTEMPTS;
        self.retry_at = again.then_some(now + REQUEST_RETRY);
        again
    }

    /// After the commit record: whatever happens, the end is the source generation fenced.
    pub(super) fn committed(
        &mut self,
        step: Step,
        new_failed: Option<String>,
        event: Event,
        now: Instant,
    ) {
        let overdue = self.deadline.is_some_and(|due| due <= now);
        let mut failed = new_failed;
        let next = match (step, event) {
            (Step::Serving, Event::Serving) => Step::Retiring,
            (Step::Serving, Event::Died(Side::Target, how)) => {
                failed = Some(how);
                Step::FencingSource
            }
            (Step::Serving, Event::Refused(Side::Target, text)) => {
                if self.ask_again_later(now) {
                    Step::Serving
                } else {
                    failed = Some(format!("it refused to serve: {text}"));
                    Step::FencingSource
                }
            }
            (Step::Serving, Event::Unanswered(Side::Target, _)) => {
                self.retry_at = Some(now + REQUEST_RETRY);
                Step::Serving
            }
            (Step::Serving, Event::Tick) if self.ask_is_due(now) => {
                self.ask_now(Action::Serve, now);
                Step::Serving
            }
            (
                Step::Retiring,
                Event::Retired
                | Event::Refused(Side::Source, _)
                | Event::Unanswered(Side::Source, _)
                | Event::Died(Side::Source, _),
            ) => Step::FencingSource,
            (Step::Retiring, Event::Tick) if overdue => Step::FencingSource,
            (Step::FencingSource, Event::Fenced(Side::Source, certificate))
                if certificate.generation() == self.from_generation =>
            {
                return self.finish(match failed {
                    None => Outcome::Committed,
                    Some(how) => Outcome::CommittedButFailed(how),
                });
            }
            (Step::FencingSource, Event::FenceUnconfirmed(Side::Source, reason)) => {
                return self.fence_later(
                    reason,
                    now,
                    State::Committed {
                        step,
                        new_failed: failed,
                    },
                );
            }
            (Step::FencingSource, Event::Tick) if self.retry_due(now) => {
                self.order_fence(Side::Source);
                step
            }
            (step, Event::Died(Side::Target, how)) => {
                failed = Some(how);
                step
            }
            (step, _) => step,
        };
        if next != step {
            self.retry_at = None;
            match next {
                Step::Retiring => {
                    self.deadline = Some(now + FROZEN_STEP_TIMEOUT);
                    self.actions.push_back(Action::Retire);
                }
                _ => {
                    self.deadline = None;
                    self.order_fence(Side::Source);
                }
            }
        }
        self.state = State::Committed {
            step: next,
            new_failed: failed,
        };
    }
}
