//! The Instance actor: one kernel instance, its state, its policy, what is under way.
//!
//! ```text
//!  Starting ─▶ Running ◀─▶ Unresponsive ─verdict─▶ Failed ─▶ Recovering ─▶ Starting …
//!                │ ▲                                  │           └─▶ Quarantined | OperatorAction
//!                ▼ │                                  └ auto-heal off: stays, until `recover`
//!             Morphing                     any ─▶ Terminating ─▶ gone
//! ```
//!
//! Invariant: at most one of spawn, recovery, morph and termination is under way.

mod requests;
mod status;

use std::time::Duration;

use actix::prelude::*;
use kmorph_control_api::{
    ApiError, ErrorCode, EventKind, InstanceState, MorphStatus, Policy, RecoveryOutcome,
    RecoveryRecord,
};
use kmp_proto::detector::{Config, Level, Verdict};
use kmp_proto::fence::FenceOrder;
use kmp_proto::message::{FailureCause, Health, HealthStatus};
use kmp_proto::morph::Outcome;
use kmp_proto::recovery::{Decision, RestartPolicy};
use slog::{Logger, info, o, warn};

pub use requests::{
    CommandKind, GetHealth, GetHeartbeat, GetMorphStatus, GetStatus, GetSummary, Morph,
    MorphControl, PingInstance, PlanMorph, Recover, SetPolicy, Terminate,
};

use crate::clock;
use crate::events::Draft;
use crate::journal::{Change, Desired, GenerationRow, InstanceRow, Record};
use crate::morph::{MorphCommand, MorphPlan, MorphSession, OldFailed};
use crate::operations::Handle;
use crate::recovery::{Plan, RecoveryJob, SuccessorNews};
use crate::services::Services;
use crate::supervisor::{InstanceGone, RecoveryDone, RequestRecovery, Supervisor};
use crate::watch::{EndWatch, Reconfigure, SetOwner, Watch, WatchEvent, WatchKind};

/// How the detector is configured by a policy.
pub fn detector_config(services: &Services, policy: &Policy) -> Config {
    let timeout =
        Duration::try_from_secs_f64(policy.heartbeat_timeout_s).unwrap_or(Duration::from_secs(60));
    Config::new(timeout, services.settings.borrow().start_timeout)
}

/// How an instance comes into the daemon's care.
pub enum Beginning {
    /// It was just spawned; whoever asked waits.
    Spawned(Handle),
    /// It was found running after a restart of the daemon.
    Adopted,
    /// Nothing of it runs and it rests.
    Resting,
    /// It failed while no daemon watched, or a recovery was under way.
    NeedsRecovery {
        /// What was found.
        evidence: Vec<String>,
    },
}

/// The actor.
pub struct Instance {
    services: Services,
    supervisor: Addr<Supervisor>,
    log: Logger,
    row: InstanceRow,
    generation: GenerationRow,
    state: InstanceState,
    reason: Option<String>,
    watch: Option<Addr<Watch>>,
    restarts: RestartPolicy,
    beginning: Option<Beginning>,
    operation: Option<Handle>,
    work: Work,
    health: Option<HealthStatus>,
    kernel_release: String,
}

/// What is under way.
enum Work {
    Nothing,
    Waiting(SpawnHandle),
    Queued(Box<Plan>),
    Recovering(Option<Addr<RecoveryJob>>),
    Morphing(Addr<MorphSession>),
    Terminating,
}

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
}

/// A morph has ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MorphOver {
    /// How.
    pub outcome: Outcome,
    /// Its last status.
    pub status: MorphStatus,
    /// The new generation.
    pub new: GenerationRow,
    /// Its watch, when it is the instance now.
    pub watch: Option<Addr<Watch>>,
}

/// The supervisor grants a recovery that was asked for.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct RecoveryGranted;

