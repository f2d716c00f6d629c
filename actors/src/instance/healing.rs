//! Failure and recovery of an instance.

use std::time::Duration;

use actix::prelude::*;
use kmorph_control_api::{
    ApiError, ErrorCode, EventKind, InstanceState, RecoveryOutcome, RecoveryRecord,
};
use kmp_proto::detector::{Level, Verdict};
use kmp_proto::message::FailureCause;
use kmp_proto::recovery::Decision;
use slog::error;

use super::termination::TERMINATED;
use super::{Ending, Instance, Work};
use crate::clock;
use crate::journal::{Desired, GenerationRow};
use crate::morph::SourceFailed;
use crate::recovery::{Abandon, Plan, RecoveryJob, SuccessorNews};
use crate::supervisor::{RecoveryDone, RequestRecovery};

/// A recovery has started a successor; the instance watches it.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Successor {
    /// Its row.
    pub row: GenerationRow,
    /// Who wants to know how it fares.
    pub job: Addr<RecoveryJob>,
}

/// A recovery has ended.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct RecoveryOver {
    /// How.
    pub record: RecoveryRecord,
    /// The generation that failed, as it is now: fenced, if that was confirmed.
    pub failed: GenerationRow,
}

/// The supervisor grants a recovery that was asked for.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct RecoveryGranted;

impl Instance {
    /// The active generation has failed.
    pub(super) fn failed(&mut self, verdict: Verdict, ctx: &mut Context<Self>) {
        let mut evidence = verdict.evidence.clone();
        let said = self.health.take().map(|health| health.text);
        if let Some(said) = said.filter(|text| !text.is_empty())
            && verdict.level == Level::WorkloadFailed
        {
            evidence.push(format!("its agent says: {said}"));
        }
        let text = evidence.join("; ");
        let cause = match verdict.level {
            Level::KernelDead => FailureCause::KernelDead,
            Level::AgentDead => FailureCause::AgentDead,
            Level::WorkloadFailed => FailureCause::WorkloadFailed,
        };
        self.say(
            EventKind::Detector,
            format!("{}: {text}", verdict.level.as_str()),
        );
        if !matches!(self.work, Work::Morphing(_)) {
            self.services.aim(&self.row.name, None);
        }
        match &self.work {
            Work::Morphing(session) => {
                session.do_send(SourceFailed(text));
                return;
            }
            Work::Recovering(job) => {
                self.successor_cause = Some(cause);
                job.do_send(SuccessorNews::Failed(text));
                return;
            }
            Work::Terminating => return,
            Work::Asked(_) => {
                // What was asked for follows from this as well.
                self.end_watch();
                return self.enter(InstanceState::Failed, Some(text));
            }
            Work::Capturing { .. } => {
                // The memory that was asked for is still there, and is read to its end first.
                let reason = format!("{text}; it is recovered when its memory has been read");
                self.enter(InstanceState::Failed, Some(reason));
                let evidence = evidence.clone();
                self.work = Work::Capturing {
                    died: Some(Verdict {
                        evidence,
                        ..verdict
                    }),
                };
                return;
            }
            Work::Nothing | Work::Waiting(_) | Work::Queued(_) => {}
        }
        if self.is_spawning() {
            return self.give_up_spawn(text, ctx);
        }
        self.enter(InstanceState::Failed, Some(text));
        self.heal(cause, evidence, ctx);
    }

    /// Decides by policy what follows from a failure.
    pub(super) fn heal(
        &mut self,
        cause: FailureCause,
        evidence: Vec<String>,
        ctx: &mut Context<Self>,
    ) {
        self.end_watch();
        self.hold_ports(ctx);
        if self.ending.is_some() {
            return;
        }
        if !self.row.policy.auto_heal {
            self.row.desired = Desired::Unhealed;
            self.row.reason = self.reason.clone();
            self.close_unserved_ports();
            return self.save();
        }
        match self.restarts.failed(clock::now()) {
            Decision::RecoverAfter(wait) => self.recover_after(wait, true, cause, evidence, ctx),
            Decision::Quarantine { failures } => {
                let mut evidence = evidence;
                evidence.push(format!("{failures} failures in a row: quarantined"));
                // Another daemon may have to finish it.
                self.row.desired = Desired::Resting;
                self.row.reason = Some(evidence.join("; "));
                self.save();
                self.recover_after(Duration::ZERO, false, cause, evidence, ctx);
            }
        }
    }

    pub(super) fn recover_after(
        &mut self,
        wait: Duration,
        respawn: bool,
        cause: FailureCause,
        evidence: Vec<String>,
        ctx: &mut Context<Self>,
    ) {
        let plan = Box::new(Plan {
            instance: self.row.clone(),
            failed: self.generation.clone(),
            respawn,
            cause,
            evidence,
            verdict_at: clock::now(),
        });
        if wait.is_zero() {
            return self.queue(plan);
        }
        self.say(
            EventKind::Recovery,
            format!("recovering in {wait:?} (back-off)"),
        );
        let timer = ctx.run_later(wait, |act, _| act.queue(plan));
        self.work = Work::Waiting(timer);
    }

