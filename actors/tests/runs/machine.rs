//! The machine of a run: kernels that start, serve, hang and die as the seed determines. The machine outlives the
//! daemon. `backend` connects the daemon to the kernels.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kmorph_backends::contract::Placement;
use tokio::sync::watch;

use crate::dice::Dice;
use crate::ports;

/// Boot ID of the host in every run.
pub(crate) const HOST_BOOT: &str = "00000000-0000-4000-8000-000000000001";

/// The part of a kernel in its life and in a morph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Answers its clients.
    Serving,
    /// Frozen; `holding` if it has answered the last round.
    Frozen { holding: bool },
    /// Target of a morph; `activated` if it has taken over the state.
    Waiting { activated: bool },
    /// Source of a committed morph.
    Retired,
}

/// One generation.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) part: Part,
    /// The writes of its clients, as far as this kernel holds them.
    pub(crate) state: u64,
    /// Session of its morph.
    pub(crate) session: u64,
    /// Generation whose state this kernel takes over.
    pub(crate) source: Option<u64>,
    pub(crate) alive: bool,
    /// Answers nothing.
    pub(crate) hangs: bool,
    /// A fault has hit the kernel that entitles a daemon to fence it.
    pub(crate) hurt: bool,
    /// Executes nothing, because a capture reads its memory.
    pub(crate) stopped: bool,
    /// State received by rounds and not taken over yet.
    pub(crate) incoming: u64,
    /// The complaint that its agent reports.
    pub(crate) complains: Complaint,
    /// Number of next fences that are not confirmed.
    pub(crate) stubborn: u32,
    /// Its resources are released.
    pub(crate) released: bool,
    /// Listening sockets passed to the kernel.
    pub(crate) sockets: Arc<Vec<OwnedFd>>,
    pub(crate) placement: Placement,
}

/// A complaint of a kernel's agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Complaint {
    #[default]
    None,
    /// Its program is unhealthy.
    Degraded,
    /// Its program has ended.
    Ended,
    /// The load exceeds the capacity of its CPUs.
    Load,
}

/// Properties of the machine, for a whole run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Make {
    /// Memory of the kernels can be captured.
    pub(crate) captures: bool,
}

/// Chances of faults besides those of the schedule.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Odds {
    /// Share of spawns that fail, percent.
    pub(crate) spawns: u32,
    /// Share of fences that are not confirmed, percent.
    pub(crate) fences: u32,
    /// Share of releases that fail, percent.
    pub(crate) releases: u32,
    /// Share of failed memory reads, freezes and resumes, percent.
    pub(crate) memories: u32,
    /// Share of steps of a morph that an agent refuses, or does not answer in time, percent.
    pub(crate) refusals: u32,
    /// Share of kernels whose fence stays unconfirmed for a long time, percent.
    pub(crate) stubborn: u32,
    /// Share of kernels that start with a complaint, percent.
    pub(crate) complaints: u32,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) kernels: BTreeMap<(String, u64), Kernel>,
    pub(crate) dice: Dice,
    pub(crate) odds: Odds,
    pub(crate) make: Make,
    /// Directory of the memory files.
    pub(crate) dir: PathBuf,
    /// Links to each kernel, which a flap cuts.
    pub(crate) cuts: BTreeMap<(String, u64), watch::Sender<u64>>,
    pub(crate) ends: BTreeMap<(String, u64), watch::Sender<bool>>,
    /// Complaints that the agents report unsolicited.
    pub(crate) says: BTreeMap<(String, u64), watch::Sender<Complaint>>,
    /// Published ports, by instance.
    ports: BTreeMap<String, SocketAddr>,
    /// Number of next kernels that die soon after their start, by instance.
    crashes: BTreeMap<String, u32>,
    /// The last write acknowledged to clients, by instance.
    acknowledged: BTreeMap<String, u64>,
    /// Whether an operator wants the serving generation to end, by instance.
    pub(crate) ending: BTreeMap<String, bool>,
    pub(crate) broken: Vec<String>,
    pub(crate) told: Vec<String>,
}

/// The machine of a run; see the module.
#[derive(Clone, Debug)]
pub(crate) struct Machine(Arc<Mutex<Inner>>);

impl Machine {
    /// Creates a machine without kernels. `dir` is for the memory of its kernels.
    pub(crate) fn new(seed: u64, make: Make, dir: &Path) -> Self {
        std::fs::create_dir(dir).unwrap();
        Self(Arc::new(Mutex::new(Inner {
            kernels: BTreeMap::new(),
            dice: Dice::new(seed ^ 0x006D_6163_6869_6E65),
            odds: Odds::default(),
            make,
            dir: dir.to_owned(),
            ports: BTreeMap::new(),
            crashes: BTreeMap::new(),
            cuts: BTreeMap::new(),
            ends: BTreeMap::new(),
            says: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            ending: BTreeMap::new(),
            broken: Vec::new(),
            told: Vec::new(),
        })))
    }

    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_odds(&self, odds: Odds) {
        self.inner().odds = odds;
    }

