//! The RecoveryJob actor: one recovery, driven by its engine.

mod ended_later;

pub(crate) use ended_later::ended_later;

use crate::model::{
    EventKind, Failure, FailureKind, RecoveryOutcome, RecoveryRecord, VmcorePolicy, VmcoreRecord,
};
use actix::prelude::*;
use kmorph_launch::StartMode;
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use kmp_proto::message::{
    FailureCause, Message as Kmp, RecoverCompleteFixed, RecoverFixed, RecoverNotice,
    RecoverReclaim, RecoveryOutcome as WireOutcome,
};
use kmp_proto::recovery::{Action, Afterwards, CapturePolicy, Engine, Event, Outcome};
use kmp_proto::time::Instant;
use slog::{Logger, info, o, warn};

use crate::capture::{Capture, CaptureError, Captures, Dumped, KernelLog};
use crate::generation::machine::Machine;
use crate::generation::{Generations, NotFenced};
use crate::model::generation::{AnyGeneration, Generation, Placed};
use crate::model::repeated::Repeated;
use crate::model::rows::{GenerationRow, InstanceRow, RecoveryRow};
use crate::platform::Platform;
use crate::platform::clock;
use crate::platform::events::Draft;
use crate::platform::fleet::{Abandon, Fleet, FleetNews, GetSurvivors, Recovered};
use crate::platform::journal::{Change, JournalError, Proposal, Propose, Record, record};
use crate::platform::transport::Broadcast;
use crate::platform::wall_clock;
use crate::platform::witness::{self, Step};
use crate::watch::CONSOLE_SAID;

/// The parameters of a recovery.
pub struct Plan {
    /// The instance.
    pub instance: InstanceRow,
    /// The generation that failed.
    pub failed: AnyGeneration,
    /// The action after the release.
    pub afterwards: Afterwards,
    /// The verdict.
    pub cause: FailureCause,
    /// The evidence.
    pub evidence: Vec<String>,
    /// When the verdict was reached.
    pub verdict_at: Instant,
}

/// Services that a recovery uses.
#[derive(Clone)]
pub struct Means {
    /// Journal, connections, events, configuration.
    pub platform: Platform,
    /// Fences the failed generation and spawns its successor.
    pub generations: Generations,
    /// Captures the failed generation's memory.
    pub captures: Captures,
}

/// The actor.
pub struct RecoveryJob {
    means: Means,
    fleet: Fleet,
    owner: Owner,
    log: Logger,
    plan: Plan,
    engine: Engine,
    record: RecoveryRecord,
    /// Fences that could not be confirmed.
    unconfirmed: Repeated,
    timer: Option<SpawnHandle>,
    /// A successor that did not start but may still run.
    left: Option<Box<AnyGeneration>>,
}

/// Reports to the instance.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub enum RecoveryNews {
    /// A successor was started; the instance watches it from now on.
    Successor(Box<Generation<Placed>>),
    /// The recovery is over.
    Over {
        /// Its record.
        record: Box<RecoveryRecord>,
        /// The failed generation in its present phase: fenced, if the fence was confirmed.
        failed: Box<AnyGeneration>,
        /// A successor that did not start but may still run.
        left: Option<Box<AnyGeneration>>,
    },
    /// The actor has ended. It reported the outcome before, or it panicked.
    Gone,
}

/// The owner of a recovery.
#[derive(Clone)]
pub struct Owner {
    /// Receives the reports.
    pub news: Recipient<RecoveryNews>,
    /// Writes the instance's row.
    pub rows: Recipient<Propose>,
}

/// The instance reports the state of the successor.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub enum SuccessorNews {
    /// The successor is healthy.
    Healthy(u64),
    /// The successor failed before it was healthy.
    Failed(String),
}

/// Returns the capture policy for this failure. If only the program failed, the kernel's memory has no evidence. A
/// generation that never ran, or that ran before the host rebooted, has no memory left.
fn capture_policy(machine: &Machine, plan: &Plan) -> CapturePolicy {
    let placement = plan.failed.placement();
    let ran = placement.is_some_and(|placed| placed.host_boot_id == machine.host_boot_id);
    let captures = machine.backend.kind().captures_memory();
    if !ran || !captures || plan.cause == FailureCause::WorkloadFailed {
        return CapturePolicy::Off;
    }
    match plan.instance.policy.vmcore {
        VmcorePolicy::Off => CapturePolicy::Off,
        VmcorePolicy::On => CapturePolicy::On,
        VmcorePolicy::Required => CapturePolicy::Required,
    }
}