    pub(super) fn queue(&mut self, plan: Box<Plan>) {
        self.work = Work::Queued(plan);
        self.supervisor
            .do_send(RequestRecovery(self.row.name.clone()));
    }
}

/// A worker of the instance is gone: a recovery or a morph. Either it said before how it ended, or it
/// panicked.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct WorkerGone;

impl Handler<WorkerGone> for Instance {
    type Result = ();

    fn handle(&mut self, _: WorkerGone, ctx: &mut Self::Context) {
        match &self.work {
            Work::Recovering(job) if !job.connected() => self.start_over("recovery", ctx),
            Work::Morphing(session) if !session.connected() => self.start_over("morph", ctx),
            _ => {}
        }
    }
}

impl Instance {
    /// After a panic of an actor below this one: half of what was known of the instance is lost.
    /// The supervisor makes a new actor for it from what the journal and the machine say, as after a
    /// restart of the daemon.
    pub(super) fn start_over(&mut self, whose: &str, ctx: &mut Context<Self>) {
        error!(self.log, "an actor below it panicked: it starts over"; "actor" => whose,
            "generation" => self.generation.generation);
        ctx.stop();
    }
}

impl Drop for Instance {
    /// Also reached by a panic. What goes on below it would meet its successor's.
    fn drop(&mut self) {
        self.end_watch();
        match &self.work {
            Work::Recovering(job) => job.do_send(Abandon),
            Work::Morphing(session) => session.do_send(Abandon),
            _ => {}
        }
    }
}

impl Handler<RecoveryGranted> for Instance {
    type Result = ();

    fn handle(&mut self, _: RecoveryGranted, ctx: &mut Self::Context) {
        match std::mem::replace(&mut self.work, Work::Nothing) {
            Work::Queued(plan) => {
                self.enter(InstanceState::Recovering, Some(plan.evidence.join("; ")));
                let (services, supervisor) = (self.services.clone(), self.supervisor.clone());
                let job = RecoveryJob::begin(services, supervisor, ctx.address(), *plan);
                self.work = Work::Recovering(job);
            }
            other => {
                self.work = other;
                self.supervisor.do_send(RecoveryDone(self.row.name.clone()));
            }
        }
    }
}

impl Handler<Successor> for Instance {
    type Result = ();

    fn handle(&mut self, successor: Successor, ctx: &mut Self::Context) {
        self.row.active_generation = successor.row.generation;
        self.row.recoveries += 1;
        self.row.desired = Desired::Running;
        self.generation = successor.row;
        self.gone = false;
        self.end_watch();
        if matches!(self.ending, Some(Ending::After(_))) {
            let over = SuccessorNews::Failed(TERMINATED.to_owned());
            successor.job.do_send(over);
        } else {
            self.begin_watch(ctx);
        }
        self.work = Work::Recovering(successor.job);
    }
}

impl Handler<RecoveryOver> for Instance {
    type Result = ();

    fn handle(&mut self, over: RecoveryOver, ctx: &mut Self::Context) {
        self.work = Work::Nothing;
        self.supervisor.do_send(RecoveryDone(self.row.name.clone()));
        if self.generation.generation == over.failed.generation {
            self.generation = over.failed;
        }
        match self.ending.take() {
            Some(Ending::After(request)) => return self.end_after_work(request, ctx),
            // It ends as soon as that is written.
            Some(Ending::Recorded) => return self.ending = Some(Ending::Recorded),
            None => {}
        }
        let reason = over.record.reason.clone();
        match over.record.outcome {
            RecoveryOutcome::Recovered => self.enter_running(),
            RecoveryOutcome::Failed => {
                let evidence = vec![reason.unwrap_or_else(|| "the successor failed".to_owned())];
                self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                let cause = self.successor_cause.take();
                self.heal(cause.unwrap_or(FailureCause::KernelDead), evidence, ctx);
            }
            RecoveryOutcome::Quarantined => {
                let text = over.record.evidence.join("; ");
                self.rest(Desired::Resting, InstanceState::Quarantined, Some(text));
            }
            RecoveryOutcome::OperatorActionNeeded | RecoveryOutcome::Running => {
                self.rest(
                    Desired::OperatorAction,
                    InstanceState::OperatorActionNeeded,
                    reason,
                );
                self.close_unserved_ports();
            }
        }
        if let Some(operation) = self.operation.take() {
            let result = serde_json::to_value(&over.record).ok();
            match over.record.outcome {
                RecoveryOutcome::Recovered => operation.succeed(result),
                _ => {
                    let text = over
                        .record
                        .reason
                        .unwrap_or_else(|| "not recovered".to_owned());
                    operation.fail(ApiError::new(ErrorCode::Internal, text), result);
                }
            }
        }
    }
}
