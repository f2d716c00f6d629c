//! One run: the deeds of operators and the faults that a seed inflicts on a daemon and its instances.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use actix::System;
use kmorph_actors::model::VmcorePolicy;
use kmorph_actors::platform::{ambient, fault, witness};
use kmorph_actors::supervisor::List;
use kmp_proto::instance::Condition;
use tokio::sync::{Notify, mpsc};

use crate::commands::Operator;
use crate::coverage::{Command, Coverage, Watcher};
use crate::daemon::{self, Daemon, Disk, DiskHandle, Lines, Setup};
use crate::dice::Dice;
use crate::machine::{Machine, Make, Odds};
use crate::ports::{self, Loopback};
use crate::prompts::Prompted;
use crate::scripts::{Followed, SCRIPTS, Script};

/// Names of the instances of a run.
pub(crate) const NAMES: [&str; 3] = ["web", "db", "cache"];
/// The instance whose vmcore policy does not change.
pub(crate) const STEADY: &str = "db";
/// Number of steps of the schedule.
const STEPS: u64 = 32;
/// Behavior of the disk while operators and faults are active, and in worse runs.
const DISK: Disk = Disk {
    stalls: 2,
    fails: 2,
    slow: false,
    spoiled: 0,
};
const BAD_DISK: Disk = Disk {
    stalls: 50,
    fails: 60,
    slow: false,
    spoiled: 0,
};
/// Number of crashes in a row after which one more leads to quarantine.
const WEARY: u32 = 5;
/// Chances, of a hundred thousand, that an actor panics at a place where it can.
const PANICS: u64 = 80;
/// Share of runs that begin with a script, percent.
const SCRIPTED: u32 = 6;
/// Maximum time for a script, and the time after it in which its last deeds take effect.
const OPENING_MAX: Duration = Duration::from_secs(15);
const AFTER_OPENING: Duration = Duration::from_secs(12);
/// Interval between checks whether a script is over.
const OPENING_LOOK: Duration = Duration::from_millis(100);
/// Time in which everything becomes idle after the last fault: longer than a forgotten morph takes to expire.
const REST_SECONDS: u64 = 180;

/// Outcome of a run.
pub(crate) struct Outcome {
    /// The whole log, in order.
    pub(crate) lines: Vec<String>,
    /// Rule violations.
    pub(crate) broken: Vec<String>,
    /// Rows and moments that the run reached.
    pub(crate) coverage: Coverage,
}

/// Runs `seed` in the empty directory `dir`. `logs`: keep the log lines.
pub(crate) fn run(seed: u64, dir: &Path, logs: bool) -> Outcome {
    let image = dir.join("vmlinuz");
    let synthetic = kmorph_backends::kernel_image::synthetic("6.1.0-simulated");
    std::fs::write(&image, synthetic).unwrap();
    std::fs::create_dir(dir.join("by-hand")).unwrap();
    let mut dice = Dice::new(seed);
    // A separate generator, so that runs without a script stay as they were before scripts existed.
    let mut opening = Dice::new(seed ^ 0x6F70_656E_696E_6700);
    let scripted = opening.percent(SCRIPTED);
    let script = scripted.then(|| opening.one_of(&SCRIPTS)).flatten();
    let weary = dice.percent(25) && script.is_none();
    let captures = dice.percent(40);
    let make = Make {
        captures: captures || script.is_some_and(|script| script.captures),
    };
    let setup = Setup {
        rounds: dice.percent(40),
        vmcore: match (make.captures, dice.percent(50)) {
            (false, _) => VmcorePolicy::Off,
            (true, true) => VmcorePolicy::Required,
            (true, false) => VmcorePolicy::On,
        },
    };
    let machine = Machine::new(seed, make, &dir.join("memory"));
    let loopback = Loopback::take();
    for (place, name) in NAMES.into_iter().enumerate() {
        if let Some(port) = ports::of(loopback.address(), place, NAMES.len()) {
            machine.publish(name, port);
        }
    }
    let mut world = World {
        dice,
        machine,
        setup,
        script,
        weary,
        lives: 0,
        lines: Lines::new(logs),
        watcher: Rc::new(RefCell::new(Watcher::new(seed))),
        kernel: image.display().to_string(),
        broken: Vec::new(),
    };
    world.live_and_die(dir);
    let (dir, address) = (dir.display().to_string(), loopback.address().to_string());
    let lines = world.lines.all();
    world.broken.extend(world.machine.broken());
    let coverage = std::mem::take(&mut world.watcher.borrow_mut().coverage);
    Outcome {
        lines: lines
            .iter()
            .map(|line| line.replace(&dir, "<dir>").replace(&address, "<address>"))
            .collect(),
        broken: world.broken,
        coverage,
    }
}

/// Returns true if an instance in this state is idle.
pub(crate) fn rests(state: Condition) -> bool {
    matches!(
        state,
        Condition::Running
            | Condition::Degraded
            | Condition::Failed
            | Condition::Quarantined
            | Condition::OperatorActionNeeded
    )
}

