//! Workload failures that the agent fixes itself: it restarts the program in the same kernel. There is no recovery,
//! but the recovery log records the failure, its cause and its count, to explain lost data.

use crate::model::{EventKind, RecoveryOutcome, RecoveryRecord};
use actix::prelude::*;
use kmp_proto::message::{FailureCause, HealthStatus, WorkloadState};

use super::Instance;
use crate::model::rows::{RecoveryRow, WorkloadRestarts};
use crate::platform::fleet::FleetNews;
use crate::platform::journal::Change;
use crate::platform::wall_clock;

impl Instance {
    /// Records restarts of the program that the agent reports and that are not recorded yet.
    pub(super) fn note_restarts(&mut self, status: &HealthStatus, ctx: &mut Context<Self>) {
        // Before the first healthy answer, the spawn or the recovery that waits for it reports the error.
        if !self.engine.has_served() {
            return;
        }
        let now = WorkloadRestarts {
            generation: self.generation.generation,
            restarts: status.fixed.restarts,
            given_up: false,
        };
        let seen = self.row.workload_restarts;
        let known = if seen.generation == now.generation {
            seen.restarts
        } else {
            0
        };
        let failures = now.restarts.saturating_sub(known);
        if failures == 0 {
            return;
        }
        self.row.amend(|row| {
            row.workload_restarts = now;
            row.workload_failures = row.workload_failures.saturating_add(failures.into());
        });
        let times = match failures {
            1 => "its program failed and was started again".to_owned(),
            many => format!("its program failed and was started again, {many} times"),
        };
        // The text belongs to the last failure; once the program runs again, the agent's report has none.
        let cause = match status.text.as_str() {
            "" => format!("it had ended with status {}", status.fixed.exit_status),
            text => text.to_owned(),
        };
        self.say(EventKind::Detector, format!("{times}: {cause}"));
        let reason = format!("{times} by its agent, in the same kernel");
        self.log_workload_failure(cause, RecoveryOutcome::Recovered, reason, ctx);
    }

    /// Records, once, that the agent has given up on restarts.
    pub(super) fn note_given_up(&mut self, status: &HealthStatus, ctx: &mut Context<Self>) {
        let generation = self.generation.generation;
        let seen = self.row.workload_restarts;
        let known = seen.generation == generation && seen.given_up;
        let given_up = status.fixed.workload == WorkloadState::Failed;
        if known || !given_up || !self.engine.has_served() {
            return;
        }
        self.row.amend(|row| {
            row.workload_restarts = WorkloadRestarts {
                generation,
                restarts: status.fixed.restarts,
                given_up,
            };
        });
        let cause = match status.text.as_str() {
            "" => format!("it had ended with status {}", status.fixed.exit_status),
            text => text.to_owned(),
        };
        let text = format!("its agent starts its program no more: {cause}");
        self.say(EventKind::Detector, text);
        let reason = "its agent starts it no more; a recovery starts it in a new kernel".to_owned();
        self.log_workload_failure(cause, RecoveryOutcome::Failed, reason, ctx);
    }

    /// Writes an agent's own restart to the recovery log.
    fn log_workload_failure(
        &mut self,
        cause: String,
        outcome: RecoveryOutcome,
        reason: String,
        ctx: &mut Context<Self>,
    ) {
        let generation = self.generation.generation;
        let at = wall_clock::now_rfc3339();
        let record = RecoveryRecord {
            id: self
                .services
                .generations
                .resources
                .numbers
                .borrow_mut()
                .next_recovery(),
            instance: self.row.name.clone(),
            failed_generation: generation,
            new_generation: Some(generation),
            cause: FailureCause::WorkloadFailed.as_str().to_owned(),
            evidence: vec![cause],
            fence: None,
            vmcore: None,
            outcome,
            reason: Some(reason),
            started_at: at.clone(),
            ended_at: Some(at),
            fence_ms: None,
            total_ms: None,
        };
        let shown = Box::new(record.clone());
        self.fleet.news.do_send(FleetNews::Recovery(shown));
        let phase = "done".to_owned();
        let recovered = Change::Recovery(Box::new(RecoveryRow { record, phase }));
        self.report(vec![recovered], ctx);
    }
}