impl RecoveryJob {
    /// Starts a recovery.
    pub fn begin(means: Means, fleet: Fleet, owner: Owner, plan: Plan) -> Addr<Self> {
        let id = means
            .generations
            .resources
            .numbers
            .borrow_mut()
            .next_recovery();
        let (name, generation) = (plan.instance.name.clone(), plan.failed.generation);
        let record = RecoveryRecord {
            id,
            instance: name.clone(),
            failed_generation: generation,
            new_generation: None,
            cause: plan.cause.as_str().to_owned(),
            evidence: plan.evidence.clone(),
            fence: None,
            vmcore: None,
            outcome: RecoveryOutcome::Running,
            reason: None,
            started_at: wall_clock::now_rfc3339(),
            ended_at: None,
            fence_ms: None,
            total_ms: None,
        };
        let log = means
            .platform
            .log
            .new(o!("instance" => name, "generation" => generation, "recovery" => id));
        let capture = capture_policy(&means.generations.machine, &plan);
        let engine = match plan.failed.certificate().cloned() {
            Some(certificate) => Engine::resume_fenced(certificate, capture, plan.afterwards),
            None => Engine::new(generation, capture, plan.afterwards),
        };
        Self {
            means,
            fleet,
            owner,
            log,
            plan,
            engine,
            record,
            unconfirmed: Repeated::default(),
            timer: None,
            left: None,
        }
        .start()
    }

    fn tell(&mut self, event: Event, ctx: &mut Context<Self>) {
        let (from, name) = (self.engine.phase(), event.name());
        self.engine.handle(event, clock::now());
        self.show_step(from, name);
        self.run(ctx);
    }

    /// Reports a step to the test harness.
    fn show_step(&self, from: &'static str, event: &'static str) {
        witness::show(|| Step {
            machine: witness::Machine::Recovery,
            instance: self.plan.instance.name.clone(),
            from,
            event,
            to: self.engine.phase(),
            effects: Vec::new(),
        });
    }

    fn run(&mut self, ctx: &mut Context<Self>) {
        while let Some(action) = self.engine.poll_action() {
            self.act(action, ctx);
        }
        if let Some(timer) = self.timer.take() {
            ctx.cancel_future(timer);
        }
        if let Some(due) = self.engine.poll_timeout() {
            let wait = due - clock::now();
            self.timer = Some(ctx.run_later(wait, |act, ctx| act.tell(Event::Tick, ctx)));
        }
    }

    fn act(&mut self, action: Action, ctx: &mut Context<Self>) {
        crate::platform::fault::point("recovery");
        crate::platform::fault::step(action.name());
        match action {
            Action::NoticeSurvivors => self.notice(),
            Action::Fence(order) => self.fence(order, ctx),
            Action::Capture(_) => self.capture(ctx),
            Action::Reclaim(certificate) => self.reclaim(certificate, ctx),
            Action::Respawn(_) => self.respawn(ctx),
            Action::Complete { new_generation } => self.complete(new_generation),
            Action::Finished(Outcome::Recovered) => {
                self.end(RecoveryOutcome::Recovered, None, ctx);
            }
            Action::Finished(Outcome::SuccessorFailed(reason)) => {
                self.end(RecoveryOutcome::Failed, Some(reason), ctx);
            }
            Action::Finished(Outcome::Quarantined) => {
                self.end(RecoveryOutcome::Quarantined, None, ctx);
            }
            Action::Finished(Outcome::OperatorActionNeeded(reason)) => {
                self.end(RecoveryOutcome::OperatorActionNeeded, Some(reason), ctx);
            }
        }
    }

    fn draft(&self, message: String) -> Draft {
        info!(self.log, "{}", &message);
        let (name, generation) = (&self.plan.instance.name, self.plan.failed.generation);
        Draft::of(EventKind::Recovery, name, generation, message)
    }