pub(crate) struct World {
    pub(crate) dice: Dice,
    pub(crate) machine: Machine,
    pub(crate) setup: Setup,
    /// Script with which the first daemon's life begins, before the schedule.
    script: Option<&'static Script>,
    /// Most deeds hit one instance, which is one failure short of quarantine, and the disk is bad.
    weary: bool,
    /// Number of daemons so far.
    pub(crate) lives: u32,
    pub(crate) lines: Lines,
    pub(crate) watcher: Rc<RefCell<Watcher>>,
    pub(crate) kernel: String,
    pub(crate) broken: Vec<String>,
}

impl World {
    /// Runs one daemon after the other; the last one has time to bring everything to rest.
    fn live_and_die(&mut self, dir: &Path) {
        let mut steps = STEPS;
        if self.weary {
            self.machine.crash(NAMES[0], WEARY);
        }
        for life in 0.. {
            let rest = life > 2 || self.dice.percent(40);
            let these = match rest {
                true => steps,
                false => self.dice.below(steps + 1),
            };
            steps -= these;
            self.lives = life;
            self.lines.push(|| format!("life {life}"));
            let system = System::with_tokio_rt(|| {
                tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .start_paused(true)
                    .build()
                    .unwrap()
            });
            let seed = self.dice.next();
            let lived = system.block_on(self.live(dir, seed, these, rest));
            // The daemon dies with all that it holds.
            drop(system);
            if rest && lived {
                break;
            }
            if !lived {
                // The next daemon starts the schedule, from the state that the script has left.
                steps += these;
                continue;
            }
            while self.dice.percent(25) {
                // No daemon watches.
                self.hurt(Machine::kill);
            }
        }
    }

    /// Derives the ambient time, faults and panics from the seed. Actors of instances panic as often as `to_panic`
    /// states. Returns the counter of panics.
    fn begin(&self, seed: u64, to_panic: &Rc<Cell<u32>>) -> Rc<Cell<u64>> {
        let mut dice = Dice::new(seed ^ 0x0074_6872_6561_6473);
        ambient::begin(seed, move |_| {
            let most = if dice.percent(15) { 20_000 } else { 300 };
            Duration::from_millis(dice.below(most))
        });
        let watcher = self.watcher.clone();
        witness::begin(move |step| watcher.borrow_mut().see(step));
        let panics = Rc::new(Cell::new(0));
        let to_panic = to_panic.clone();
        let (count, mut dice) = (panics.clone(), Dice::new(seed ^ 0x0070_616E_6963_7300));
        let disk_is_calm = self.machine.clone();
        fault::begin(move |place| {
            let calm = disk_is_calm.inner().odds.spawns == 0;
            let panics =
                !calm && matches!(place, "morph" | "recovery") && dice.below(100_000) < PANICS;
            let asked = place == "instance" && to_panic.get() > 0;
            to_panic.set(to_panic.get() - u32::from(asked));
            let panics = panics || asked;
            if panics {
                count.set(count.get() + 1);
            }
            panics
        });
        panics
    }

    /// Runs one daemon; returns true if it lived as long as intended.
    async fn live(&mut self, dir: &Path, seed: u64, steps: u64, rest: bool) -> bool {
        let (to_panic, dies) = (Rc::new(Cell::new(0)), Rc::new(Notify::new()));
        let panics = self.begin(seed, &to_panic);
        let (prompts, prompted) = mpsc::unbounded_channel();
        self.watcher.borrow_mut().begin(prompts);
        let disk: DiskHandle = Rc::new(RefCell::new(Disk::default()));
        self.machine.set_odds(Odds::default());
        self.watcher.borrow_mut().prompt(true);
        let (machine, lines) = (&self.machine, &self.lines);
        let daemon = daemon::start(dir, machine, lines, &disk, self.setup, seed).await;
        let operator = Operator {
            daemon: daemon.clone(),
            machine: self.machine.clone(),
            watcher: self.watcher.clone(),
            kernel: self.kernel.clone(),
            dir: dir.join("by-hand"),
            settles: Duration::ZERO,
            steady: STEADY,
        };
        let kills = if self.weary { 40 } else { 20 };
        let prompts = Prompted {
            operator: operator.clone(),
            disk: disk.clone(),
            dies: dies.clone(),
            to_panic,
            kills,
            dice: Dice::new(seed ^ 0x0070_726F_6D70_7400),
        };
        actix::spawn(prompts.answer(prompted));
        if let Some(script) = self.script.take() {
            let opened = self.open(script, &operator, &disk);
            tokio::select! {
                biased;
                () = dies.notified() => return false,
                () = opened => {}
            }
        }
        self.machine.set_odds(Odds {
            spawns: 10,
            fences: 20,
            releases: 20,
            memories: 15,
            refusals: 3,
            stubborn: 4,
            complaints: 6,
        });
        *disk.borrow_mut() = if self.weary { BAD_DISK } else { DISK };
        let (changes, turns_bad) = if self.weary { (25, 60) } else { (6, 40) };
        for _ in 0..steps {
            if self.dice.percent(changes) {
                let bad = self.dice.percent(turns_bad);
                *disk.borrow_mut() = if bad { BAD_DISK } else { DISK };
                self.lines.push(|| format!("the disk is bad: {bad}"));
            }
            self.step(&operator).await;
            let pause = self.pause();
            tokio::time::sleep(Duration::from_millis(pause)).await;
            self.note();
        }
        if rest {
            self.watcher.borrow_mut().prompt(false);
            self.machine.set_odds(Odds::default());
            self.machine.calm();
            *disk.borrow_mut() = Disk::default();
            self.come_to_rest(&daemon).await;
            self.check(&daemon, dir, panics.get()).await;
        }
        true
    }

