//! One daemon of a run: the real actors on the machine of the run.

use std::cell::RefCell;
use std::fmt::Write;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::prelude::*;
use kmorph_actors::capture::Captures;
use kmorph_actors::generation::release::Ledger;
use kmorph_actors::generation::{self, Generations};
use kmorph_actors::model::settings::{MorphMode, Retention, Settings, Stock, VmcoreSettings};
use kmorph_actors::model::{Policy, StuckCpuPolicy, VmcorePolicy};
use kmorph_actors::morph::Downtimes;
use kmorph_actors::platform::Platform;
use kmorph_actors::platform::aside::Turn;
use kmorph_actors::platform::clock;
use kmorph_actors::platform::events::EventLog;
use kmorph_actors::platform::journal::{Journal, Pace};
use kmorph_actors::platform::operations::Operations;
use kmorph_actors::platform::transport::TransportHandle;
use kmorph_actors::resources::Resources;
use kmorph_actors::resources::numbers::Numbers;
use kmorph_actors::resources::pool::Pool;
use kmorph_actors::resources::ports::Ports;
use kmorph_actors::services::Services;
use kmorph_actors::supervisor::{GetDaemon, Supervisor};
use kmorph_vmcore::writer::Output;
use slog::{Drain, KV, Logger, OwnedKVList, Record, Serializer};

use crate::dice::Dice;
use crate::machine::{HOST_BOOT, Machine};

/// Number of CPUs of the pool. They are shared, so that no spawn fails for lack of a CPU.
const CPUS: u16 = 4;
/// Size of the pool's memory, bytes.
const POOL_BYTES: u64 = 8 << 30;

/// Maximum durations of a write, milliseconds: the usual one, of a stall, and of a slow disk in a script. With a stall
/// at each step of a fence, the fence still reaches its maximum of tries before the hold of published ports ends.
const WRITE_MAX_MS: u64 = 3;
const STALL_MAX_MS: u64 = 200;
const SLOW_MAX_MS: u64 = 5_000;
/// Duration of a write that a script makes fail: long enough for the daemon to see a kernel end.
const SPOILED: Duration = Duration::from_millis(400);

/// Behavior of the disk of a daemon.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Disk {
    /// Share of writes that stall, percent.
    pub(crate) stalls: u32,
    /// Share of writes that fail, percent.
    pub(crate) fails: u32,
    /// Each write takes up to [`SLOW_MAX_MS`].
    pub(crate) slow: bool,
    /// Number of next writes that take [`SPOILED`] and fail.
    pub(crate) spoiled: u32,
}

/// A handle to change the behavior of the disk.
pub(crate) type DiskHandle = Rc<RefCell<Disk>>;

struct DicedDisk {
    dice: Dice,
    disk: DiskHandle,
    /// True if the write that is under way fails.
    failing: bool,
}

impl Pace for DicedDisk {
    fn delay(&mut self) -> Duration {
        let mut disk = self.disk.borrow_mut();
        self.failing = disk.spoiled > 0;
        if self.failing {
            disk.spoiled -= 1;
            return SPOILED;
        }
        let odds = disk.stalls;
        let longest = match self.dice.percent(odds) {
            _ if disk.slow => SLOW_MAX_MS,
            true => STALL_MAX_MS,
            false => WRITE_MAX_MS,
        };
        Duration::from_millis(self.dice.below(longest))
    }

    fn fails(&mut self) -> bool {
        let odds = self.disk.borrow().fails;
        self.failing || self.dice.percent(odds)
    }

    fn outlives(&mut self) -> bool {
        self.dice.percent(50)
    }
}

/// The log of the actors, a string per line; `None` if no reader wants the log.
#[derive(Clone)]
pub(crate) struct Lines(Option<Arc<Mutex<Vec<String>>>>);

impl Lines {
    pub(crate) fn new(kept: bool) -> Self {
        Self(kept.then(Arc::default))
    }

    pub(crate) fn push(&self, line: impl FnOnce() -> String) {
        if let Some(Ok(mut lines)) = self.0.as_ref().map(|lines| lines.lock()) {
            lines.push(line());
        }
    }

    pub(crate) fn all(&self) -> Vec<String> {
        let lines = self.0.as_ref().and_then(|lines| lines.lock().ok());
        lines.map(|lines| lines.clone()).unwrap_or_default()
    }
}

struct Fields(String);

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        let _ = write!(self.0, " {key}={value}");
        Ok(())
    }
}