impl Instance {
    /// Takes an instance into care.
    pub fn begin(
        services: Services,
        supervisor: Addr<Supervisor>,
        row: InstanceRow,
        generation: GenerationRow,
        beginning: Beginning,
    ) -> Addr<Self> {
        let log = services.log.new(o!("instance" => row.name.clone()));
        let kernel_release = generation.kernel.release.clone();
        let instance = Self {
            services,
            supervisor,
            log,
            row,
            generation,
            state: InstanceState::Starting,
            reason: None,
            watch: None,
            restarts: RestartPolicy::new(),
            beginning: Some(beginning),
            operation: None,
            work: Work::Nothing,
            health: None,
            kernel_release,
        };
        instance.start()
    }

    fn enter(&mut self, state: InstanceState, reason: Option<String>) {
        let same = self.state == state && self.reason == reason;
        self.state = state;
        self.reason = reason;
        if same {
            return;
        }
        let name = status::state_name(state);
        let text = match &self.reason {
            Some(reason) => format!("{name}: {reason}"),
            None => name.to_owned(),
        };
        info!(self.log, "{}", &text; "generation" => self.generation.generation);
        let generation = self.generation.generation;
        let draft = Draft::of(EventKind::InstanceState, &self.row.name, generation, text);
        self.services
            .events
            .publish(draft.with(serde_json::json!({ "state": state })));
    }

    fn say(&self, kind: EventKind, message: impl Into<String>) {
        let generation = self.generation.generation;
        self.services
            .events
            .publish(Draft::of(kind, &self.row.name, generation, message));
    }

    fn save(&self) {
        let change = Change::Instance(Box::new(self.row.clone()));
        self.services.journal.do_send(Record(vec![change]));
    }

    fn begin_watch(&mut self, ctx: &mut Context<Self>) {
        let Some(placement) = self.generation.placement.clone() else {
            return;
        };
        let mut config = detector_config(&self.services, &self.row.policy);
        if !self.row.spec.monitor {
            // Exit events are still seen, and its start; silence is not judged for a year.
            config.timeout = UNMONITORED_TIMEOUT;
        }
        let owner = ctx.address().recipient();
        self.watch = Some(Watch::begin(
            self.services.clone(),
            placement,
            config,
            owner,
        ));
    }

