//! The state while the commit record is being written: its outcome is unknown, and only the journal's answer decides.

use super::{Engine, State, Taken};
use crate::morph::events::Event;
use crate::morph::phases::{Morph, Recorded, Recording};
use crate::morph::reasons::RollbackReason;
use crate::time::Instant;

impl Engine {
    pub(super) fn recording(
        &mut self,
        mut morph: Morph<Recording>,
        event: Event,
        now: Instant,
    ) -> Taken {
        match event {
            Event::Died(side, how) => {
                morph.died(side, how);
                Taken::To(State::Recording(morph))
            }
            Event::RecordDurable(record) => match morph.recorded(record) {
                Ok(Recorded::Serve(morph)) => Taken::To(self.serve(morph, now)),
                Ok(Recorded::TargetFailed(morph)) => Taken::To(self.fence_source(morph)),
                Err(morph) => Taken::Not(State::Recording(morph)),
            },
            Event::RecordFailed(why) => {
                let (pair, source_failure) = morph.not_recorded();
                let reason = RollbackReason::NotRecorded(why);
                Taken::To(self.roll_back(pair, reason, source_failure))
            }
            _ => Taken::Not(State::Recording(morph)),
        }
    }
}
