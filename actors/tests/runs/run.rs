//! One run: what a seed has operators and faults do to a daemon and its instances, and what must hold afterwards.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use actix::System;
use kmorph_actors::instance::{CommandKind, MorphControl, Recover, Terminate};
use kmorph_actors::model::requests::{MorphRequest, SpawnRequest};
use kmorph_actors::model::{OperationKind, OperationState, PolicyPatch};
use kmorph_actors::platform::ambient;
use kmorph_actors::supervisor::{BeginMorph, ChangePolicies, Find, GetDaemon, List, Spawn};
use kmp_proto::instance::Condition;
use kmp_proto::morph::CommitLimit;

use crate::daemon::{self, Daemon, Disk, DiskHandle, Lines};
use crate::dice::Dice;
use crate::machine::{Machine, Odds};

/// Instances of a run.
const NAMES: [&str; 3] = ["web", "db", "cache"];
/// Steps of the schedule.
const STEPS: u64 = 40;
/// Longest pause between two steps, milliseconds.
const PAUSE_MAX_MS: u64 = 900;
/// Time in which everything comes to rest once nothing goes wrong any more: longer than a forgotten morph takes to expire.
const REST_SECONDS: u64 = 180;

/// What came of a run.
pub(crate) struct Outcome {
    /// Everything that was logged, in its order.
    pub(crate) lines: Vec<String>,
    /// Rules that were broken.
    pub(crate) broken: Vec<String>,
}

/// Runs what `seed` says, in the directory `dir`, which is empty.
pub(crate) fn run(seed: u64, dir: &Path) -> Outcome {
    let image = dir.join("vmlinuz");
    let synthetic = kmorph_backends::kernel_image::synthetic("6.1.0-simulated");
    std::fs::write(&image, synthetic).unwrap();
    let mut world = World {
        dice: Dice::new(seed),
        machine: Machine::new(seed),
        lines: Lines::default(),
        kernel: image.display().to_string(),
        broken: Vec::new(),
    };
    let mut steps = STEPS;
    for life in 0.. {
        let rest = life > 2 || world.dice.percent(40);
        let these = if rest {
            steps
        } else {
            world.dice.below(steps + 1)
        };
        steps -= these;
        world.lines.push(format!("life {life}"));
        let system = System::with_tokio_rt(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(true)
                .build()
                .unwrap()
        });
        let seed = world.dice.next();
        system.block_on(async {
            ambient::begin(seed);
            world.live(dir, seed, these, rest).await;
        });
        // The daemon dies with all it holds.
        drop(system);
        if rest {
            break;
        }
    }
    let dir = dir.display().to_string();
    let lines = world.lines.all();
    world.broken.extend(world.machine.broken());
    Outcome {
        lines: lines
            .iter()
            .map(|line| line.replace(&dir, "<dir>"))
            .collect(),
        broken: world.broken,
    }
}

/// Whether nothing is under way with an instance in this state.
fn rests(state: Condition) -> bool {
    matches!(
        state,
        Condition::Running
            | Condition::Failed
            | Condition::Quarantined
            | Condition::OperatorActionNeeded
    )
}

struct World {
    dice: Dice,
    machine: Machine,
    lines: Lines,
    kernel: String,
    broken: Vec<String>,
}

impl World {
    /// One daemon's life.
    async fn live(&mut self, dir: &Path, seed: u64, steps: u64, rest: bool) {
        let disk: DiskHandle = Rc::new(RefCell::new(Disk::default()));
        self.machine.set_odds(Odds::default());
        let daemon = daemon::start(dir, &self.machine, &self.lines, &disk, seed).await;
        self.machine.set_odds(Odds {
            spawns: 10,
            fences: 20,
            releases: 20,
        });
        *disk.borrow_mut() = Disk {
            stalls: 2,
            fails: 2,
        };
        for _ in 0..steps {
            self.step(&daemon).await;
            let pause = self.dice.below(PAUSE_MAX_MS);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            self.note();
        }
        if rest {
            self.machine.set_odds(Odds::default());
            *disk.borrow_mut() = Disk::default();
            self.come_to_rest(&daemon).await;
        }
    }

    fn note(&self) {
        for told in self.machine.told() {
            self.lines.push(told);
        }
    }

    async fn step(&mut self, daemon: &Daemon) {
        let name = (*self.dice.one_of(&NAMES).unwrap()).to_owned();
        let choice = self.dice.below(100);
        self.lines.push(format!("step {choice} {name}"));
        match choice {
            0..20 => self.spawn(daemon, name),
            20..26 => self.terminate(daemon, name).await,
            26..32 => self.recover(daemon, name).await,
            32..50 => self.morph(daemon, name),
            50..58 => self.steer_morph(daemon, name).await,
            58..62 => self.change_policy(daemon, name),
            62..70 => self.hurt(Machine::kill),
            70..74 => self.hurt(Machine::hang),
            74..80 => self.hurt(Machine::flap),
            _ => self.machine.write(&name),
        }
    }

    fn hurt(&mut self, how: fn(&Machine, &(String, u64))) {
        let living = self.machine.living();
        if let Some(key) = self.dice.one_of(&living) {
            how(&self.machine, key);
        }
    }