impl Drain for Lines {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), slog::Never> {
        self.push(|| {
            let mut fields = Fields(String::new());
            let _ = record.kv().serialize(record, &mut fields);
            let _ = values.serialize(record, &mut fields);
            let (at, level) = (clock::now(), record.level().as_short_str());
            format!("{at:?} {level} {}{}", record.msg(), fields.0)
        });
        Ok(())
    }
}

/// Setup of the daemons, for a whole run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// State moves by rounds, even if it could be handed over.
    pub(crate) rounds: bool,
    /// Initial vmcore policy of instances.
    pub(crate) vmcore: VmcorePolicy,
}

/// A running daemon.
#[derive(Clone)]
pub(crate) struct Daemon {
    pub(crate) supervisor: Addr<Supervisor>,
    pub(crate) services: Services,
}

/// Starts a daemon on the state that earlier ones left in `dir`, and returns once the daemon has restored everything.
pub(crate) async fn start(
    dir: &Path,
    machine: &Machine,
    lines: &Lines,
    disk: &DiskHandle,
    setup: Setup,
    seed: u64,
) -> Daemon {
    let pace = DicedDisk {
        dice: Dice::new(seed ^ 0x0064_6973_6B00_0000),
        disk: disk.clone(),
        failing: false,
    };
    let (journal, snapshot) = Journal::open_here(&dir.join("state"), Box::new(pace)).unwrap();
    let log = Logger::root(lines.clone().fuse(), slog::o!());
    let numbers = Numbers {
        generations: snapshot.last_generation.clone(),
        recovery: snapshot.recoveries.last().map_or(0, |r| r.record.id),
        session: snapshot.morphs.last().map_or(0, |m| m.status.session),
        cids: Default::default(),
    };
    let settings = settings(dir, setup);
    let mark = dir.join("event-id");
    let events = EventLog::new(snapshot.events.clone(), journal.clone(), &mark, HOST_BOOT).unwrap();
    let resources = Resources {
        pool: Rc::new(RefCell::new(Pool::new(settings.pool.clone()))),
        numbers: Rc::new(RefCell::new(numbers)),
        ports: Ports::new(Arc::new(machine.clone()), log.clone(), events.clone()),
    };
    let platform = Platform {
        log: log.clone(),
        transport: TransportHandle::start(&log, Arc::new(machine.clone())),
        events,
        operations: Operations::new(snapshot.operations.clone(), journal.clone()),
        settings: Rc::new(RefCell::new(settings)),
        journal,
    };
    let generations = Generations {
        platform: platform.clone(),
        resources,
        machine: generation::machine::Machine {
            backend: Arc::new(machine.clone()),
            spawn_turn: Turn::default(),
            incarnation: snapshot.incarnation,
            host_boot_id: HOST_BOOT.to_owned(),
            log,
        },
        kept: Ledger::default(),
    };
    let services = Services {
        captures: Captures::new(platform.clone(), generations.clone()),
        downtimes: Rc::new(RefCell::new(Downtimes::from_journal(&snapshot.morphs))),
        platform,
        generations,
    };
    let supervisor = Supervisor::new(services.clone(), snapshot, "simulated".to_owned()).start();
    supervisor.send(GetDaemon).await.unwrap();
    Daemon {
        supervisor,
        services,
    }
}

fn settings(dir: &Path, setup: Setup) -> Settings {
    Settings {
        default_policy: Policy {
            heartbeat_timeout_s: 2.0,
            auto_heal: true,
            morph_timeout_s: 20.0,
            vmcore: setup.vmcore,
            stuck_cpu: StuckCpuPolicy::Degraded,
        },
        default_memory_bytes: 64 << 20,
        start_timeout: Duration::from_secs(5),
        stop_timeout: Duration::from_secs(2),
        port_hold: Duration::from_secs(5),
        recoveries_max: 2,
        pool: Stock {
            cpus: (0..CPUS).collect(),
            cpus_shared: true,
            memory_bytes: POOL_BYTES,
            bookkeeping_bytes: 0,
        },
        control_group: None,
        kv_program: dir.join("kmorph-kv"),
        morph_expiry: Duration::from_secs(30),
        morph_mode: match setup.rounds {
            true => MorphMode::Rounds,
            false => MorphMode::Auto,
        },
        downtime_budget: Duration::from_millis(10),
        vmcore: VmcoreSettings {
            dir: dir.join("vmcore"),
            level: 31,
            output: Output::Elf,
            threads: 1,
            rate: None,
            survivors: 0,
            retention: Retention {
                count: 1,
                age: None,
                bytes: None,
            },
        },
        state_dir: dir.join("state"),
        run_dir: dir.join("run"),
        config_path: None,
    }
}
