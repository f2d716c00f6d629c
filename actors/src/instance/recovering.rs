//! Recoveries, as far as the instance's actor handles them.

use crate::model::{
    EventKind, Failure, FailureKind, OperationResult, RecoveryOutcome, RecoveryRecord,
};
use actix::prelude::*;
use kmp_proto::instance::{Answer, Event, RecoveryEnd};

use super::Instance;
use crate::model::generation::AnyGeneration;
use crate::platform::fleet::FleetNews;
use crate::recovery::{self, RecoveryNews};

/// The supervisor grants a requested recovery.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct RecoveryGranted;

impl Handler<RecoveryGranted> for Instance {
    type Result = ();

    fn handle(&mut self, _: RecoveryGranted, ctx: &mut Self::Context) {
        if let Answer::Refused { .. } = self.tell(Event::Granted, ctx) {
            // The instance no longer needs the recovery: other work has begun.
            self.return_grant();
        }
    }
}

impl Handler<RecoveryNews> for Instance {
    type Result = ();

    fn handle(&mut self, news: RecoveryNews, ctx: &mut Self::Context) {
        match news {
            RecoveryNews::Successor(row) => {
                self.generation = (*row).into();
                self.gone = false;
                self.tell(Event::SuccessorStarted, ctx);
            }
            RecoveryNews::Over {
                record,
                failed,
                left,
            } => {
                self.left.extend(left.map(|row| *row));
                self.recovery_over(*record, *failed, ctx);
            }
            RecoveryNews::Gone => self.job_gone(ctx),
        }
    }
}

impl Instance {
    fn recovery_over(
        &mut self,
        record: RecoveryRecord,
        failed: AnyGeneration,
        ctx: &mut Context<Self>,
    ) {
        self.job = None;
        if self.generation.generation == failed.generation {
            self.generation = failed;
        }
        let reason = record.reason.clone();
        let end = match record.outcome {
            RecoveryOutcome::Recovered => RecoveryEnd::Recovered,
            RecoveryOutcome::Failed => RecoveryEnd::SuccessorFailed(
                reason.unwrap_or_else(|| "the successor failed".to_owned()),
            ),
            RecoveryOutcome::Quarantined => RecoveryEnd::Quarantined,
            RecoveryOutcome::OperatorActionNeeded | RecoveryOutcome::Running => {
                RecoveryEnd::OperatorActionNeeded(reason.unwrap_or_default())
            }
        };
        self.tell(Event::RecoveryOver(end), ctx);
        // The exception: a termination of the instance has already answered the waiting operation.
        if let Some(operation) = self.waiting.take() {
            let result = Some(OperationResult::Recovery(Box::new(record.clone())));
            match record.outcome {
                RecoveryOutcome::Recovered => operation.succeed(result),
                _ => {
                    let text = record.reason.unwrap_or_else(|| "not recovered".to_owned());
                    operation.fail(Failure::new(FailureKind::Internal, text), result);
                }
            }
        }
    }

    /// Ends the entry of a recovery whose successor was adopted, and tells the survivors, who know that it
    /// began.
    pub(super) fn end_unfinished_recovery(&mut self, end: RecoveryEnd, ctx: &mut Context<Self>) {
        let Some(record) = self.unfinished.take() else {
            return;
        };
        let (outcome, reason) = match end {
            RecoveryEnd::Recovered => (RecoveryOutcome::Recovered, None),
            RecoveryEnd::SuccessorFailed(why) | RecoveryEnd::OperatorActionNeeded(why) => {
                (RecoveryOutcome::Failed, Some(why))
            }
            RecoveryEnd::Quarantined => (RecoveryOutcome::Quarantined, None),
        };
        let generation = self.generation.generation;
        let ended = recovery::ended_later(*record, outcome, reason, generation);
        self.say(EventKind::Recovery, ended.text());
        self.fleet.news.do_send(FleetNews::Recovered(ended.told()));
        let (shown, row) = ended.entry();
        self.fleet.news.do_send(FleetNews::Recovery(shown));
        self.report(vec![row], ctx);
    }

    /// Handles the end of a recovery or a morph: the job reported its outcome before, or it panicked.
    pub(super) fn job_gone(&mut self, ctx: &mut Context<Self>) {
        if self.job.as_ref().is_some_and(|job| job.has_ended()) {
            self.tell(Event::JobGone, ctx);
        }
    }
}

impl Drop for Instance {
    /// Runs after a panic too. Jobs that continued would conflict with the jobs of this actor's successor. A job that
    /// waits for a write of its proposal must not mistake the end of this actor for a failed write: actix drops an
    /// actor before the futures that hold the answer, so this function abandons the job first.
    fn drop(&mut self) {
        self.end_watch();
        if let Some(job) = &self.job {
            job.abandon();
        }
    }
}