    fn spawn(&self, daemon: &Daemon, name: String) {
        let request = SpawnRequest {
            kernel: self.kernel.clone().into(),
            name,
            cpus: 1,
            memory_bytes: None,
            kernel_cmdline: String::new(),
            initramfs: None,
            workload: None,
            publish: Vec::new(),
            monitor: true,
            heartbeat_timeout_s: None,
        };
        daemon.supervisor.do_send(Spawn {
            request,
            uid: None,
            throw_away: false,
        });
    }

    async fn terminate(&mut self, daemon: &Daemon, name: String) {
        let force = self.dice.percent(50);
        let kind = OperationKind::Terminate;
        let Ok(operation) = daemon.services.platform.operations.begin(kind, &name, None) else {
            return;
        };
        // What serves may end from here on.
        self.machine.ending(&name, true);
        if let Ok(Ok(instance)) = daemon.supervisor.send(Find(name)).await {
            instance.do_send(Terminate { force, operation });
        }
    }

    async fn recover(&mut self, daemon: &Daemon, name: String) {
        let kind = OperationKind::Recover;
        let Ok(operation) = daemon.services.platform.operations.begin(kind, &name, None) else {
            return;
        };
        self.machine.ending(&name, true);
        if let Ok(Ok(instance)) = daemon.supervisor.send(Find(name)).await {
            instance.do_send(Recover(operation));
        }
    }

    fn morph(&mut self, daemon: &Daemon, name: String) {
        let auto = self.dice.percent(60);
        let request = MorphRequest {
            kernel: self.kernel.clone().into(),
            kernel_cmdline: None,
            initramfs: None,
            auto_validate: auto || self.dice.percent(50),
            auto_commit: auto,
            force: true,
            downtime_budget_us: None,
        };
        daemon.supervisor.do_send(BeginMorph {
            name,
            request,
            uid: None,
        });
    }

    async fn steer_morph(&mut self, daemon: &Daemon, name: String) {
        let (kind, operation) = match self.dice.below(3) {
            0 => (CommandKind::Validate, OperationKind::MorphValidate),
            1 => {
                let limit = CommitLimit::None;
                (CommandKind::Commit { limit }, OperationKind::MorphCommit)
            }
            _ => (CommandKind::Rollback, OperationKind::MorphRollback),
        };
        let Ok(operation) = daemon
            .services
            .platform
            .operations
            .begin(operation, &name, None)
        else {
            return;
        };
        if let Ok(Ok(instance)) = daemon.supervisor.send(Find(name)).await {
            instance.do_send(MorphControl { kind, operation });
        }
    }

    fn change_policy(&mut self, daemon: &Daemon, name: String) {
        let patch = PolicyPatch {
            auto_heal: Some(self.dice.percent(70)),
            ..PolicyPatch::default()
        };
        daemon
            .supervisor
            .do_send(ChangePolicies([(name, patch)].into()));
    }

    /// Nothing goes wrong any more: whatever was begun ends, and each instance serves, or rests for a reason.
    async fn come_to_rest(&mut self, daemon: &Daemon) {
        let mut all = Vec::new();
        for _ in 0..REST_SECONDS {
            tokio::time::sleep(Duration::from_secs(1)).await;
            self.note();
            all = daemon.supervisor.send(List).await.unwrap();
            let operations = daemon.services.platform.operations.running();
            let kept = daemon.services.generations.kept.shown(None).len();
            if operations + kept == 0 && all.iter().all(|instance| rests(instance.condition)) {
                break;
            }
        }
        for instance in &all {
            let name = &instance.name;
            if !rests(instance.condition) {
                let text = format!("{name} is {:?} in the end", instance.condition);
                self.broken.push(text);
            }
            let key = (name.clone(), instance.generation);
            let lives = self.machine.with(&key, |k| k.alive && !k.hangs);
            if instance.condition == Condition::Running && lives != Some(true) {
                self.broken
                    .push(format!("{name} is said to run, and does not"));
            }
            if instance.condition == Condition::Running && !self.machine.state_is_kept(name) {
                self.broken
                    .push(format!("{name} has lost what it acknowledged"));
            }
        }
        let operations = daemon.services.platform.operations.list();
        for operation in operations
            .iter()
            .filter(|o| o.state == OperationState::Running)
        {
            let text = format!("{:?} of {} never ends", operation.kind, operation.instance);
            self.broken.push(text);
        }
        let status = daemon.supervisor.send(GetDaemon).await.unwrap();
        if status.actor_restarts > 0 {
            let text = format!("{} actors panicked", status.actor_restarts);
            self.broken.push(text);
        }
        self.nothing_is_left(daemon, all.iter().map(|i| i.name.as_str()).collect());
    }

    /// What lives belongs to an instance, and the pool is held by what lives or rests.
    fn nothing_is_left(&mut self, daemon: &Daemon, names: Vec<&str>) {
        for (name, generation) in self.machine.living() {
            if !names.contains(&name.as_str()) {
                let text = format!("{name} {generation} is left, and nobody's");
                self.broken.push(text);
            }
        }
        for (name, generation) in daemon
            .services
            .generations
            .resources
            .pool
            .borrow()
            .holders()
        {
            if !names.contains(&name.as_str()) {
                let text = format!("{name} {generation} holds what it was given, and is nobody's");
                self.broken.push(text);
            }
        }
    }
}
