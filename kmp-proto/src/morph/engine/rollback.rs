//! The way back: the target generation is fenced, then the source resumes.

use super::{Engine, State};
use crate::message::Side;
use crate::morph::REQUEST_RETRY;
use crate::morph::events::{Action, Event, Outcome};
use crate::time::Instant;

impl Engine {
    pub(super) fn roll_back(&mut self, reason: String, old_failed: Option<String>, _now: Instant) {
        self.deadline = None;
        self.order_fence(Side::Target);
        self.state = State::RollingBack {
            reason,
            new_fenced: false,
            old_failed,
        };
    }

    /// First the target generation is fenced, then the source resumes.
    pub(super) fn rolling_back(
        &mut self,
        reason: String,
        new_fenced: bool,
        old_failed: Option<String>,
        event: Event,
        now: Instant,
    ) {
        match event {
            Event::Fenced(Side::Target, certificate)
                if !new_fenced && certificate.generation() == self.to_generation =>
            {
                if let Some(how) = old_failed {
                    return self.finish(Outcome::SourceFailed(how));
                }
                self.ask_now(Action::ResumeSource, now);
                self.state = State::RollingBack {
                    reason,
                    new_fenced: true,
                    old_failed: None,
                };
            }
            Event::FenceUnconfirmed(Side::Target, why) if !new_fenced => {
                let state = State::RollingBack {
                    reason,
                    new_fenced,
                    old_failed,
                };
                self.fence_later(why, now, state);
            }
            Event::Tick if !new_fenced && self.retry_due(now) => {
                self.order_fence(Side::Target);
                self.state = State::RollingBack {
                    reason,
                    new_fenced,
                    old_failed,
                };
            }
            Event::SourceRunning if new_fenced => self.finish(Outcome::RolledBack(reason)),
            Event::Refused(Side::Source, text) if new_fenced => {
                if self.ask_again_later(now) {
                    self.state = State::RollingBack {
                        reason,
                        new_fenced,
                        old_failed,
                    };
                } else {
                    self.finish(Outcome::SourceFailed(format!(
                        "it could not resume: {text}"
                    )));
                }
            }
            Event::Unanswered(Side::Source, _) if new_fenced => {
                self.retry_at = Some(now + REQUEST_RETRY);
                self.state = State::RollingBack {
                    reason,
                    new_fenced,
                    old_failed,
                };
            }
            Event::Tick if new_fenced && self.ask_is_due(now) => {
                self.ask_now(Action::ResumeSource, now);
                self.state = State::RollingBack {
                    reason,
                    new_fenced,
                    old_failed,
                };
            }
            Event::Died(Side::Source, how) if new_fenced => self.finish(Outcome::SourceFailed(how)),
            Event::Died(Side::Source, how) => {
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
}