    /// Returns the rule violations so far.
    pub(crate) fn broken(&self) -> Vec<String> {
        self.inner().broken.clone()
    }

    /// Records a rule violation.
    pub(crate) fn breaks(&self, text: String) {
        self.inner().broken.push(text);
    }

    /// Returns the events of the kernels since the last call.
    pub(crate) fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.inner().told)
    }

    /// Gives `look` the kernel of a generation, to read or to change.
    pub(crate) fn with<T>(
        &self,
        key: &(String, u64),
        look: impl FnOnce(&mut Kernel) -> T,
    ) -> Option<T> {
        self.inner().kernels.get_mut(key).map(look)
    }

    /// Returns the live generations.
    pub(crate) fn living(&self) -> Vec<(String, u64)> {
        let inner = self.inner();
        let living = inner.kernels.iter().filter(|(_, k)| k.alive);
        living.map(|(key, _)| key.clone()).collect()
    }

    /// Sets the port that an instance publishes.
    pub(crate) fn publish(&self, instance: &str, port: SocketAddr) {
        self.inner().ports.insert(instance.to_owned(), port);
    }

    /// Returns the port of an instance, if the instance publishes one.
    pub(crate) fn port_of(&self, instance: &str) -> Option<SocketAddr> {
        self.inner().ports.get(instance).copied()
    }

    /// Writes to an instance as a client; the serving kernel acknowledges the write. Clients reach a serving kernel by
    /// the instance's port, with or without a daemon.
    pub(crate) fn write(&self, instance: &str) {
        let mut inner = self.inner();
        let port = inner.ports.get(instance).copied();
        let serving = inner.kernels.iter_mut().find(|((name, _), k)| {
            name == instance && k.alive && !k.hangs && !k.stopped && k.part == Part::Serving
        });
        if let Some(((_, generation), kernel)) = serving {
            kernel.state += 1;
            let (state, generation) = (kernel.state, *generation);
            let reachable = kernel.sockets.is_empty() || port.is_none_or(ports::takes_connections);
            inner.acknowledged.insert(instance.to_owned(), state);
            if !reachable {
                let text = format!("{instance} {generation} serves, and its port refuses");
                inner.broken.push(text);
            }
        }
    }

    /// Makes the next kernels of an instance die soon after their start.
    pub(crate) fn crash(&self, instance: &str, times: u32) {
        let mut inner = self.inner();
        inner
            .told
            .push(format!("{instance} will crash {times} times"));
        inner.crashes.insert(instance.to_owned(), times);
    }

    /// Stops the crashes of new kernels.
    pub(crate) fn calm(&self) {
        self.inner().crashes.clear();
    }

    /// Returns the unsolicited complaints of a kernel's agent; an initial complaint counts as a change.
    pub(crate) fn says(&self, key: &(String, u64)) -> Option<watch::Receiver<Complaint>> {
        let inner = self.inner();
        let mut says = inner.says.get(key)?.subscribe();
        if *says.borrow() != Complaint::None {
            says.mark_changed();
        }
        Some(says)
    }

    /// Stalls a kernel for a moment that is shorter than a verdict takes.
    pub(crate) fn stall(&self, key: &(String, u64)) {
        let mut inner = self.inner();
        let wait = Duration::from_millis(300 + inner.dice.below(1_000));
        let kernel = inner.kernels.get_mut(key);
        let Some(kernel) = kernel.filter(|k| k.alive && !k.stopped) else {
            return;
        };
        (kernel.stopped, kernel.hurt) = (true, true);
        inner.told.push(format!("{} {} stalls", key.0, key.1));
        let (machine, key) = (self.clone(), key.clone());
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            machine.with(&key, |k| k.stopped = false);
        });
    }

    /// Leaves the next fences of a kernel unconfirmed.
    pub(crate) fn stubborn(&self, key: &(String, u64), fences: u32) {
        self.with(key, |kernel| kernel.stubborn = fences);
    }

    /// Returns true if the frozen source of a target would resume serving at the end of its lease: the source does not
    /// know that the commit may be in the journal.
    pub(crate) fn source_may_go_on(&self, target: &(String, u64), session: u64) -> bool {
        let inner = self.inner();
        inner.kernels.iter().any(|((name, generation), kernel)| {
            let other = *name == target.0 && *generation != target.1;
            let frozen = kernel.part == Part::Frozen { holding: false };
            other && kernel.alive && kernel.session == session && frozen
        })
    }

    /// Returns the oldest live kernel of an instance.
    pub(crate) fn oldest(&self, instance: &str) -> Option<(String, u64)> {
        let living = self.living();
        living.into_iter().find(|(name, _)| name == instance)
    }

    /// Returns the newest live kernel of an instance.
    pub(crate) fn newest(&self, instance: &str) -> Option<(String, u64)> {
        let living = self.living();
        living.into_iter().rfind(|(name, _)| name == instance)
    }

    /// Returns the time after which a kernel that starts now dies, if it is to die.
    pub(crate) fn dies_after(&self, instance: &str) -> Option<Duration> {
        let mut inner = self.inner();
        let left = inner.crashes.get_mut(instance).filter(|left| **left > 0)?;
        *left -= 1;
        Some(Duration::from_millis(inner.dice.below(1_200)))
    }

    /// Makes a kernel's agent start or end a complaint.
    pub(crate) fn complain(&self, key: &(String, u64)) {
        let mut inner = self.inner();
        let choice = inner.dice.below(4);
        let Some(kernel) = inner.kernels.get_mut(key) else {
            return;
        };
        if kernel.complains != Complaint::Ended {
            kernel.complains = match choice {
                0 => Complaint::Degraded,
                1 => Complaint::Load,
                _ => Complaint::None,
            };
            let complains = kernel.complains;
            let text = format!("{} {} says {complains:?}", key.0, key.1);
            inner.told.push(text);
            if let Some(says) = inner.says.get(key) {
                says.send_replace(complains);
            }
        }
    }

    /// Records that an operator wants the serving generation to end, or that the command is done.
    pub(crate) fn ending(&self, instance: &str, ending: bool) {
        self.inner().ending.insert(instance.to_owned(), ending);
    }

    /// Returns true if a kernel still holds every write acknowledged to clients.
    pub(crate) fn state_is_kept(&self, instance: &str) -> bool {
        let inner = self.inner();
        let acknowledged = inner.acknowledged.get(instance).copied().unwrap_or(0);
        let serving = inner
            .kernels
            .iter()
            .find(|((name, _), k)| name == instance && k.alive && k.part == Part::Serving);
        serving.is_none_or(|(_, kernel)| kernel.state == acknowledged)
    }

    pub(crate) fn kill(&self, key: &(String, u64)) {
        let mut inner = self.inner();
        inner.told.push(format!("{} {} dies", key.0, key.1));
        inner.end(key, true);
    }

    pub(crate) fn hang(&self, key: &(String, u64)) {
        let mut inner = self.inner();
        inner.told.push(format!("{} {} hangs", key.0, key.1));
        if let Some(kernel) = inner.kernels.get_mut(key) {
            (kernel.hangs, kernel.hurt) = (true, true);
        }
        inner.cut(key);
    }

    pub(crate) fn flap(&self, key: &(String, u64)) {
        let mut inner = self.inner();
        inner.told.push(format!("{} {} is cut off", key.0, key.1));
        inner.cut(key);
    }

    /// Makes a kernel serve. From here on, its state changes in one place only.
    pub(crate) fn serve(&self, key: &(String, u64)) {
        let mut inner = self.inner();
        let state = inner.kernels.get(key).map_or(0, |kernel| kernel.state);
        let handed = inner.kernels.get(key).is_some_and(|k| k.session > 0);
        if let Some(kernel) = inner.kernels.get_mut(key) {
            kernel.part = Part::Serving;
        }
        let acknowledged = inner.acknowledged.get(&key.0).copied().unwrap_or(0);
        if handed && acknowledged != state {
            let text = format!("{} {} serves {state}, not {acknowledged}", key.0, key.1);
            inner.broken.push(text);
        }
        let others = inner.kernels.iter().filter(|((name, generation), k)| {
            *name == key.0 && *generation != key.1 && k.alive && k.part == Part::Serving
        });
        let others: Vec<_> = others.map(|((_, generation), _)| *generation).collect();
        if !others.is_empty() {
            let text = format!("{} {} serves beside {others:?}", key.0, key.1);
            inner.broken.push(text);
        }
        inner.acknowledged.insert(key.0.clone(), state);
    }

    /// Returns how long an agent takes for a step of a morph, and whether it refuses the step.
    pub(crate) fn thinks(&self) -> (Duration, bool) {
        let mut inner = self.inner();
        let odds = inner.odds.refusals;
        let most = if inner.dice.percent(odds) { 4_000 } else { 12 };
        let wait = Duration::from_millis(inner.dice.below(most));
        (wait, inner.dice.percent(odds))
    }

    pub(crate) async fn takes(&self, most_ms: u64) {
        let wait = self.inner().dice.below(most_ms);
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
}

impl Inner {
    pub(crate) fn end(&mut self, key: &(String, u64), hurt: bool) {
        if let Some(kernel) = self.kernels.get_mut(key) {
            kernel.alive = false;
            kernel.hurt |= hurt;
            kernel.sockets = Arc::default();
        }
        self.cut(key);
        if let Some(ended) = self.ends.get(key) {
            ended.send_replace(true);
        }
    }

    fn cut(&mut self, key: &(String, u64)) {
        if let Some(cut) = self.cuts.get(key) {
            cut.send_modify(|cuts| *cuts += 1);
        }
    }
}
