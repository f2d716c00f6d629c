//! Admission of recoveries: their number at a time, their order, their records.

use crate::model::{RecoveryOutcome, RecoveryRecord};
use actix::prelude::*;

use super::{GetRecoveries, Supervisor};
use crate::instance::RecoveryGranted;
use crate::model::rows::RecoveryRow;
use crate::platform::journal::{Change, Record};
use crate::platform::wall_clock;

/// Maximum number of recoveries that the API shows, newest last.
const RECOVERIES_SHOWN: usize = 1000;

impl Supervisor {
    /// Marks a recovery as failed because its actor is gone; another recovery does the remaining work.
    pub(super) fn give_up_recoveries(
        &mut self,
        whose: impl Fn(&RecoveryRecord) -> bool,
        why: &str,
    ) {
        let mut changes = Vec::new();
        for record in self.recoveries.values_mut() {
            if whose(record) && record.outcome == RecoveryOutcome::Running {
                record.outcome = RecoveryOutcome::Failed;
                record.reason = Some(why.to_owned());
                record.ended_at = Some(wall_clock::now_rfc3339());
                changes.push(Change::Recovery(Box::new(RecoveryRow {
                    record: record.clone(),
                    phase: "done".to_owned(),
                })));
            }
        }
        if !changes.is_empty() {
            self.services.platform.journal.do_send(Record(changes));
        }
    }

    /// Drops the oldest recoveries that the API no longer shows; the journal has more.
    pub(super) fn drop_oldest_recoveries(&mut self) {
        while self.recoveries.len() > RECOVERIES_SHOWN {
            self.recoveries.pop_first();
        }
    }

    pub(super) fn grant(&mut self) {
        let most = self.services.platform.settings.borrow().recoveries_max;
        while self.recovering.len() < most {
            let Some(name) = self.waiting.pop_front() else {
                return;
            };
            if let Some(address) = self.instances.get(&name).and_then(|e| e.address.clone()) {
                self.recovering.push(name);
                address.do_send(RecoveryGranted);
            }
        }
    }
}

impl Supervisor {
    pub(super) fn recovery_wanted(&mut self, name: String) {
        if !self.waiting.contains(&name) {
            self.waiting.push_back(name);
        }
        self.grant();
    }

    pub(super) fn recovery_returned(&mut self, name: &str) {
        self.recovering.retain(|n| n != name);
        self.grant();
    }

    /// Records a recovery for the API.
    pub(super) fn note_recovery(&mut self, record: RecoveryRecord) {
        self.recoveries.insert(record.id, record);
        self.drop_oldest_recoveries();
    }
}

impl Handler<GetRecoveries> for Supervisor {
    type Result = MessageResult<GetRecoveries>;

    fn handle(&mut self, _: GetRecoveries, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.recoveries.values().cloned().collect())
    }
}
