//! The job of an instance: its recovery or morph under way. The engine knows which one; a message for the other kind
//! is dropped.

use actix::prelude::*;
use kmp_proto::instance::JobNews;

use crate::morph::{MorphSession, SourceFailed, Terminated};
use crate::platform::fleet::Abandon;
use crate::recovery::{RecoveryJob, SuccessorNews};

/// A job that has begun and has not reported its end.
pub(super) trait Job {
    /// Returns its name, for people.
    fn name(&self) -> &'static str;

    /// Passes the engine's news to the job; `generation` is the instance's active one.
    fn tell(&self, news: JobNews, generation: u64);

    /// Returns whether its actor has ended.
    fn has_ended(&self) -> bool;

    /// Stops the job: another one does the remaining work.
    fn abandon(&self);

    /// Returns the session that takes commands for a morph.
    fn session(&self) -> Option<&Addr<MorphSession>> {
        None
    }
}

impl Job for Addr<RecoveryJob> {
    fn name(&self) -> &'static str {
        "recovery"
    }

    fn tell(&self, news: JobNews, generation: u64) {
        match news {
            JobNews::SuccessorHealthy => self.do_send(SuccessorNews::Healthy(generation)),
            JobNews::SuccessorFailed(how) => self.do_send(SuccessorNews::Failed(how)),
            JobNews::SourceFailed(_) | JobNews::Terminated => {}
        }
    }

    fn has_ended(&self) -> bool {
        !self.connected()
    }

    fn abandon(&self) {
        self.do_send(Abandon);
    }
}

impl Job for Addr<MorphSession> {
    fn name(&self) -> &'static str {
        "morph"
    }

    fn tell(&self, news: JobNews, _: u64) {
        match news {
            JobNews::SourceFailed(how) => self.do_send(SourceFailed(how)),
            JobNews::Terminated => self.do_send(Terminated),
            JobNews::SuccessorHealthy | JobNews::SuccessorFailed(_) => {}
        }
    }

    fn has_ended(&self) -> bool {
        !self.connected()
    }

    fn abandon(&self) {
        self.do_send(Abandon);
    }

    fn session(&self) -> Option<&Addr<MorphSession>> {
        Some(self)
    }
}
