//! The states before the commit record is ordered: a sequence of steps, in which any failure causes a rollback.

use super::{Engine, State, Taken, Timers};
use crate::message::Side;
use crate::morph::FROZEN_STEP_TIMEOUT;
use crate::morph::events::{Action, CommitLimit, Event};
use crate::morph::phases::{
    Activating, Agreement, Committable, Freezing, Held, LastRound, Morph, Negotiating, Pair,
    Preparation, Preparing, Progress, Round, Transferring, Validating,
};
use crate::morph::reasons::{RollbackReason, SourceFailure};
use crate::morph::stage::Stage;
use crate::time::Instant;

#[derive(Debug)]
pub(super) enum Open {
    Preparing(Morph<Preparing>),
    Negotiating(Morph<Negotiating>),
    Transferring(Morph<Transferring>),
    Held(Morph<Held>),
    Validating(Morph<Validating>),
    Committable(Morph<Committable>),
    Freezing(Morph<Freezing>),
    LastRound(Morph<LastRound>),
    Activating(Morph<Activating>),
}

impl Open {
    pub(super) fn stage(&self) -> Stage {
        match self {
            Self::Preparing(_) => Stage::Preparing,
            Self::Negotiating(_) => Stage::Negotiating,
            Self::Transferring(_) => Stage::Transferring,
            Self::Held(_) => Stage::Held,
            Self::Validating(_) => Stage::Validating,
            Self::Committable(_) => Stage::Committable,
            Self::Freezing(_) => Stage::Freezing,
            Self::LastRound(_) => Stage::LastRound,
            Self::Activating(_) => Stage::Activating,
        }
    }

    fn pair(&self) -> Pair {
        match self {
            Self::Preparing(morph) => morph.pair,
            Self::Negotiating(morph) => morph.pair,
            Self::Transferring(morph) => morph.pair,
            Self::Held(morph) => morph.pair,
            Self::Validating(morph) => morph.pair,
            Self::Committable(morph) => morph.pair,
            Self::Freezing(morph) => morph.pair,
            Self::LastRound(morph) => morph.pair,
            Self::Activating(morph) => morph.pair,
        }
    }
}

impl From<Open> for Taken {
    fn from(open: Open) -> Self {
        Self::To(State::Open(open))
    }
}

/// Returns the reason for a rollback, if the event causes one in all of these states; else the event.
fn undoing(event: Event) -> Result<RollbackReason, Event> {
    Ok(match event {
        Event::RollbackRequested(words) => RollbackReason::Requested(words),
        Event::Died(side, how) => RollbackReason::Died(side, how),
        Event::Refused(side, text) => RollbackReason::Refused(side, text),
        Event::Unanswered(side, text) => RollbackReason::Unanswered(side, text),
        event => return Err(event),
    })
}

impl Engine {
    pub(super) fn open(&mut self, open: Open, event: Event, now: Instant) -> Taken {
        let event = match undoing(event) {
            Ok(reason) => {
                let source_failure = match &reason {
                    RollbackReason::Died(Side::Source, how) => {
                        Some(SourceFailure::Died(how.clone()))
                    }
                    _ => None,
                };
                return Taken::To(self.roll_back(open.pair(), reason, source_failure));
            }
            Err(Event::Tick) if self.timers.is_overdue(now) => {
                let reason = RollbackReason::TookTooLong(open.stage().phase());
                return Taken::To(self.roll_back(open.pair(), reason, None));
            }
            Err(event) => event,
        };
        match (open, event) {
            (Open::Preparing(morph), event) => self.preparing(morph, event, now),
            (Open::Negotiating(morph), Event::Offered(side, offer)) => {
                let timeout = morph.phase.config.phase_timeout;
                match morph.offered(side, offer) {
                    Agreement::Waiting(morph) => Open::Negotiating(morph).into(),
                    Agreement::Agreed(morph, choice) => {
                        self.timers = Timers::until(Some(now + timeout));
                        self.actions.push_back(Action::Chosen(choice));
                        self.send_round(morph).into()
                    }
                    Agreement::Refused(pair, incompatible) => {
                        let reason = RollbackReason::Incompatible(Box::new(incompatible));
                        Taken::To(self.roll_back(pair, reason, None))
                    }
                }
            }
            (
                Open::Transferring(morph),
                Event::RoundApplied {
                    sent_bytes,
                    dirty_bytes,
                    took,
                },
            ) => {
                let round = Round {
                    sent_bytes,
                    dirty_bytes,
                    took,
                };
                self.progress(morph.applied(round), now)
            }
            (Open::Held(morph), Event::ValidationRequested) => self.progress(morph.go_on(), now),
            (Open::Validating(morph), Event::Report(checks)) => {
                let (pair, expiry) = (morph.pair, morph.phase.transfer.config.expiry);
                match morph.on_report(&checks) {
                    Ok(morph) => {
                        self.timers = Timers::until(Some(now + expiry));
                        let estimate = morph.estimate();
                        self.actions.push_back(Action::Committable(estimate));
                        Open::Committable(morph).into()
                    }
                    Err(invalid) => {
                        let reason = RollbackReason::Invalid(invalid);
                        Taken::To(self.roll_back(pair, reason, None))
                    }
                }
            }
            (
                Open::Committable(morph),
                Event::CommitRequested {
                    limit,
                    or_roll_back,
                },
            ) => self.commit(morph, limit, or_roll_back, now),
            (Open::Freezing(morph), Event::Frozen(digest)) => {
                let morph = morph.frozen(digest);
                let action = Action::Round {
                    provider: morph.phase.provider,
                    mode: morph.phase.mode,
                    number: morph.phase.round,
                    last: true,
                };
                self.frozen_step(action, now);
                Open::LastRound(morph).into()
            }
            (Open::LastRound(morph), Event::RoundApplied { .. }) => {
                self.frozen_step(Action::Activate, now);
                Open::Activating(morph.applied()).into()
            }
            (Open::Activating(morph), Event::Activated(digest)) => match morph.activated(digest) {
                Ok((morph, order)) => {
                    // Until the record's outcome is known, no deadline may cause a rollback.
                    self.timers = Timers::default();
                    self.actions.push_back(Action::WriteCommitRecord(order));
                    Taken::To(State::Recording(morph))
                }
                Err((pair, reason)) => Taken::To(self.roll_back(pair, reason, None)),
            },
            (open, _) => Taken::Not(State::Open(open)),
        }
    }

