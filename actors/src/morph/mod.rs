//! The MorphSession actor: one morph, driven by its engine.

mod commands;
mod estimate;
mod outcome;
mod planning;
mod provider;
mod relay;
mod steps;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use crate::model::{
    Check as ApiCheck, Command, EventKind, Failure, FailureKind, MorphPhase, MorphRecord,
    OperationKind,
};
use actix::prelude::*;
use kmp_proto::fence::FenceOrder;
use kmp_proto::message::{Side, TransferMode, capability};
use kmp_proto::morph::{
    Action, Answer, CommitLimit, Config, Engine, Estimate, Event, Outcome, Phase, RollbackReason,
    Stage,
};
use slog::{Logger, info, o};

use crate::generation::Generations;
use crate::generation::release::Kept;
use crate::model::generation::AnyGeneration;
use crate::model::rows::MorphRow;
use crate::model::settings::MorphMode;
use crate::platform::Platform;
use crate::platform::clock;
use crate::platform::events::Draft;
use crate::platform::journal::{Change, Note, Propose};
use crate::platform::operations::Handle;
use crate::platform::transport::PeerKey;
use crate::platform::wall_clock;
use crate::platform::witness::{self, Machine, Step};
use crate::watch::{EndWatch, Watch, WatchEvent, WatchKind};
pub use commands::{GetMorph, MorphCommand, SourceFailed, Terminated};
pub use estimate::Downtimes;
use outcome::Times;
use planning::first_status;
pub use planning::{MorphPlan, Planned, plan, withdraw};
use provider::{PREFERENCE, passed_over};
use relay::Relay;

/// Timeout for a request that needs no I/O from the agent.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// A morph that an earlier daemon left, and the observed state of its sides.
#[derive(Clone, Debug)]
pub struct LeftMorph {
    /// The plan, with the generations from the journal.
    pub plan: MorphPlan,
    /// Its row, with the last recorded phase.
    pub row: MorphRow,
    /// The sides that no longer run.
    pub deaths: Deaths,
}

/// How the sides of a morph ended; `None` for a side that runs.
#[derive(Clone, Debug, Default)]
pub struct Deaths {
    /// The source.
    pub source: Option<String>,
    /// The target.
    pub target: Option<String>,
}

/// Reports to the instance.
#[derive(Message)]
#[rtype(result = "()")]
pub enum MorphNews {
    /// The source is about to be fenced: its end is not a failure.
    SourceLeft,
    /// The morph is over.
    Over(Box<MorphOver>),
    /// The actor has ended. It reported the outcome before, or it panicked.
    Gone,
}

/// The end of a morph.
pub struct MorphOver {
    /// The outcome.
    pub outcome: Outcome,
    /// Its last status.
    pub status: MorphRecord,
    /// The source generation.
    pub source: AnyGeneration,
    /// The target generation.
    pub target: AnyGeneration,
    /// The target's watch, if the target is now the instance.
    pub watch: Option<Addr<Watch>>,
}

/// The start of the target.
enum Start {
    /// Under way, with an order to fence the target if one arrived in the meantime.
    UnderWay(Option<FenceOrder>),
    /// Over.
    Over,
}

/// The owner of a morph.
#[derive(Clone)]
pub struct Owner {
    /// Receives the reports.
    pub news: Recipient<MorphNews>,
    /// Writes the instance's row.
    pub rows: Recipient<Propose>,
}

/// Services that a morph uses.
#[derive(Clone)]
pub struct Means {
    /// Journal, connections, events, configuration.
    pub platform: Platform,
    /// Spawns, fences and releases its sides.
    pub generations: Generations,
    /// Learned overheads of commits on this machine.
    pub downtimes: Rc<RefCell<Downtimes>>,
}

/// The actor.
pub struct MorphSession {
    means: Means,
    owner: Owner,
    log: Logger,
    plan: MorphPlan,
    engine: Engine,
    status: MorphRecord,
    watch: Option<Addr<Watch>>,
    /// The watch of the source generation; it belongs to the instance.
    source_watch: Option<Addr<Watch>>,
    timer: Option<SpawnHandle>,
    start: Start,
    operation: Option<Handle>,
    mode: TransferMode,
    relay: Option<Relay>,
    times: Times,
    /// Fenced sides that could not be released yet.
    kept: Vec<Kept>,
}

