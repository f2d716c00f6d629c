//! The Instance actor: the shell of one instance's engine (`kmp_proto::instance`, docs/instances.md).
//!
//! The engine knows the work under way, the work that may begin, and the desired state. The actor carries out the
//! engine's actions, keeps the addresses of the jobs that it has started, and is the only writer of the instance's row.
//!
//! | file | contents |
//! |---|---|
//! | `acting` | the engine's actions |
//! | `row` | the row in the journal, and the changes that recoveries and morphs propose |
//! | `watching` | reports of the active generation's watch |
//! | `requests` | requests of operators |
//! | `spawning`, `recovering`, `morphing`, `capturing`, `ending` | start and end of each kind of work |
//! | `job` | messages to the recovery or the morph under way |
//! | `ports`, `policy`, `workload` | the instance's ports, policy and workload |
//! | `status` | status of the instance |

mod acting;
mod capturing;
mod ending;
mod job;
mod morphing;
mod policy;
mod ports;
mod recovering;
mod requests;
mod row;
mod spawning;
mod status;
mod watching;
mod workload;

use std::time::Duration;

use crate::model::{EventKind, RecoveryRecord};
use actix::prelude::*;
use kmp_proto::instance::{Action, Answer, Engine, Event, Failure, Successor};
use kmp_proto::message::HealthStatus;
use kmp_proto::time::Instant;
use slog::{Logger, o};

pub use capturing::{CaptureVmcore, ProvokePanic};
pub use policy::{ApplyPolicy, GetPolicy};
pub use recovering::RecoveryGranted;
pub use requests::{
    BeginMorph, CommandKind, GetHealth, GetHeartbeat, GetMorphStatus, GetStatus, GetSummary,
    GetSurvivor, GetTopologyEntry, MorphControl, PingInstance, Recover, Terminate,
};

use crate::capture;
use crate::model::generation::AnyGeneration;
use crate::model::rows::InstanceRow;
use crate::morph::{LeftMorph, Planned};
use crate::platform::clock;
use crate::platform::events::Draft;
use crate::platform::fleet::Fleet;
use crate::platform::operations::Handle;
use crate::platform::witness::{self, Machine, Step};
use crate::services::Services;
use crate::watch::Watch;
use job::Job;
use requests::Answered;
use row::OwnRow;

/// How an instance actor begins.
pub enum Beginning {
    /// The instance was just spawned; the operation waits.
    Spawned(Handle),
    /// The instance was found running after a restart of the daemon.
    Adopted {
        /// The recovery that started the generation, if the earlier daemon did not finish it.
        recovery: Option<Box<RecoveryRecord>>,
        /// The generation was healthy before.
        served: bool,
    },
    /// A morph was under way when the last daemon ended.
    Morphing(Box<LeftMorph>),
    /// The instance is quarantined or waits for an operator.
    Resting {
        /// None of its generations runs.
        gone: bool,
    },
    /// The daemon ended during the instance's termination.
    Terminating,
    /// The instance failed while no daemon watched, or during a recovery.
    NeedsRecovery {
        /// The failure as found or decided.
        failure: Failure,
        /// The earlier daemon's decision; without one the policy decides.
        decided: Option<Successor>,
    },
}

impl Beginning {
    /// Returns the name in the transition table.
    const fn name(&self) -> &'static str {
        match self {
            Self::Spawned(_) => "spawned",
            Self::Adopted { .. } => "adopted",
            Self::Morphing(_) => "morphing",
            Self::Resting { .. } => "resting",
            Self::Terminating => "ending",
            Self::NeedsRecovery { decided: None, .. } => "failed",
            // The same event under another guard.
            Self::NeedsRecovery { .. } => "failed, and decided",
        }
    }
}

/// The actor.
pub struct Instance {
    services: Services,
    fleet: Fleet,
    log: Logger,
    engine: Engine,
    row: OwnRow,
    generation: AnyGeneration,
    beginning: Option<Beginning>,
    watch: Option<Addr<Watch>>,
    /// The recovery or the morph under way.
    job: Option<Box<dyn Job>>,
    back_off: Option<SpawnHandle>,
    /// The timer after which the ports refuse connections.
    port_hold: Option<SpawnHandle>,
    /// The operation that waits for a spawn or a recovery.
    waiting: Option<Handle>,
    asked: Asked,
    /// The agent's last health report.
    health: Option<HealthStatus>,
    kernel_release: String,
    /// Nothing of the last generation runs.
    gone: bool,
    /// Other generations whose end could not be confirmed: they end together with the instance.
    left: Vec<AnyGeneration>,
    /// The recovery of an earlier daemon whose successor was adopted.
    unfinished: Option<Box<RecoveryRecord>>,
    /// The adopted generation had been healthy before.
    served_before: bool,
    /// The result of the last morph that this daemon has seen.
    last_morph: Option<String>,
    /// When the last serving generation failed, and how long it had been silent.
    answered_until: Option<(Instant, Duration)>,
}

