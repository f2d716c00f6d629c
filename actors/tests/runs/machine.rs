//! The machine of a run: kernels that start, serve, hang and die as the seed has it. It outlives the daemon. How the
//! daemon reaches them is in `backend`.

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

/// The boot of the host in every run.
pub(crate) const HOST_BOOT: &str = "00000000-0000-4000-8000-000000000001";

/// Where a kernel stands in its life and in a morph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// It answers its clients.
    Serving,
    /// It was frozen; the last round has, or has not, been answered.
    Frozen { holding: bool },
    /// The target of a morph, which has, or has not, taken over the state.
    Waiting { activated: bool },
    /// The source of a committed morph.
    Retired,
}

/// One generation.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) part: Part,
    /// What its clients have written, as far as it holds that.
    pub(crate) state: u64,
    /// The session of its part.
    pub(crate) session: u64,
    /// The generation whose state it takes over.
    pub(crate) source: Option<u64>,
    pub(crate) alive: bool,
    /// It answers nothing.
    pub(crate) hangs: bool,
    /// Something was done to it that a daemon may fence it for.
    pub(crate) hurt: bool,
    /// It executes nothing, because its memory is read.
    pub(crate) stopped: bool,
    /// State that came in by rounds and is not taken over yet.
    pub(crate) incoming: u64,
    /// What it says of itself.
    pub(crate) complains: Complaint,
    /// Fences that will not be confirmed.
    pub(crate) stubborn: u32,
    /// What it held is given back.
    pub(crate) released: bool,
    /// The listening sockets that it was passed.
    pub(crate) sockets: Arc<Vec<OwnedFd>>,
    pub(crate) placement: Placement,
}

/// What a kernel's agent complains of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Complaint {
    #[default]
    None,
    /// Its program is not well.
    Degraded,
    /// Its program has ended.
    Ended,
    /// There is more to do than its CPUs can.
    Load,
}

/// What one daemon's machine is like, for a whole run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Make {
    /// Its kernels' memory can be captured.
    pub(crate) captures: bool,
}

/// What goes wrong besides what the schedule does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Odds {
    /// Spawns that fail, of a hundred.
    pub(crate) spawns: u32,
    /// Fences that are not confirmed, of a hundred.
    pub(crate) fences: u32,
    /// Releases that fail, of a hundred.
    pub(crate) releases: u32,
    /// Memories that cannot be read, freezes and resumes that fail, of a hundred.
    pub(crate) memories: u32,
    /// Steps of a morph that an agent refuses, or does not answer in time, of a hundred.
    pub(crate) refusals: u32,
    /// Kernels whose fence is not confirmed for a long time, of a hundred.
    pub(crate) stubborn: u32,
    /// Kernels that begin with a complaint, of a hundred.
    pub(crate) complaints: u32,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) kernels: BTreeMap<(String, u64), Kernel>,
    pub(crate) dice: Dice,
    pub(crate) odds: Odds,
    pub(crate) make: Make,
    /// Where the memories are.
    pub(crate) dir: PathBuf,
    /// Links to a kernel, which a flap cuts.
    pub(crate) cuts: BTreeMap<(String, u64), watch::Sender<u64>>,
    pub(crate) ends: BTreeMap<(String, u64), watch::Sender<bool>>,
    /// What agents say by themselves.
    pub(crate) says: BTreeMap<(String, u64), watch::Sender<Complaint>>,
    /// Published ports, by instance.
    ports: BTreeMap<String, SocketAddr>,
    /// Kernels of an instance that will die soon after their start.
    crashes: BTreeMap<String, u32>,
    /// What clients were told is written, by instance.
    acknowledged: BTreeMap<String, u64>,
    /// Instances of which an operator wants the serving generation to end.
    pub(crate) ending: BTreeMap<String, bool>,
    pub(crate) broken: Vec<String>,
    pub(crate) told: Vec<String>,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Machine(Arc<Mutex<Inner>>);

impl Machine {
    /// A machine in which nothing runs. `dir` is for its kernels' memories.
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

    /// Rules that were broken so far.
    pub(crate) fn broken(&self) -> Vec<String> {
        self.inner().broken.clone()
    }