    fn say(&self, message: impl Into<String>) {
        let draft = self.draft(message.into());
        self.means.platform.events.publish(draft);
    }

    /// Records the phase, for the history and for the next daemon.
    fn save(&self) {
        let change = self.row_change();
        self.means.platform.journal.do_send(Record(vec![change]));
        self.show();
    }

    fn show(&self) {
        let record = Box::new(self.record.clone());
        self.fleet.news.do_send(FleetNews::Recovery(record));
    }

    fn fixed(&self) -> RecoverFixed {
        RecoverFixed {
            recovery: self.record.id,
            failed_generation: self.plan.failed.generation,
            cause: self.plan.cause,
        }
    }

    fn broadcast(&self, message: Kmp) {
        let except = self.plan.instance.name.clone();
        self.means
            .platform
            .transport
            .address()
            .do_send(Broadcast { except, message });
    }

    fn notice(&self) {
        // The instance's console output is private.
        let evidence = self.plan.evidence.iter();
        let told: Vec<&str> = evidence
            .map(String::as_str)
            .filter(|line| !line.starts_with(CONSOLE_SAID))
            .collect();
        self.broadcast(Kmp::RecoverPrepare(RecoverNotice {
            fixed: self.fixed(),
            instance: self.plan.instance.name.clone(),
            text: told.join("; "),
        }));
    }

    fn fence(&mut self, order: FenceOrder, ctx: &mut Context<Self>) {
        let (generations, failed) = (self.means.generations.clone(), self.plan.failed.clone());
        let change = self.row_change();
        let wanted =
            capture_policy(&self.means.generations.machine, &self.plan) != CapturePolicy::Off;
        let work = async move {
            // The recovery is in the journal before its first side effect.
            let written = record(&generations.platform.journal, vec![change]).await;
            match written {
                Ok(()) => {
                    if wanted {
                        generations.keep_memory(&failed).await;
                        generations.save_registers(&failed).await;
                    }
                    generations.fence(failed, order).await
                }
                Err(error) => Err(NotFenced {
                    generation: failed,
                    reason: error.to_string(),
                }),
            }
        };
        ctx.spawn(work.into_actor(self).map(|result, act, ctx| match result {
            Ok(fenced) => {
                let certificate = fenced.certificate().clone();
                if let Some(over) = act.unconfirmed.end(clock::now()) {
                    info!(act.log, "the fence is confirmed now"; "failed" => %over);
                }
                let since = clock::now() - act.plan.verdict_at;
                act.record.fence_ms = Some(since.as_secs_f64() * 1000.0);
                act.record.fence = Some(certificate.confirmation().as_str().to_owned());
                let proof = fenced.proof().map(|proof| format!(" ({proof})"));
                act.say(format!(
                    "fenced: {}{}",
                    certificate.confirmation().as_str(),
                    proof.unwrap_or_default()
                ));
                act.plan.failed = fenced.into();
                act.tell(Event::Fenced(certificate), ctx);
            }
            Err(NotFenced { generation, reason }) => {
                act.plan.failed = generation;
                if act.unconfirmed.failed(clock::now()) {
                    warn!(act.log, "the fence is not confirmed"; "reason" => &reason);
                }
                act.tell(Event::FenceUnconfirmed(reason), ctx);
            }
        }));
    }

    fn capture(&mut self, ctx: &mut Context<Self>) {
        self.say("capturing its memory");
        self.record.vmcore = Some(VmcoreRecord::default());
        self.save();
        let (captures, row) = (self.means.captures.clone(), self.plan.failed.clone());
        let others = GetSurvivors(row.instance.clone());
        let ask = self.fleet.survivors.send(others);
        let begin = async move {
            let survivors = ask.await.unwrap_or_default();
            captures.begin(&row, survivors).await
        };
        ctx.spawn(begin.into_actor(self).map(|begun, act, ctx| match begun {
            Ok(capture) => act.follow(capture, ctx),
            Err(error) => act.captured(Err(error), ctx),
        }));
    }

    fn follow(&mut self, capture: Capture, ctx: &mut Context<Self>) {
        let Capture {
            log, mut dumping, ..
        } = capture;
        ctx.spawn(log.into_actor(self).map(|log, act, _| {
            // No message: a complete vmcore exists already, or there will be none.
            if let Ok(log) = log {
                act.log_read(log);
            }
        }));
        let dumped = async move { dumping.done().await }.into_actor(self);
        ctx.spawn(dumped.map(|dumped, act, ctx| act.captured(dumped, ctx)));
    }