    fn end_watch(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.do_send(EndWatch);
        }
    }

    fn healthy(&mut self, release: String) {
        if !release.is_empty() {
            self.kernel_release = release;
        }
        self.restarts.healthy(clock::now());
        if !matches!(self.work, Work::Morphing(_)) {
            self.services.aim(&self.row.name, Some(&self.generation));
        }
        if let Work::Recovering(Some(job)) = &self.work {
            job.do_send(SuccessorNews::Healthy(self.generation.generation));
            return;
        }
        if !matches!(self.work, Work::Morphing(_) | Work::Terminating) {
            self.enter(InstanceState::Running, None);
        }
        if let Some(operation) = self.operation.take() {
            let id = self.row.name.clone();
            operation.succeed(Some(serde_json::json!({ "name": id, "state": "running" })));
        }
    }

    /// The active generation has failed.
    fn failed(&mut self, verdict: Verdict, ctx: &mut Context<Self>) {
        let evidence = verdict.evidence;
        let text = evidence.join("; ");
        self.say(
            EventKind::Detector,
            format!("{}: {text}", verdict.level.as_str()),
        );
        self.health = None;
        if !matches!(self.work, Work::Morphing(_)) {
            self.services.aim(&self.row.name, None);
        }
        match &self.work {
            Work::Morphing(session) => {
                session.do_send(OldFailed(text));
                return;
            }
            Work::Recovering(Some(job)) => {
                job.do_send(SuccessorNews::Failed(text));
                return;
            }
            Work::Terminating => return,
            Work::Nothing | Work::Waiting(_) | Work::Queued(_) | Work::Recovering(None) => {}
        }
        if let Some(operation) = self.operation.take() {
            let error = ApiError::new(
                ErrorCode::Internal,
                format!("it did not become healthy: {text}"),
            )
            .hint("its log lies in the instance's run directory (`kmorphctl status`)");
            operation.fail(error, None);
        }
        let cause = match verdict.level {
            Level::KernelDead => FailureCause::KernelDead,
            Level::AgentDead => FailureCause::AgentDead,
        };
        self.enter(InstanceState::Failed, Some(text));
        self.heal(cause, evidence, ctx);
    }

    /// Decides by policy what follows from a failure.
    fn heal(&mut self, cause: FailureCause, evidence: Vec<String>, ctx: &mut Context<Self>) {
        self.end_watch();
        if !self.row.policy.auto_heal {
            self.row.desired = Desired::Resting;
            self.row.reason = self.reason.clone();
            return self.save();
        }
        match self.restarts.failed(clock::now()) {
            Decision::RecoverAfter(wait) => self.recover_after(wait, true, cause, evidence, ctx),
            Decision::Quarantine { failures } => {
                let mut evidence = evidence;
                evidence.push(format!("{failures} failures in a row: quarantined"));
                self.recover_after(Duration::ZERO, false, cause, evidence, ctx);
            }
        }
    }

    fn recover_after(
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

    fn queue(&mut self, plan: Box<Plan>) {
        self.work = Work::Queued(plan);
        self.supervisor
            .do_send(RequestRecovery(self.row.name.clone()));
    }

    /// Ends the instance for good: asks it, then fences it, then forgets it.
    fn terminate(&mut self, force: bool, operation: Handle, ctx: &mut Context<Self>) {
        self.work = Work::Terminating;
        self.row.desired = Desired::Terminating;
        self.enter(InstanceState::Terminating, None);
        self.services.aim(&self.row.name, None);
        self.end_watch();
        let (services, mut generation) = (self.services.clone(), self.generation.clone());
        let row = self.row.clone();
        let grace = services.settings.borrow().stop_timeout;
        let work = async move {
            let change = Change::Instance(Box::new(row.clone()));
            let written = crate::journal::record(&services.journal, vec![change]).await;
            written.map_err(|e| e.to_string())?;
            operation.step("stopping");
            if let (false, Some(placement)) = (force, &generation.placement) {
                let asked = services.backend.request_shutdown(placement).await;
                if asked.is_ok() {
                    let ended = services.backend.ended(placement);
                    let _ = tokio::time::timeout(grace, ended).await;
                }
            }
            operation.step("fencing");
            let order = FenceOrder::new(generation.generation);
            match services.fence(&mut generation, order).await {
                Ok(certificate) => {
                    services.release(&generation, &certificate).await?;
                    let gone = Change::InstanceGone(row.name.clone());
                    let written = crate::journal::record(&services.journal, vec![gone]).await;
                    written.map_err(|e| e.to_string())?;
                    services.unpublish(&row.name);
                    if let Some(dir) = generation.run_dir.parent() {
                        // Its logs; whoever terminates an instance wants it gone.
                        let _ = tokio::fs::remove_dir_all(dir).await;
                    }
                    operation.succeed(None);
                    Ok(())
                }
                Err(reason) => {
                    let error = ApiError::new(ErrorCode::OperatorActionNeeded, reason.clone())
                        .hint("it keeps its resources; see why its processes do not end");
                    operation.fail(error, None);
                    Err(reason)
                }
            }
        };
        ctx.spawn(
            work.into_actor(self)
                .map(|result: Result<(), String>, act, ctx| match result {
                    Ok(()) => {
                        act.say(EventKind::InstanceState, "terminated");
                        act.supervisor.do_send(InstanceGone(act.row.name.clone()));
                        ctx.stop();
                    }
                    Err(reason) => {
                        warn!(act.log, "not terminated"; "reason" => &reason);
                        act.work = Work::Nothing;
                        act.enter(InstanceState::OperatorActionNeeded, Some(reason));
                    }
                }),
        );
    }

    fn begin_morph(&mut self, plan: MorphPlan, operation: Handle, ctx: &mut Context<Self>) {
        let (services, own) = (self.services.clone(), ctx.address());
        let session = MorphSession::begin(services, own, plan, operation);
        self.work = Work::Morphing(session);
        self.enter(InstanceState::Morphing, None);
    }

    fn rest(&mut self, desired: Desired, state: InstanceState, reason: Option<String>) {
        self.row.desired = desired;
        self.row.reason = reason.clone();
        self.enter(state, reason);
        self.save();
    }
}

