//! The Instance actor: one kernel instance, its state, its policy, what is under way.
//!
//! ```text
//!  Starting ─▶ Running ◀─▶ Unresponsive ─verdict─▶ Failed ─▶ Recovering ─▶ Starting …
//!                │ ▲                                  │           └─▶ Quarantined | OperatorAction
//!                ▼ │                                  └ auto-heal off: stays, until `recover`
//!             Morphing                     any ─▶ Terminating ─▶ gone
//! ```
//!
//! Invariant: at most one of spawn, recovery, morph, capture and termination is under way.

mod capturing;
mod healing;
mod morphing;
mod policy;
mod ports;
mod requests;
mod spawning;
mod status;
mod termination;
mod workload;

use std::time::Duration;

use actix::prelude::*;
use kmorph_control_api::{EventKind, InstanceState, StuckCpuPolicy};
use kmp_proto::detector::{Config, Verdict};
use kmp_proto::message::{FailureCause, Health, HealthStatus};
use kmp_proto::recovery::RestartPolicy;
use slog::{Logger, info, o};

pub use capturing::{CaptureVmcore, ProvokePanic};
pub use healing::{RecoveryGranted, RecoveryOver, Successor, WorkerGone};
pub use morphing::{MorphOver, OldLeft};
pub use policy::{ApplyPolicy, GetPolicy};
pub(crate) use requests::ASKED_FOR;
pub use requests::{
    CommandKind, GetHealth, GetHeartbeat, GetMorphStatus, GetStatus, GetSummary, Morph,
    MorphControl, PingInstance, PlanMorph, Recover, Terminate,
};

use crate::clock;
use crate::events::Draft;
use crate::journal::{Change, Desired, GenerationRow, InstanceRow, Note, Record};
use crate::morph::{LeftMorph, MorphSession};
use crate::operations::Handle;
use crate::recovery::{Plan, RecoveryJob, SuccessorNews};
use crate::services::Services;
use crate::supervisor::Supervisor;
use crate::vmcore;
use crate::wall_clock;
use crate::watch::{EndWatch, Watch, WatchEvent, WatchKind};

/// How the detector of an instance's generations is configured: by its policy, and by whether it is monitored.
pub fn detector_config(services: &Services, instance: &InstanceRow) -> Config {
    let policy = &instance.policy;
    let timeout =
        Duration::try_from_secs_f64(policy.heartbeat_timeout_s).unwrap_or(Duration::from_secs(60));
    let mut config = Config::new(timeout, services.settings.borrow().start_timeout);
    config.stuck_cpu_fails = policy.stuck_cpu == StuckCpuPolicy::Failed;
    if !instance.spec.monitor {
        // Exit events are still seen, and its start; silence is not judged for a year.
        config.timeout = UNMONITORED_TIMEOUT;
    }
    config
}

/// How an instance comes into the daemon's care.
pub enum Beginning {
    /// It was just spawned; whoever asked waits.
    Spawned(Handle),
    /// It was found running after a restart of the daemon.
    Adopted,
    /// A morph was under way when the last daemon ended.
    Morphing(Box<LeftMorph>),
    /// It rests.
    Resting {
        /// Nothing of it runs.
        gone: bool,
    },
    /// The daemon ended while it was terminating it.
    Terminating,
    /// It failed while no daemon watched, or a recovery was under way.
    NeedsRecovery {
        /// What was found.
        evidence: Vec<String>,
        /// The verdict of the recovery that was under way, if there was one.
        cause: FailureCause,
        /// Whether policy still has a say.
        decided: Decided,
    },
}

/// What was decided about a failed instance before its daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decided {
    /// Nothing: its policy decides.
    Nothing,
    /// A successor is started, also where auto-heal is off.
    Successor,
    /// It is fenced, and rests.
    Quarantine,
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
    /// By its own figures it is overloaded: the evidence.
    overload: Option<String>,
    kernel_release: String,
    /// Its wanted end, before it begins.
    ending: Option<Ending>,
    /// Why the last successor failed.
    successor_cause: Option<FailureCause>,
    /// Nothing of its last generation runs.
    gone: bool,
    /// Running out, it has the ports refuse.
    port_hold: Option<SpawnHandle>,
}

/// What is under way.
enum Work {
    Nothing,
    /// A recovery that an operator asked for is being written down, in place of this.
    Asked(Desired),
    Waiting(SpawnHandle),
    Queued(Box<Plan>),
    Recovering(Addr<RecoveryJob>),
    Morphing(Addr<MorphSession>),
    Capturing {
        /// It ended meanwhile: what follows when its memory has been read.
        died: Option<Verdict>,
    },
    Terminating,
}