    /// Returns milliseconds since the verdict.
    fn since_verdict(&self) -> f64 {
        (clock::now() - self.plan.verdict_at).as_secs_f64() * 1000.0
    }

    fn log_read(&mut self, log: Result<KernelLog, String>) {
        match log {
            Ok(log) => {
                let path = log.path.map(|path| path.display().to_string());
                let end = log.panic.as_deref().unwrap_or("it says of no panic");
                let place = path.as_deref().unwrap_or_default();
                let draft = self.draft(format!("its kernel's log: {end} ({place})"));
                let tail = serde_json::json!({ "kernel_log_tail": log.tail });
                self.means.platform.events.publish(draft.with(tail));
                let since = self.since_verdict();
                let record = self.record.vmcore.get_or_insert_default();
                record.log_ms = Some(since);
                record.log_path = path;
                record.panic = log.panic;
            }
            Err(reason) => {
                self.say(format!("its kernel's log could not be read: {reason}"));
                let record = self.record.vmcore.get_or_insert_default();
                record.log_error = Some(reason);
            }
        }
        self.save();
    }

    fn captured(&mut self, dumped: Result<Dumped, CaptureError>, ctx: &mut Context<Self>) {
        let since = self.since_verdict();
        let record = self.record.vmcore.get_or_insert_default();
        match dumped {
            Ok(dumped) => {
                let path = dumped.path.display().to_string();
                record.path = Some(path.clone());
                record.bytes = Some(dumped.bytes);
                record.captured_ms = Some(since);
                record.not_filtered = dumped.not_filtered;
                record.read_by = dumped.read_by;
                self.say(format!("captured: {path}"));
                self.tell(Event::Captured, ctx);
            }
            Err(error) => {
                let reason = format!("no vmcore: {error}");
                record.error = Some(error.to_string());
                warn!(self.log, "{}", &reason);
                self.say(reason.clone());
                self.tell(Event::CaptureFailed(reason), ctx);
            }
        }
    }

    fn reclaim(&mut self, certificate: FenceCertificate, ctx: &mut Context<Self>) {
        self.broadcast(Kmp::RecoverReclaim(RecoverReclaim {
            fixed: self.fixed(),
            instance: self.plan.instance.name.clone(),
            fence: certificate.claim(),
        }));
        let (generations, failed) = (self.means.generations.clone(), self.plan.failed.clone());
        let work = async move {
            // The generation is already fenced, so this call only returns the certificate.
            let order = FenceOrder::new(failed.generation);
            let fenced = generations.fence(failed, order).await;
            let fenced = fenced.map_err(|not_fenced| not_fenced.reason)?;
            generations.release(fenced).await
        };
        ctx.spawn(work.into_actor(self).map(|result, act, ctx| {
            if let Err(error) = result {
                warn!(act.log, "the release was not recorded"; "error" => error);
            }
            act.tell(Event::Released, ctx);
        }));
    }

    fn respawn(&mut self, ctx: &mut Context<Self>) {
        let (generations, instance) = (self.means.generations.clone(), self.plan.instance.clone());
        let failed = self.plan.failed.generation;
        let rows = self.owner.rows.clone();
        // The next daemon may adopt the successor and end this entry, so the journal must contain everything known so
        // far.
        let so_far = self.row_change();
        let work = async move {
            let spec = &instance.spec;
            let ports = generations
                .resources
                .ports
                .wait(&instance.name, failed)
                .await;
            ports.map_err(|missing| (Failure::new(FailureKind::Unavailable, missing), None))?;
            let write = |row: GenerationRow| {
                let propose = Propose {
                    proposal: Proposal::Succeeded {
                        generation: row.generation,
                    },
                    with: vec![Change::Generation(Box::new(row)), so_far],
                };
                async { rows.send(propose).await.unwrap_or(Err(JournalError::Gone)) }
            };
            let row = generations
                .intend(
                    &instance.name,
                    &spec.kernel,
                    spec.cpus,
                    spec.memory_bytes,
                    write,
                )
                .await
                .map_err(|error| (error, None))?;
            let intended = Box::new(row.clone().into());
            let spawned = generations
                .spawn(row, &instance, StartMode::Fresh, None)
                .await;
            spawned.map_err(|error| (error, Some(intended)))
        };
        ctx.spawn(work.into_actor(self).map(|result, act, ctx| match result {
            Ok(row) => {
                act.record.new_generation = Some(row.generation);
                act.say(format!("successor: generation {}", row.generation));
                act.owner
                    .news
                    .do_send(RecoveryNews::Successor(Box::new(row)));
                act.tell(Event::SuccessorStarted, ctx);
            }
            // The failed start may still run: another successor would be a second owner.
            Err((error, intended)) if error.kind == FailureKind::OperatorActionNeeded => {
                act.left = intended;
                act.tell(Event::SuccessorRemains(error.message), ctx);
            }
            Err((error, _)) => act.tell(Event::NotStarted(error.message), ctx),
        }));
    }