    /// Notes a rule that was broken.
    pub(crate) fn breaks(&self, text: String) {
        self.inner().broken.push(text);
    }

    /// What happened to the kernels since it was asked last.
    pub(crate) fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.inner().told)
    }

    /// The kernel of a generation, to look at or to change.
    pub(crate) fn with<T>(
        &self,
        key: &(String, u64),
        look: impl FnOnce(&mut Kernel) -> T,
    ) -> Option<T> {
        self.inner().kernels.get_mut(key).map(look)
    }

    /// Generations that live.
    pub(crate) fn living(&self) -> Vec<(String, u64)> {
        let inner = self.inner();
        let living = inner.kernels.iter().filter(|(_, k)| k.alive);
        living.map(|(key, _)| key.clone()).collect()
    }

    /// A port that an instance publishes.
    pub(crate) fn publish(&self, instance: &str, port: SocketAddr) {
        self.inner().ports.insert(instance.to_owned(), port);
    }

    /// The port of an instance, if it publishes one.
    pub(crate) fn port_of(&self, instance: &str) -> Option<SocketAddr> {
        self.inner().ports.get(instance).copied()
    }

    /// A client writes to an instance; whoever serves acknowledges that. What serves is reached by the instance's port,
    /// whether a daemon lives or not.
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

    /// The next kernels of an instance die soon after their start.
    pub(crate) fn crash(&self, instance: &str, times: u32) {
        let mut inner = self.inner();
        inner
            .told
            .push(format!("{instance} will crash {times} times"));
        inner.crashes.insert(instance.to_owned(), times);
    }

    /// No kernel dies by itself any more.
    pub(crate) fn calm(&self) {
        self.inner().crashes.clear();
    }

    /// What the agent of a kernel says by itself; a complaint that it begins with is news.
    pub(crate) fn says(&self, key: &(String, u64)) -> Option<watch::Receiver<Complaint>> {
        let inner = self.inner();
        let mut says = inner.says.get(key)?.subscribe();
        if *says.borrow() != Complaint::None {
            says.mark_changed();
        }
        Some(says)
    }

    /// A kernel executes nothing for a moment, shorter than a verdict takes.
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

    /// The next fences of a kernel are not confirmed.
    pub(crate) fn stubborn(&self, key: &(String, u64), fences: u32) {
        self.with(key, |kernel| kernel.stubborn = fences);
    }

    /// Whether the frozen source of a target would go on by itself when its lease runs out: it does not know that the
    /// commit may be in the journal.
    pub(crate) fn source_may_go_on(&self, target: &(String, u64), session: u64) -> bool {
        let inner = self.inner();
        inner.kernels.iter().any(|((name, generation), kernel)| {
            let other = *name == target.0 && *generation != target.1;
            let frozen = kernel.part == Part::Frozen { holding: false };
            other && kernel.alive && kernel.session == session && frozen
        })
    }

    /// The oldest kernel of an instance that lives.
    pub(crate) fn oldest(&self, instance: &str) -> Option<(String, u64)> {
        let living = self.living();
        living.into_iter().find(|(name, _)| name == instance)
    }

    /// The newest kernel of an instance.
    pub(crate) fn newest(&self, instance: &str) -> Option<(String, u64)> {
        let living = self.living();
        living.into_iter().rfind(|(name, _)| name == instance)
    }

    /// The time after which a kernel that starts now dies, if it does.
    pub(crate) fn dies_after(&self, instance: &str) -> Option<Duration> {
        let mut inner = self.inner();
        let left = inner.crashes.get_mut(instance).filter(|left| **left > 0)?;
        *left -= 1;
        Some(Duration::from_millis(inner.dice.below(1_200)))
    }

    /// A kernel's agent begins to complain, or ceases to.
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

    /// An operator wants what serves to end, or has what they wanted.
    pub(crate) fn ending(&self, instance: &str, ending: bool) {
        self.inner().ending.insert(instance.to_owned(), ending);
    }

    /// Whether what clients were told is written is there.
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

    /// Whatever is done to a kernel from here on, its state changes by one place only.
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

    /// How long an agent thinks about a step of a morph, and whether it refuses.
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
