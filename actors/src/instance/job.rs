//! The recovery or the morph under way, as its instance reaches it. Which of them it is, the engine knows: the instance
//! tells and asks whatever it has begun, and what belongs to the other kind finds nobody.

use actix::prelude::*;
use kmp_proto::instance::JobNews;

use crate::morph::{MorphSession, SourceFailed, Terminated};
use crate::platform::fleet::Abandon;
use crate::recovery::{RecoveryJob, SuccessorNews};

/// What has been begun and not heard to end.
pub(super) trait Job {
    /// Its name, for people.
    fn name(&self) -> &'static str;

    /// Tells what the engine wants it told; `generation` is the instance's active one.
    fn tell(&self, news: JobNews, generation: u64);

    /// Whether its actor has ended.
    fn has_ended(&self) -> bool;

    /// Has it stop: what it would have done is done by another.
    fn abandon(&self);

    /// Who takes commands about a morph.
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