    /// Reports the outcome to the survivors; `new_generation` is 0 if there is no successor.
    fn complete(&self, new_generation: u64) {
        let outcome = match new_generation {
            0 => WireOutcome::Reclaimed,
            _ => WireOutcome::Recovered,
        };
        let fixed = RecoverCompleteFixed {
            recovery: self.record.id,
            failed_generation: self.plan.failed.generation,
            new_generation,
            outcome,
            part: 0,
            flags: 0,
        };
        let instance = self.plan.instance.name.clone();
        let recovered = Recovered { fixed, instance };
        self.fleet.news.do_send(FleetNews::Recovered(recovered));
    }

    fn row_change(&self) -> Change {
        let over = self.record.outcome != RecoveryOutcome::Running;
        let phase = if over { "done" } else { self.engine.phase() };
        Change::Recovery(Box::new(RecoveryRow {
            record: self.record.clone(),
            phase: phase.to_owned(),
        }))
    }

    fn end(&mut self, outcome: RecoveryOutcome, reason: Option<String>, ctx: &mut Context<Self>) {
        if let Some(over) = self.unconfirmed.end(clock::now()) {
            warn!(self.log, "the fence is not tried any more"; "failed" => %over);
        }
        self.record.outcome = outcome;
        self.record.reason = reason;
        self.record.ended_at = Some(wall_clock::now_rfc3339());
        let total = clock::now() - self.plan.verdict_at;
        self.record.total_ms = Some(total.as_secs_f64() * 1000.0);
        let said = match outcome {
            RecoveryOutcome::Recovered => format!("recovered in {total:.1?}"),
            RecoveryOutcome::Quarantined => "fenced and left ended".to_owned(),
            _ => format!(
                "not recovered: {}",
                self.record.reason.as_deref().unwrap_or("unknown")
            ),
        };
        self.say(said);
        self.save();
        self.owner.news.do_send(RecoveryNews::Over {
            record: Box::new(self.record.clone()),
            failed: Box::new(self.plan.failed.clone()),
            left: self.left.take(),
        });
        ctx.stop();
    }
}

impl Actor for RecoveryJob {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.show_step("–", "begun");
        self.show();
        // The instance logs the reason.
        let (id, cause) = (self.record.id, &self.record.cause);
        self.say(format!("recovery {id} begins: {cause}"));
        self.run(ctx);
    }
}

impl Drop for RecoveryJob {
    /// Also runs after a panic: the owner knows whether the outcome was reported before.
    fn drop(&mut self) {
        self.owner.news.do_send(RecoveryNews::Gone);
    }
}

impl Handler<Abandon> for RecoveryJob {
    type Result = ();

    fn handle(&mut self, _: Abandon, ctx: &mut Self::Context) {
        ctx.stop();
    }
}

impl Handler<SuccessorNews> for RecoveryJob {
    type Result = ();

    fn handle(&mut self, news: SuccessorNews, ctx: &mut Self::Context) {
        match news {
            SuccessorNews::Healthy(generation) => {
                self.tell(Event::SuccessorHealthy { generation }, ctx);
            }
            SuccessorNews::Failed(reason) => self.tell(Event::SuccessorFailed(reason), ctx),
        }
    }
}
