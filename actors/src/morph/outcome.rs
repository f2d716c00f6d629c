//! The outcome of a morph, and the parts of its downtime.

use crate::model::{
    Command, DowntimeSteps, Failure, FailureKind, MorphPhase, OperationKind, OperationResult,
};
use actix::prelude::*;
use kmp_proto::message::Side;
use kmp_proto::morph::{Outcome, RollbackReason};
use kmp_proto::time::Instant;

use super::{MorphNews, MorphOver, MorphSession};
use crate::generation::release::{Kept, RELEASE_PATIENCE};
use crate::platform::journal::{Change, Record};
use crate::platform::operations::Handle;
use crate::platform::wall_clock;
use crate::watch::EndWatch;

/// When the steps of the commit began and ended.
#[derive(Debug, Default)]
pub(super) struct Times {
    pub(super) freeze: Option<Instant>,
    pub(super) frozen: Option<Instant>,
    pub(super) applied: Option<Instant>,
    pub(super) activated: Option<Instant>,
    pub(super) recorded: Option<Instant>,
    pub(super) serving: Option<Instant>,
    /// Estimate of the measurable part of the downtime.
    pub(super) without_overhead_us: Option<u64>,
}

impl MorphSession {
    fn result(&self) -> Option<OperationResult> {
        Some(OperationResult::Morph(Box::new(self.status.clone())))
    }

    pub(super) fn succeed_operation(&mut self) {
        if let Some(operation) = self.operation.take() {
            operation.succeed(self.result());
        }
    }

    pub(super) fn fail_operation(&mut self, error: Failure) {
        if let Some(operation) = self.operation.take() {
            operation.fail(error, self.result());
        }
    }

    fn downtime(&self) -> Option<DowntimeSteps> {
        let times = &self.times;
        let start = times.freeze?;
        let mut last = start;
        let mut step = |at: Option<Instant>| {
            let at = at.unwrap_or(last);
            let took = at - last;
            last = at;
            u64::try_from(took.as_micros()).unwrap_or(u64::MAX)
        };
        let mut steps = DowntimeSteps {
            freeze_us: step(times.frozen),
            final_delta_us: step(times.applied),
            activate_us: step(times.activated),
            record_us: step(times.recorded),
            serve_us: step(times.serving),
            total_us: 0,
        };
        let total = times.serving? - start;
        steps.total_us = u64::try_from(total.as_micros()).unwrap_or(u64::MAX);
        Some(steps)
    }

    pub(super) fn finished(&mut self, outcome: Outcome, ctx: &mut Context<Self>) {
        self.status.ended_at = Some(wall_clock::now_rfc3339());
        let (phase, error) = shown(&self.plan.instance.name, &outcome);
        self.status.phase = phase;
        self.status.expires_at = None;
        self.status.downtime = self.downtime();
        self.status.reason = error.as_ref().map(|e| e.message.clone());
        let said = match (&error, &self.status.downtime) {
            (None, Some(steps)) => format!("morph: committed, downtime {} µs", steps.total_us),
            (None, None) => "morph: committed".to_owned(),
            (Some(error), _) => format!("morph: {}", error.message),
        };
        self.say(said);
        let row = self.row();
        self.means.downtimes.borrow_mut().learn(&row);
        self.means
            .platform
            .journal
            .do_send(Record(vec![Change::Morph(Box::new(row))]));
        self.end_operation(&outcome, error);
        if outcome.owner() == Side::Source
            && let Some(watch) = self.watch.take()
        {
            watch.do_send(EndWatch);
        }
        self.owner.news.do_send(MorphNews::Over(Box::new(MorphOver {
            outcome,
            status: self.status.clone(),
            source: self.plan.source.clone(),
            target: self.plan.target.clone(),
            watch: self.watch.take(),
        })));
        ctx.stop();
    }

    fn end_operation(&mut self, outcome: &Outcome, error: Option<Failure>) {
        let result = self.result();
        let Some(operation) = self.operation.take() else {
            return;
        };
        let wanted = operation.snapshot().map(|o| o.kind);
        let rollback = wanted == Some(OperationKind::MorphRollback);
        let undone = operation.cancel_requested() && !rollback;
        let end: fn(Handle, Option<OperationResult>) = match (outcome, error) {
            (Outcome::RolledBack(_), _) if undone => Handle::undone,
            (Outcome::RolledBack(_), _) if rollback => Handle::succeed,
            (_, Some(error)) => return operation.fail(error, result),
            (_, None) => Handle::succeed,
        };
        let kept = std::mem::take(&mut self.kept);
        if kept.is_empty() {
            return end(operation, result);
        }
        // The instance can start other work in the meantime.
        actix::spawn(end_once_returned(kept, operation, end, result));
    }
}

/// Returns the result of a morph as operators see it: its phase, and the error for an operation that waits for a
/// commit.
fn shown(instance: &str, outcome: &Outcome) -> (MorphPhase, Option<Failure>) {
    let (phase, error) = match outcome {
        Outcome::Committed => return (MorphPhase::Committed, None),
        Outcome::CommittedButFailed(failure) => {
            let text = format!("committed, but the target kernel failed: {failure}");
            (
                MorphPhase::Committed,
                Failure::new(FailureKind::Internal, text),
            )
        }
        Outcome::RolledBack(reason) => {
            let text = format!("rolled back, the source kernel serves: {reason}");
            let error = match reason {
                RollbackReason::Incompatible(_) => Failure::new(FailureKind::Incompatible, text)
                    .hint("docs/workloads.md says what a program does to be morphed, and what a plain program lacks"),
                RollbackReason::OverBudget(_) => Failure::new(FailureKind::OverBudget, text)
                    .hint("give a larger --downtime-budget-ms, or --force for any downtime"),
                _ => Failure::new(FailureKind::WrongState, text),
            };
            (MorphPhase::RolledBack, error)
        }
        Outcome::SourceFailed { failure, .. } => {
            let text = format!("undone, and the source kernel is being healed: {failure}");
            (
                MorphPhase::Failed,
                Failure::new(FailureKind::Internal, text),
            )
        }
        Outcome::OperatorActionNeeded { why, .. } => {
            let text = format!("a fence could not be confirmed: {why}");
            let error = Failure::new(FailureKind::OperatorActionNeeded, text).hint(
                Command::RecoverAfterProcesses {
                    instance: instance.to_owned(),
                },
            );
            (MorphPhase::Failed, error)
        }
    };
    (phase, Some(error))
}

/// Ends an operation once both sides' resources are released, or after [`RELEASE_PATIENCE`].
async fn end_once_returned(
    kept: Vec<Kept>,
    operation: Handle,
    end: fn(Handle, Option<OperationResult>),
    result: Option<OperationResult>,
) {
    let deadline = tokio::time::Instant::now() + RELEASE_PATIENCE;
    for mut kept in kept {
        operation.step(kept.waiting());
        if tokio::time::timeout_at(deadline, kept.returned())
            .await
            .is_err()
        {
            return operation.fail(kept.error("the morph is over"), result);
        }
    }
    end(operation, result);
}