    /// Follows a script, in which no fault occurs but those of the script.
    async fn open(&mut self, script: &'static Script, operator: &Operator, disk: &DiskHandle) {
        let followed = (Followed::new(script), disk.clone());
        self.watcher.borrow_mut().prompt(false);
        self.watcher.borrow_mut().follow(Some(followed));
        for name in NAMES {
            operator.give(Command::Spawn, name, &mut self.dice).await;
        }
        let mut left = OPENING_MAX;
        while self.watcher.borrow().follows() && !left.is_zero() {
            tokio::time::sleep(OPENING_LOOK).await;
            self.note();
            left -= OPENING_LOOK;
        }
        let over = !self.watcher.borrow().follows();
        self.lines
            .push(|| format!("the script was followed to its end: {over}"));
        tokio::time::sleep(AFTER_OPENING).await;
        self.note();
        self.watcher.borrow_mut().follow(None);
        self.watcher.borrow_mut().prompt(true);
    }

    /// Returns a pause: mostly short, so that many things happen at the same time; sometimes long enough for a verdict.
    fn pause(&mut self) -> u64 {
        let most = match self.dice.below(10) {
            0..6 => 50,
            6..9 => 600,
            _ => 2_800,
        };
        self.dice.below(most)
    }

    pub(crate) fn note(&self) {
        for told in self.machine.told() {
            self.lines.push(|| told);
        }
    }

    async fn step(&mut self, operator: &Operator) {
        let mut name = *self.dice.one_of(&NAMES).unwrap();
        let choice = self.dice.below(100);
        if self.weary && self.dice.percent(75) {
            name = NAMES[0];
            self.lines.push(|| format!("step {choice} {name}, weary"));
            let command = match choice {
                0..15 => Command::Spawn,
                15..21 => Command::Terminate,
                21..27 => Command::TerminateByForce,
                27..47 => Command::Recover,
                47..67 => Command::Morph,
                67..79 => Command::Capture,
                79..88 => Command::ChangePolicy,
                _ => return self.hurt_newest(name),
            };
            return operator.give(command, name, &mut self.dice).await;
        }
        self.lines.push(|| format!("step {choice} {name}"));
        let command = match choice {
            0..20 => Command::Spawn,
            20..23 => Command::Terminate,
            23..26 => Command::TerminateByForce,
            26..31 => Command::Recover,
            31..48 => Command::Morph,
            48..50 => Command::Validate,
            50..53 => Command::Commit,
            53..55 => Command::RollBack,
            55..59 => Command::Capture,
            59..63 => Command::ChangePolicy,
            63..71 => return self.hurt(Machine::kill),
            71..75 => return self.hurt(Machine::hang),
            75..80 => return self.hurt(Machine::flap),
            80..83 => return self.hurt(Machine::complain),
            83..85 => return self.hurt(Machine::stall),
            85..87 => {
                let more = self.dice.percent(20);
                let times = if more { 2 * WEARY } else { WEARY };
                return self.machine.crash(name, times);
            }
            _ => return self.machine.write(name),
        };
        operator.give(command, name, &mut self.dice).await;
    }

    fn hurt_newest(&mut self, name: &str) {
        if let Some(key) = self.machine.newest(name) {
            self.machine.kill(&key);
        }
    }

    fn hurt(&mut self, how: fn(&Machine, &(String, u64))) {
        let living = self.machine.living();
        if let Some(key) = self.dice.one_of(&living) {
            how(&self.machine, key);
        }
    }

    /// Waits, without further faults, until all operations end.
    async fn come_to_rest(&mut self, daemon: &Daemon) {
        let mut rested = 0;
        for _ in 0..REST_SECONDS {
            tokio::time::sleep(Duration::from_secs(1)).await;
            self.note();
            let all = daemon.supervisor.send(List).await.unwrap();
            let operations = daemon.services.platform.operations.running();
            let kept = daemon.services.generations.kept.shown(None).len();
            let known = |name: &str| all.iter().any(|instance| instance.name == name);
            let holders = daemon
                .services
                .generations
                .resources
                .pool
                .borrow()
                .holders();
            let nobodys = holders.iter().filter(|(name, _)| !known(name)).count();
            let resting = all.iter().all(|instance| rests(instance.condition));
            match operations + kept + nobodys == 0 && resting {
                true => rested += 1,
                false => rested = 0,
            }
            // A single check may meet a failure that is about to be healed.
            if rested == 2 {
                break;
            }
        }
    }
}
