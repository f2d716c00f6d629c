//! Ends a recovery of an earlier daemon whose successor already runs and was adopted.

use kmp_proto::message::{RecoverCompleteFixed, RecoveryOutcome as WireOutcome};

use crate::model::rows::RecoveryRow;
use crate::model::{RecoveryOutcome, RecoveryRecord};
use crate::platform::fleet::Recovered;
use crate::platform::journal::Change;
use crate::platform::wall_clock;

/// A recovery that ended after a restart of the daemon.
pub(crate) struct EndedLater {
    record: RecoveryRecord,
    generation: u64,
}

/// Ends the recovery of `record`, whose successor is `generation`. Its duration is unknown: the
/// earlier daemon measured its start with its own clock.
pub(crate) fn ended_later(
    mut record: RecoveryRecord,
    outcome: RecoveryOutcome,
    reason: Option<String>,
    generation: u64,
) -> EndedLater {
    record.new_generation = Some(generation);
    record.outcome = outcome;
    record.reason = reason;
    record.ended_at = Some(wall_clock::now_rfc3339());
    EndedLater { record, generation }
}

impl EndedLater {
    /// Returns the message for people.
    pub(crate) fn text(&self) -> String {
        match (&self.record.outcome, &self.record.reason) {
            (RecoveryOutcome::Recovered, _) => {
                "recovered; the recovery was begun by an earlier daemon".to_owned()
            }
            (_, reason) => format!("not recovered: {}", reason.as_deref().unwrap_or("unknown")),
        }
    }

    /// Returns the message for the survivors.
    pub(crate) fn told(&self) -> Recovered {
        let (new_generation, outcome) = match self.record.outcome {
            RecoveryOutcome::Recovered => (self.generation, WireOutcome::Recovered),
            _ => (0, WireOutcome::Reclaimed),
        };
        Recovered {
            fixed: RecoverCompleteFixed {
                recovery: self.record.id,
                failed_generation: self.record.failed_generation,
                new_generation,
                outcome,
                part: 0,
                flags: 0,
            },
            instance: self.record.instance.clone(),
        }
    }

    /// Returns the record to show and the change to write.
    pub(crate) fn entry(self) -> (Box<RecoveryRecord>, Change) {
        let phase = "done".to_owned();
        let record = self.record;
        let row = RecoveryRow {
            record: record.clone(),
            phase,
        };
        (Box::new(record), Change::Recovery(Box::new(row)))
    }
}