impl MorphSession {
    /// Starts a morph; `operation` ends when its goal is reached.
    pub fn begin(
        means: Means,
        owner: Owner,
        plan: MorphPlan,
        source_watch: Option<Addr<Watch>>,
        operation: Handle,
    ) -> Addr<Self> {
        let config = config(&means, &plan);
        let (source, target) = (plan.source.generation, plan.target.generation);
        let engine = Engine::new(config, source, target, clock::now());
        let status = first_status(&plan, operation.id());
        let mut session = Self::with(means, owner, plan, engine, status, Some(operation));
        session.source_watch = source_watch;
        session.start()
    }

    /// Resumes a morph that an earlier daemon left; `source_watch` watches the source generation if it runs.
    pub fn resume(
        means: Means,
        owner: Owner,
        left: LeftMorph,
        source_watch: Option<Addr<Watch>>,
    ) -> Addr<Self> {
        let LeftMorph { plan, row, deaths } = left;
        let (source, target) = (plan.source.generation, plan.target.generation);
        let mut engine = match row.commit_record() {
            Some(record) => Engine::resume_committed(record, clock::now()),
            None => Engine::resume_uncommitted(source, target),
        };
        // A side that is known to be dead needs no request.
        for (side, how) in [(Side::Source, deaths.source), (Side::Target, deaths.target)] {
            if let Some(how) = how {
                engine.handle(Event::Died(side, how), clock::now());
            }
        }
        let mut session = Self::with(means, owner, plan, engine, row.status, None);
        session.source_watch = source_watch;
        session.start()
    }

    fn with(
        means: Means,
        owner: Owner,
        plan: MorphPlan,
        engine: Engine,
        status: MorphRecord,
        operation: Option<Handle>,
    ) -> Self {
        let log = means
            .platform
            .log
            .new(o!("instance" => plan.instance.name.clone(),
            "generation" => plan.target.generation, "session" => plan.session));
        Self {
            means,
            owner,
            log,
            plan,
            engine,
            status,
            watch: None,
            source_watch: None,
            timer: None,
            start: Start::Over,
            operation,
            mode: TransferMode::ByReference,
            relay: None,
            times: Times::default(),
            kept: Vec::new(),
        }
    }

    fn key(&self, side: Side) -> PeerKey {
        let row = match side {
            Side::Source => &self.plan.source,
            Side::Target => &self.plan.target,
        };
        PeerKey {
            instance: row.instance.clone(),
            generation: row.generation,
        }
    }

    fn tell(&mut self, event: Event, ctx: &mut Context<Self>) {
        self.note(&event);
        let (from, name) = (self.engine.stage().as_str(), event.name());
        self.engine.handle(event, clock::now());
        self.show_step(from, name);
        self.run(ctx);
    }

    /// Reports a step to the test harness.
    fn show_step(&self, from: &'static str, event: &'static str) {
        witness::show(|| Step {
            machine: Machine::Morph,
            instance: self.plan.instance.name.clone(),
            from,
            event,
            to: self.engine.stage().as_str(),
            effects: Vec::new(),
        });
    }