    fn preparing(&mut self, mut morph: Morph<Preparing>, event: Event, now: Instant) -> Taken {
        match event {
            Event::NotStarted(why) => {
                let reason = RollbackReason::NotStarted(why);
                Taken::To(self.roll_back(morph.pair, reason, None))
            }
            Event::TargetHealthy => {
                if !morph.target_is_healthy() {
                    return Taken::Not(State::Open(Open::Preparing(morph)));
                }
                self.actions.push_back(Action::Prepare(Side::Target));
                Open::Preparing(morph).into()
            }
            Event::Prepared(side) => match morph.prepared(side) {
                Preparation::Waiting(morph) => Open::Preparing(morph).into(),
                Preparation::Ready(morph) => {
                    let timeout = morph.phase.config.phase_timeout;
                    self.timers = Timers::until(Some(now + timeout));
                    self.actions.push_back(Action::Negotiate(Side::Source));
                    self.actions.push_back(Action::Negotiate(Side::Target));
                    Open::Negotiating(morph).into()
                }
            },
            _ => Taken::Not(State::Open(Open::Preparing(morph))),
        }
    }

    fn send_round(&mut self, morph: Morph<Transferring>) -> Open {
        let transfer = &morph.phase.transfer;
        self.actions.push_back(Action::Round {
            provider: transfer.provider,
            mode: transfer.mode,
            number: transfer.round,
            last: false,
        });
        Open::Transferring(morph)
    }

    fn progress(&mut self, progress: Progress, now: Instant) -> Taken {
        match progress {
            Progress::Again(morph) => {
                let timeout = morph.phase.transfer.config.phase_timeout;
                self.timers = Timers::until(Some(now + timeout));
                self.send_round(morph).into()
            }
            Progress::Over(morph) => {
                let timeout = morph.phase.transfer.config.phase_timeout;
                self.timers = Timers::until(Some(now + timeout));
                self.actions.push_back(Action::Validate);
                Open::Validating(morph).into()
            }
            Progress::Held(morph) => {
                let expiry = morph.phase.transfer.config.expiry;
                self.timers = Timers::until(Some(now + expiry));
                self.actions.push_back(Action::Transferred);
                Open::Held(morph).into()
            }
        }
    }

    fn commit(
        &mut self,
        morph: Morph<Committable>,
        limit: CommitLimit,
        or_roll_back: bool,
        now: Instant,
    ) -> Taken {
        match morph.commit(limit) {
            Ok(morph) => {
                self.frozen_step(Action::Freeze, now);
                Open::Freezing(morph).into()
            }
            Err((morph, over)) if or_roll_back => {
                let reason = RollbackReason::OverBudget(over);
                Taken::To(self.roll_back(morph.pair, reason, None))
            }
            Err((morph, over)) => {
                self.actions.push_back(Action::CommitRefused(over));
                Open::Committable(morph).into()
            }
        }
    }

    fn frozen_step(&mut self, action: Action, now: Instant) {
        self.timers = Timers::until(Some(now + FROZEN_STEP_TIMEOUT));
        self.actions.push_back(action);
    }
}