/// Timeout of an instance that was spawned with `--monitor=false`.
const UNMONITORED_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

impl Actor for Instance {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        match self.beginning.take() {
            Some(Beginning::Spawned(operation)) => {
                operation.step("waiting for the first heartbeat");
                self.operation = Some(operation);
                self.say(EventKind::InstanceState, "spawned");
                self.begin_watch(ctx);
            }
            Some(Beginning::Adopted) => {
                self.say(EventKind::InstanceState, "adopted");
                self.begin_watch(ctx);
            }
            Some(Beginning::Resting) | None => {
                let state = match self.row.desired {
                    Desired::OperatorAction => InstanceState::OperatorActionNeeded,
                    _ => InstanceState::Quarantined,
                };
                self.state = state;
                self.reason = self.row.reason.clone();
            }
            Some(Beginning::NeedsRecovery { evidence }) => {
                self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                self.heal(FailureCause::KernelDead, evidence, ctx);
            }
        }
    }
}

impl Handler<WatchEvent> for Instance {
    type Result = ();

    fn handle(&mut self, event: WatchEvent, ctx: &mut Self::Context) {
        if event.generation != self.generation.generation {
            return;
        }
        match event.kind {
            WatchKind::Healthy(release) => self.healthy(release),
            WatchKind::Suspect(silence) => {
                if matches!(self.work, Work::Nothing) {
                    let text = format!("silent for {silence:.1?}");
                    self.enter(InstanceState::Unresponsive, Some(text));
                }
            }
            WatchKind::Relieved(silence) => {
                self.say(
                    EventKind::Detector,
                    format!("answers again after {silence:.1?}"),
                );
                if matches!(self.work, Work::Nothing) {
                    self.enter(InstanceState::Running, None);
                }
            }
            WatchKind::Congested => {
                self.say(
                    EventKind::Detector,
                    "transport congested: its channel takes no probes",
                );
            }
            WatchKind::Health(status) => self.health_said(status),
            WatchKind::Failed(verdict) => self.failed(verdict, ctx),
        }
    }
}

impl Instance {
    fn health_said(&mut self, status: HealthStatus) {
        let text = status.text.clone();
        let well = status.fixed.health == Health::Healthy;
        self.health = Some(status);
        if !matches!(self.work, Work::Nothing) {
            return;
        }
        match self.state {
            InstanceState::Running if !well => self.enter(InstanceState::Degraded, Some(text)),
            InstanceState::Degraded if well => self.enter(InstanceState::Running, None),
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
                self.work = Work::Recovering(Some(job));
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
        self.generation = successor.row;
        self.work = Work::Recovering(Some(successor.job));
        self.end_watch();
        self.begin_watch(ctx);
    }
}

impl Handler<RecoveryOver> for Instance {
    type Result = ();