    /// As [`Self::tell`], for a command whose operation waits for its end. The engine decides whether the moment is
    /// right: if so, `operation` waits; otherwise it is returned.
    fn request(
        &mut self,
        request: Event,
        operation: Option<Handle>,
        ctx: &mut Context<Self>,
    ) -> Result<(), (Option<Handle>, Stage)> {
        let under_way = self.operation.as_ref().and_then(Handle::snapshot);
        if under_way.is_some_and(|under_way| under_way.kind == OperationKind::MorphRollback) {
            // The morph ends with the operation under way.
            return Err((operation, self.engine.stage()));
        }
        let (from, name) = (self.engine.stage().as_str(), request.name());
        if let Answer::Refused { stage } = self.engine.handle(request, clock::now()) {
            return Err((operation, stage));
        }
        self.show_step(from, name);
        if let Some(operation) = operation
            && let Some(before) = self.operation.replace(operation)
        {
            let text = "rolled back by request";
            before.fail(Failure::new(FailureKind::WrongState, text), None);
        }
        self.run(ctx);
        Ok(())
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

    /// Updates the measured times and the serving side from an event.
    fn note(&mut self, event: &Event) {
        let now = Some(clock::now());
        match event {
            Event::Frozen(_) => self.times.frozen = now,
            Event::RoundApplied { .. } if self.times.frozen.is_some() => self.times.applied = now,
            Event::Activated(_) => self.times.activated = now,
            Event::RecordDurable(_) => self.times.recorded = now,
            Event::Serving => {
                self.times.serving = now;
                let name = &self.plan.instance.name;
                self.means
                    .generations
                    .resources
                    .ports
                    .aim(name, Some(&self.plan.target));
            }
            Event::SourceRunning => {
                let name = &self.plan.instance.name;
                self.means
                    .generations
                    .resources
                    .ports
                    .aim(name, Some(&self.plan.source));
            }
            _ => {}
        }
    }

    fn act(&mut self, action: Action, ctx: &mut Context<Self>) {
        crate::platform::fault::point("morph");
        crate::platform::fault::step(action.name());
        match action {
            Action::Phase(phase) => self.enter(phase),
            Action::Prepare(side) => self.prepare(side, ctx),
            Action::Negotiate(side) => self.negotiate(side, ctx),
            Action::Chosen(choice) => self.chosen(choice),
            Action::Round {
                provider,
                mode,
                number,
                last,
            } => {
                self.mode = mode;
                self.status.expires_at = None;
                self.status.mode = Some(mode.as_str().to_owned());
                self.status.rounds = number;
                self.round((provider, mode), number, last, ctx);
            }
            Action::Validate => self.validate(ctx),
            Action::Transferred => {
                self.status.expires_at = Some(wall_clock::rfc3339_in(self.plan.expiry));
                self.say("morph: prepared");
                self.succeed_operation();
            }
            Action::Committable(estimate) => self.committable(estimate, ctx),
            Action::CommitRefused(reason) => {
                let error = Failure::new(FailureKind::OverBudget, reason.to_string()).hint(
                    Command::CommitOverBudget {
                        instance: self.plan.instance.name.clone(),
                    },
                );
                self.fail_operation(error);
            }
            Action::Freeze => {
                self.times = Times {
                    freeze: Some(clock::now()),
                    without_overhead_us: self.times.without_overhead_us,
                    ..Times::default()
                };
                self.means
                    .generations
                    .resources
                    .ports
                    .aim(&self.plan.instance.name, None);
                self.freeze(ctx);
            }
            Action::Activate => self.activate(ctx),
            Action::WriteCommitRecord(order) => {
                if let Some(operation) = &self.operation {
                    operation.step("recording the commit");
                }
                self.write_commit_record(order, ctx);
            }
            Action::Serve(record) => self.serve(&record, ctx),
            Action::Retire => self.retire(ctx),
            Action::Fence(side, order) => {
                if side == Side::Source {
                    self.owner.news.do_send(MorphNews::SourceLeft);
                }
                self.fence(side, order, ctx);
            }
            Action::ResumeSource(target_fenced) => self.resume_source(&target_fenced, ctx),
            Action::Finished(outcome) => self.finished(outcome, ctx),
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.status.expires_at = None;
        if let Some(phase) = phase_of(phase) {
            self.status.phase = phase;
        }
        let name = phase.as_str().replace('_', " ");
        if let Some(operation) = &self.operation {
            operation.step(name.clone());
        }
        match self.engine.rollback_reason() {
            Some(reason) => {
                if let RollbackReason::Incompatible(why) = reason {
                    self.status.other_providers = passed_over(&why.passed_over);
                }
                let reason = reason.to_string();
                self.say(format!("morph: {name}: {reason}"));
                self.status.reason = Some(reason);
            }
            None => self.say(format!("morph: {name}")),
        }
        self.save();
    }

    fn say(&self, message: impl Into<String>) {
        let message = message.into();
        info!(self.log, "{}", &message);
        let name = &self.plan.instance.name;
        let draft = Draft::of(EventKind::Morph, name, self.plan.target.generation, message);
        self.means
            .platform
            .events
            .publish(draft.with(serde_json::json!({ "session": self.plan.session })));
    }

    fn row(&self) -> MorphRow {
        MorphRow {
            status: self.status.clone(),
            phase: self.engine.phase().as_str().to_owned(),
            committed: self.engine.owner() == Side::Target,
            kernel: self.plan.kernel.clone(),
            estimate_without_overhead_us: self.times.without_overhead_us,
        }
    }

    /// Writes the phase without waiting: the rows of the generations contain everything that a rollback before the
    /// commit record needs.
    fn save(&self) {
        let row = self.row();
        self.means
            .platform
            .journal
            .do_send(Note(Change::Morph(Box::new(row))));
    }

    fn committable(&mut self, estimate: Estimate, ctx: &mut Context<Self>) {
        let total = estimate.total();
        self.times.without_overhead_us = u64::try_from(estimate.measured.as_micros()).ok();
        self.status.estimated_downtime_us =
            Some(u64::try_from(total.as_micros()).unwrap_or(u64::MAX));
        self.say(format!("morph: validated, estimated downtime {total:.1?}"));
        if self.plan.auto_commit {
            let limit = match self.plan.force {
                true => CommitLimit::None,
                false => CommitLimit::Planned,
            };
            let or_roll_back = true;
            return self.tell(
                Event::CommitRequested {
                    limit,
                    or_roll_back,
                },
                ctx,
            );
        }
        self.status.expires_at = Some(wall_clock::rfc3339_in(self.plan.expiry));
        self.succeed_operation();
    }
}

/// Returns whether both sides run on one kernel and may map the same memory.
fn by_reference(means: &Means) -> bool {
    means.generations.machine.backend.passes_sockets()
        && means.platform.settings.borrow().morph_mode == MorphMode::Auto
}

fn config(means: &Means, plan: &MorphPlan) -> Config {
    let (modes, kinds) = if by_reference(means) {
        let kinds = capability::MEMORY | capability::LISTENERS | capability::CONNECTIONS;
        (capability::BY_REFERENCE, kinds)
    } else {
        (capability::ROUNDS, capability::MEMORY)
    };
    Config {
        phase_timeout: plan.phase_timeout,
        expiry: plan.expiry,
        downtime_budget: plan.budget,
        step_overhead: means.downtimes.borrow().overhead(mode_of(means)),
        preference: PREFERENCE,
        required_kinds: kinds,
        possible_modes: modes,
        validate_on_request: !plan.auto_validate,
    }
}

/// Returns the transfer mode of this daemon's morphs; the negotiation agrees on no other.
fn mode_of(means: &Means) -> TransferMode {
    match by_reference(means) {
        true => TransferMode::ByReference,
        false => TransferMode::Rounds,
    }
}

/// Returns the phase to show. The outcome shows how a morph ended.
fn phase_of(phase: Phase) -> Option<MorphPhase> {
    Some(match phase {
        Phase::Preparing => MorphPhase::Preparing,
        Phase::Negotiating => MorphPhase::Negotiating,
        Phase::Transferring => MorphPhase::Transferring,
        Phase::Validating => MorphPhase::Validating,
        Phase::Committable => MorphPhase::Committable,
        Phase::Committing => MorphPhase::Committing,
        Phase::RollingBack => MorphPhase::RollingBack,
        Phase::Done => return None,
    })
}

impl Actor for MorphSession {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.show_step("–", "begun");
        if self.engine.phase() == Phase::Preparing {
            self.say(format!(
                "morph: from {} to {}",
                self.status.from_kernel, self.status.to_kernel
            ));
            self.save();
            self.spawn_target(ctx);
        } else if self.plan.target.placement().is_some() && self.engine.owner() == Side::Target {
            self.watch_target(ctx);
        }
        if let Some(operation) = &self.operation {
            let cancelled = operation.cancelled();
            ctx.spawn(cancelled.into_actor(self).map(|(), act, ctx| {
                act.tell(
                    Event::RollbackRequested("cancelled by request".to_owned()),
                    ctx,
                );
            }));
        }
        self.run(ctx);
    }
}

impl Drop for MorphSession {
    /// Also runs after a panic: the owner knows whether the outcome was reported before.
    fn drop(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.do_send(EndWatch);
        }
        self.owner.news.do_send(MorphNews::Gone);
    }
}