/// What a termination waits for.
enum Ending {
    /// That the wish is in the journal: only then is it granted.
    Recorded,
    /// That the recovery or morph under way has ended.
    After(Terminate),
}

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
            overload: None,
            kernel_release,
            ending: None,
            successor_cause: None,
            gone: false,
            port_hold: None,
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
        let config = detector_config(&self.services, &self.row);
        self.begin_watch_with(config, ctx);
    }

    fn begin_watch_of_adopted(&mut self, ctx: &mut Context<Self>) {
        let age = Duration::from_secs(wall_clock::seconds_since(&self.generation.spawned_at));
        let config = detector_config(&self.services, &self.row).already_runs_for(age);
        self.begin_watch_with(config, ctx);
    }

    fn begin_watch_with(&mut self, config: Config, ctx: &mut Context<Self>) {
        let Some(placement) = self.generation.placement.clone() else {
            return;
        };
        let owner = ctx.address().recipient();
        (self.health, self.overload) = (None, None);
        self.watch = Some(Watch::begin(
            self.services.clone(),
            placement,
            self.generation.boot_id,
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
        self.gone = false;
        if !matches!(self.work, Work::Morphing(_)) {
            self.services.aim(&self.row.name, Some(&self.generation));
        }
        if let Work::Recovering(job) = &self.work {
            job.do_send(SuccessorNews::Healthy(self.generation.generation));
            return;
        }
        if !matches!(self.work, Work::Morphing(_) | Work::Terminating) {
            self.enter_running();
        }
        if let Some(operation) = self.operation.take() {
            let id = self.row.name.clone();
            operation.succeed(Some(serde_json::json!({ "name": id, "state": "running" })));
        }
    }

    fn rest(&mut self, desired: Desired, state: InstanceState, reason: Option<String>) {
        self.row.desired = desired;
        self.row.reason = reason.clone();
        self.enter(state, reason);
        self.save();
        if state == InstanceState::Quarantined {
            self.close_unserved_ports();
        }
    }
}

/// Timeout of an instance that was spawned with `--monitor=false`.
const UNMONITORED_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

impl Actor for Instance {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.regain_ports(ctx);
        match self.beginning.take() {
            Some(Beginning::Spawned(operation)) => {
                operation.step("waiting for the first heartbeat");
                self.operation = Some(operation);
                self.say(EventKind::InstanceState, "spawned");
                self.begin_watch(ctx);
            }
            Some(Beginning::Adopted) => {
                self.say(EventKind::InstanceState, "adopted");
                vmcore::take_back_left(&self.services, &self.generation);
                self.begin_watch_of_adopted(ctx);
            }
            Some(Beginning::Morphing(left)) => {
                self.say(EventKind::InstanceState, "adopted in the middle of a morph");
                vmcore::take_back_left(&self.services, &self.generation);
                self.resume_morph(*left, ctx);
            }
            Some(Beginning::Resting { gone }) => {
                let state = match self.row.desired {
                    Desired::OperatorAction => InstanceState::OperatorActionNeeded,
                    Desired::Unhealed => InstanceState::Failed,
                    _ => InstanceState::Quarantined,
                };
                self.state = state;
                self.reason = self.row.reason.clone();
                self.gone = gone;
                self.close_unserved_ports();
            }
            None => {}
            Some(Beginning::Terminating) => self.finish_termination(ctx),
            Some(Beginning::NeedsRecovery {
                evidence,
                cause,
                decided,
            }) => {
                self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                if decided == Decided::Nothing {
                    return self.heal(cause, evidence, ctx);
                }
                self.hold_ports(ctx);
                let respawn = decided == Decided::Successor;
                self.recover_after(Duration::ZERO, respawn, cause, evidence, ctx);
            }
        }
    }
}

impl Handler<WatchEvent> for Instance {
    type Result = ();

    fn handle(&mut self, event: WatchEvent, ctx: &mut Self::Context) {
        let stale = event.generation != self.generation.generation;
        if stale {
            return;
        }
        match event.kind {
            WatchKind::Healthy(release) => self.answered(release, ctx),
            WatchKind::Booted(boot_id) => {
                self.generation.boot_id = Some(boot_id);
                let (name, generation) = (self.row.name.clone(), self.generation.generation);
                let booted = Change::Booted(name, generation, boot_id);
                self.services.journal.do_send(Note(booted));
            }
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
                    self.enter_running();
                }
            }
            WatchKind::Congested => {
                self.say(
                    EventKind::Detector,
                    "transport congested: its channel takes no probes",
                );
            }
            WatchKind::Health(status) => {
                self.health_said(status);
                self.check_spawn(ctx);
            }
            WatchKind::Overload(evidence) => self.load_changed(evidence),
            WatchKind::Failed(verdict) => {
                self.gone = verdict.ended;
                self.failed(verdict, ctx);
            }
            WatchKind::Gone => self.start_over("watch", ctx),
        }
    }
}

impl Instance {
    fn health_said(&mut self, status: HealthStatus) {
        self.note_restarts(&status);
        self.health = Some(status);
        self.judge_health();
    }

    /// Shown, and never a reason to fence or to recover.
    fn load_changed(&mut self, evidence: Option<String>) {
        let text = match &evidence {
            Some(evidence) => format!("{OVERLOADED}: {evidence}"),
            None => "not overloaded any more".to_owned(),
        };
        self.say(EventKind::Detector, text);
        self.overload = evidence;
        self.judge_health();
    }

    fn judge_health(&mut self) {
        let serves = matches!(self.state, InstanceState::Running | InstanceState::Degraded);
        if serves && matches!(self.work, Work::Nothing) {
            self.enter_running();
        }
    }

    /// It answers: running, or degraded by what its agent has said last or by its load.
    fn enter_running(&mut self) {
        let unwell = |s: &&HealthStatus| s.fixed.health != Health::Healthy;
        let said = self.health.as_ref().filter(unwell);
        let load = self.overload.as_ref();
        let reason = said
            .map(|said| said.text.clone())
            .or_else(|| load.map(|evidence| format!("{OVERLOADED}: {evidence}")));
        match reason {
            Some(reason) => self.enter(InstanceState::Degraded, Some(reason)),
            None => self.enter(InstanceState::Running, None),
        }
    }
}

/// How an overload is called in events and as a reason.
const OVERLOADED: &str = "overloaded";