    fn handle(&mut self, over: RecoveryOver, ctx: &mut Self::Context) {
        self.work = Work::Nothing;
        self.supervisor.do_send(RecoveryDone(self.row.name.clone()));
        let reason = over.record.reason.clone();
        match over.record.outcome {
            RecoveryOutcome::Recovered => self.enter(InstanceState::Running, None),
            RecoveryOutcome::Failed => {
                let evidence = vec![reason.unwrap_or_else(|| "the successor failed".to_owned())];
                self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                self.heal(FailureCause::KernelDead, evidence, ctx);
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

impl Handler<MorphOver> for Instance {
    type Result = ();

    fn handle(&mut self, over: MorphOver, ctx: &mut Self::Context) {
        self.work = Work::Nothing;
        match over.outcome {
            Outcome::Committed | Outcome::CommittedButFailed(_) => {
                self.end_watch();
                self.row.active_generation = over.new.generation;
                self.row.spec.kernel = over.new.kernel.clone();
                self.row.morphs += 1;
                self.kernel_release = over.status.to_kernel.clone();
                self.generation = over.new;
                if let Outcome::CommittedButFailed(how) = over.outcome {
                    if let Some(watch) = over.watch {
                        watch.do_send(EndWatch);
                    }
                    let evidence = vec![how];
                    self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                    return self.heal(FailureCause::KernelDead, evidence, ctx);
                }
                match over.watch {
                    Some(watch) => {
                        watch.do_send(SetOwner(ctx.address().recipient()));
                        self.watch = Some(watch);
                    }
                    None => self.begin_watch(ctx),
                }
                self.enter(InstanceState::Running, None);
            }
            Outcome::RolledBack(_) => self.enter(InstanceState::Running, None),
            Outcome::OldFailed(how) => {
                let evidence = vec![how];
                self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                self.heal(FailureCause::KernelDead, evidence, ctx);
            }
            Outcome::OperatorActionNeeded(reason) => {
                self.rest(
                    Desired::OperatorAction,
                    InstanceState::OperatorActionNeeded,
                    Some(reason),
                );
            }
        }
    }
}

/// Goes on with a morph that an earlier daemon left. Sent right after the beginning.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ResumeMorph {
    /// What was planned, with the generations as the journal has them.
    pub plan: MorphPlan,
    /// How far it was.
    pub row: crate::journal::MorphRow,
}

impl Handler<ResumeMorph> for Instance {
    type Result = ();

    fn handle(&mut self, resume: ResumeMorph, ctx: &mut Self::Context) {
        let (services, own) = (self.services.clone(), ctx.address());
        if resume.row.committed {
            // The instance is the new generation already; the session still has the old one to end.
            self.row.morphs = self.row.morphs.saturating_sub(1);
        }
        let session = MorphSession::resume(services, own, resume.plan, resume.row);
        self.work = Work::Morphing(session);
        self.enter(
            InstanceState::Morphing,
            Some("finishing what was under way".to_owned()),
        );
    }
}

impl Handler<MorphControl> for Instance {
    type Result = Result<(), ApiError>;

    fn handle(&mut self, control: MorphControl, _: &mut Self::Context) -> Self::Result {
        let Work::Morphing(session) = &self.work else {
            let text = format!("{} has no morph under way", self.row.name);
            let error = ApiError::new(ErrorCode::WrongState, text)
                .hint("begin one with `kmorphctl morph prepare`");
            control.operation.fail(error.clone(), None);
            return Err(error);
        };
        let operation = control.operation;
        session.do_send(match control.kind {
            CommandKind::Validate => MorphCommand::Validate(operation),
            CommandKind::Commit { force } => MorphCommand::Commit { force, operation },
            CommandKind::Rollback => MorphCommand::Rollback {
                reason: "rolled back by request".to_owned(),
                operation: Some(operation),
            },
        });
        Ok(())
    }
}

impl Handler<SetPolicy> for Instance {
    type Result = ResponseActFuture<Self, Result<Policy, ApiError>>;

    fn handle(&mut self, SetPolicy(policy): SetPolicy, _: &mut Self::Context) -> Self::Result {
        if let Some((key, fault)) = policy.fault() {
            let error = ApiError::new(ErrorCode::InvalidRequest, format!("{key}: {fault}"));
            return Box::pin(actix::fut::ready(Err(error)));
        }
        let mut row = self.row.clone();
        row.policy = policy.clone();
        let journal = self.services.journal.clone();
        let work = async move {
            let change = Change::Instance(Box::new(row));
            crate::journal::record(&journal, vec![change]).await
        };
        Box::pin(work.into_actor(self).map(|written, act, _| {
            written.map_err(|e| crate::generation::journal_failure(&e))?;
            act.row.policy = policy.clone();
            if let (Some(watch), true) = (&act.watch, act.row.spec.monitor) {
                watch.do_send(Reconfigure(detector_config(&act.services, &policy)));
            }
            let text = format!(
                "policy: heartbeat timeout {} s, auto-heal {}, morph timeout {} s",
                policy.heartbeat_timeout_s, policy.auto_heal, policy.morph_timeout_s
            );
            act.say(EventKind::Policy, text);
            Ok(policy)
        }))
    }
}