impl Handler<WatchEvent> for MorphSession {
    type Result = ();

    fn handle(&mut self, event: WatchEvent, ctx: &mut Self::Context) {
        match event.kind {
            WatchKind::Healthy(release) => {
                if !release.is_empty() {
                    self.status.to_kernel = release;
                }
                self.tell(Event::TargetHealthy, ctx);
            }
            WatchKind::Booted(boot_id) => {
                self.plan.target.boot_id = Some(boot_id);
                let generation = self.plan.target.generation;
                let booted = Change::Booted(self.plan.target.instance.clone(), generation, boot_id);
                self.means.platform.journal.do_send(Note(booted));
            }
            WatchKind::Failed(verdict) => {
                self.tell(Event::Died(Side::Target, verdict.evidence.join("; ")), ctx);
            }
            // Without its watch, the target kernel is unmonitored: the morph does not switch to it.
            WatchKind::Gone => {
                let text = "its watch ended by a fault in kmorphd".to_owned();
                self.tell(Event::Died(Side::Target, text), ctx);
            }
            _ => {}
        }
    }
}

/// Returns the checks of a report, for the API.
fn api_checks(checks: &[kmp_proto::message::Check]) -> Vec<ApiCheck> {
    checks
        .iter()
        .map(|c| ApiCheck {
            name: c.name.clone(),
            passed: c.result == kmp_proto::message::CheckResult::Passed,
            duration_us: u64::from(c.duration_us),
            detail: c.detail.clone(),
        })
        .collect()
}