/// Requests that wait for the engine to begin them.
#[derive(Default)]
struct Asked {
    recovery: Option<Answered>,
    morph: Option<Planned>,
    capture: Option<capturing::Ready>,
    termination: Option<Answered>,
}

impl Instance {
    /// Takes an instance into care.
    pub fn begin(
        services: Services,
        fleet: Fleet,
        row: InstanceRow,
        generation: AnyGeneration,
        beginning: Beginning,
    ) -> Addr<Self> {
        let log = services
            .platform
            .log
            .new(o!("instance" => row.name.clone()));
        let kernel_release = generation.kernel.release.clone();
        let instance = Self {
            services,
            fleet,
            log,
            engine: engine(&row, &beginning),
            row: OwnRow::new(row),
            generation,
            beginning: Some(beginning),
            watch: None,
            job: None,
            back_off: None,
            port_hold: None,
            waiting: None,
            asked: Asked::default(),
            health: None,
            kernel_release,
            gone: false,
            left: Vec::new(),
            unfinished: None,
            served_before: false,
            last_morph: None,
            answered_until: None,
        };
        instance.start()
    }

    /// Passes an event to the engine and carries out its actions.
    fn tell(&mut self, event: Event, ctx: &mut Context<Self>) -> Answer {
        let (from, name) = (self.engine.stage(), event.name());
        let before = self.engine.actions().len();
        let answer = self.engine.handle(event, clock::now());
        if answer == Answer::Accepted {
            self.show_step(from.as_str(), name, before);
        }
        self.run(ctx);
        answer
    }

    /// Reports a step to the test harness; `before` counts earlier actions that are still pending.
    fn show_step(&self, from: &'static str, event: &'static str, before: usize) {
        witness::show(|| Step {
            machine: Machine::Instance,
            instance: self.row.name.clone(),
            from,
            event,
            to: self.engine.stage().as_str(),
            effects: self
                .engine
                .actions()
                .skip(before)
                .map(Action::name)
                .collect(),
        });
    }

    fn say(&self, kind: EventKind, message: impl Into<String>) {
        let generation = self.generation.generation;
        self.services
            .platform
            .events
            .publish(Draft::of(kind, &self.row.name, generation, message));
    }
}

fn engine(row: &InstanceRow, beginning: &Beginning) -> Engine {
    let heals = row.policy.auto_heal;
    match beginning {
        Beginning::Spawned(_) => Engine::spawned(heals),
        Beginning::Adopted { recovery, .. } => Engine::adopted(heals, recovery.is_some()),
        // One watch for each generation: until the commit record the instance watches the source, after it the session
        // watches the target, and hands that watch over at its end.
        Beginning::Morphing(left) => {
            let watched = left.row.commit_record().is_none() && left.deaths.source.is_none();
            Engine::morphing(heals, watched)
        }
        Beginning::Resting { .. } => Engine::resting(heals, row.desired, row.reason.clone()),
        Beginning::Terminating => Engine::ending(heals),
        Beginning::NeedsRecovery { failure, decided } => {
            Engine::failed(heals, failure.clone(), *decided, clock::now())
        }
    }
}

impl Actor for Instance {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.regain_ports(ctx);
        if let Some(beginning) = &self.beginning {
            self.show_step("–", beginning.name(), 0);
        }
        let left = match self.beginning.take() {
            Some(Beginning::Spawned(operation)) => {
                operation.step("waiting for the first heartbeat");
                self.waiting = Some(operation);
                self.say(EventKind::InstanceState, "spawned");
                None
            }
            Some(Beginning::Adopted { recovery, served }) => {
                (self.unfinished, self.served_before) = (recovery, served);
                self.say(EventKind::InstanceState, "adopted");
                capture::take_back_left(&self.services.captures, &self.generation);
                None
            }
            Some(Beginning::Morphing(left)) => {
                self.say(EventKind::InstanceState, "adopted in the middle of a morph");
                capture::take_back_left(&self.services.captures, &self.generation);
                Some(left)
            }
            Some(Beginning::Resting { gone }) => {
                self.gone = gone;
                None
            }
            Some(Beginning::Terminating | Beginning::NeedsRecovery { .. }) | None => None,
        };
        self.run(ctx);
        if let Some(left) = left {
            self.resume_morph(*left, ctx);
        }
    }
}
