//! The machine of a run: kernels that start, serve, hang and die as the seed has it, behind a backend and a network that
//! reach them in memory. It outlives the daemon.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kmorph_backends::contract::{
    Backend, BackendError, BackendKind, Endpoint, ExitCause, FenceUnconfirmed, Fenced, MemoryRange,
    Observation, Placement, Proof, SpawnError, SpawnSpec,
};
use kmorph_launch::{InstanceName, StartMode};
use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod, FenceOrder};
use kmp_transport::link::{Address, ConnectError, Connecting, Network, memory};
use tokio::sync::watch;

use crate::agent;
use crate::dice::Dice;

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
    placement: Placement,
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
}

#[derive(Debug)]
struct Inner {
    kernels: BTreeMap<(String, u64), Kernel>,
    dice: Dice,
    odds: Odds,
    /// Links to a kernel, which a flap cuts.
    cuts: BTreeMap<(String, u64), watch::Sender<u64>>,
    ends: BTreeMap<(String, u64), watch::Sender<bool>>,
    /// What clients were told is written, by instance.
    acknowledged: BTreeMap<String, u64>,
    /// Instances of which an operator wants the serving generation to end.
    ending: BTreeMap<String, bool>,
    broken: Vec<String>,
    told: Vec<String>,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Machine(Arc<Mutex<Inner>>);

impl Machine {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            kernels: BTreeMap::new(),
            dice: Dice::new(seed ^ 0x006D_6163_6869_6E65),
            odds: Odds::default(),
            cuts: BTreeMap::new(),
            ends: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            ending: BTreeMap::new(),
            broken: Vec::new(),
            told: Vec::new(),
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
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

    /// A client writes to an instance; whoever serves acknowledges that.
    pub(crate) fn write(&self, instance: &str) {
        let mut inner = self.inner();
        let serving = inner.kernels.iter_mut().find(|((name, _), k)| {
            name == instance && k.alive && !k.hangs && k.part == Part::Serving
        });
        if let Some((_, kernel)) = serving {
            kernel.state += 1;
            let state = kernel.state;
            inner.acknowledged.insert(instance.to_owned(), state);
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

    async fn takes(&self, most_ms: u64) {
        let wait = self.inner().dice.below(most_ms);
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
}

impl Inner {
    fn end(&mut self, key: &(String, u64), hurt: bool) {
        if let Some(kernel) = self.kernels.get_mut(key) {
            kernel.alive = false;
            kernel.hurt |= hurt;
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

fn key(placement: &Placement) -> (String, u64) {
    (placement.name.as_str().to_owned(), placement.generation)
}

fn failed(what: &str) -> BackendError {
    BackendError {
        what: what.to_owned(),
        source: std::io::Error::other("as the seed has it"),
    }
}

#[async_trait]
impl Backend for Machine {
    fn kind(&self) -> BackendKind {
        BackendKind::Embedded
    }

    fn passes_sockets(&self) -> bool {
        true
    }

    async fn probe(&self) -> Result<String, SpawnError> {
        Ok("simulated".to_owned())
    }

    async fn spawn(&self, spec: SpawnSpec) -> Result<Placement, SpawnError> {
        self.takes(40).await;
        let mut inner = self.inner();
        let odds = inner.odds.spawns;
        if inner.dice.percent(odds) {
            return Err(SpawnError::Unavailable("as the seed has it".to_owned()));
        }
        let key = (spec.name.as_str().to_owned(), spec.generation);
        let placement = Placement {
            backend: BackendKind::Embedded,
            name: spec.name,
            generation: spec.generation,
            processes: Vec::new(),
            endpoint: Endpoint::Unix {
                path: PathBuf::from(format!("/{}/{}", key.0, key.1)),
            },
            run_dir: spec.run_dir,
            cpus: spec.cpus,
            memory_bytes: spec.memory_bytes,
            kernel_release: spec.kernel.release().to_owned(),
            host_boot_id: HOST_BOOT.to_owned(),
            containment: Default::default(),
            kernel_instance: None,
        };
        let fresh = matches!(spec.start, StartMode::Fresh);
        let kernel = Kernel {
            part: Part::Waiting { activated: false },
            state: 0,
            session: 0,
            source: spec.predecessor.map(|placement| placement.generation),
            alive: true,
            hangs: false,
            hurt: false,
            placement: placement.clone(),
        };
        inner.told.push(format!("{} {} starts", key.0, key.1));
        inner.kernels.insert(key.clone(), kernel);
        inner.cuts.insert(key.clone(), watch::channel(0).0);
        inner.ends.insert(key.clone(), watch::channel(false).0);
        drop(inner);
        if fresh {
            self.serve(&key);
        }
        Ok(placement)
    }

    async fn find(
        &self,
        name: &InstanceName,
        generation: u64,
        _: &Path,
    ) -> Result<Option<Placement>, BackendError> {
        let inner = self.inner();
        let kernel = inner.kernels.get(&(name.as_str().to_owned(), generation));
        Ok(kernel.map(|kernel| kernel.placement.clone()))
    }

    async fn observe(&self, placement: &Placement) -> Result<Observation, BackendError> {
        let inner = self.inner();
        let alive = inner.kernels.get(&key(placement)).is_some_and(|k| k.alive);
        Ok(match alive {
            true => Observation::Running,
            false => Observation::Ended(ExitCause::Signal { signal: 9 }),
        })
    }

    async fn ended(&self, placement: &Placement) -> ExitCause {
        let ended = self
            .inner()
            .ends
            .get(&key(placement))
            .map(watch::Sender::subscribe);
        if let Some(mut ended) = ended {
            let _ = ended.wait_for(|ended| *ended).await;
        }
        ExitCause::Signal { signal: 9 }
    }

    async fn request_shutdown(&self, placement: &Placement) -> Result<(), BackendError> {
        self.inner().end(&key(placement), false);
        Ok(())
    }

    async fn fence(
        &self,
        placement: &Placement,
        order: FenceOrder,
    ) -> Result<Fenced, FenceUnconfirmed> {
        self.takes(60).await;
        let key = key(placement);
        let mut inner = self.inner();
        let odds = inner.odds.fences;
        if inner.dice.percent(odds) {
            let reason = "as the seed has it".to_owned();
            return Err(FenceUnconfirmed { order, reason });
        }
        let wanted = inner.ending.get(&key.0).copied().unwrap_or(false);
        let healthy = inner
            .kernels
            .get(&key)
            .is_some_and(|k| k.alive && !k.hurt && k.part == Part::Serving);
        if healthy && !wanted {
            let text = format!("{} {} was healthy, served, and is fenced", key.0, key.1);
            inner.broken.push(text);
        }
        inner.told.push(format!("{} {} is fenced", key.0, key.1));
        inner.end(&key, true);
        Ok(Fenced {
            certificate: order.confirm(
                FenceMethod::ProcessesKilled,
                Confirmation::ProcessesGone,
                1,
            ),
            proof: Proof::CgroupEmpty,
        })
    }

    async fn release(
        &self,
        placement: &Placement,
        proof: &FenceCertificate,
    ) -> Result<(), BackendError> {
        let mut inner = self.inner();
        let key = key(placement);
        let alive = inner.kernels.get(&key).is_some_and(|k| k.alive);
        if alive || proof.generation() != key.1 {
            inner
                .broken
                .push(format!("{} {} is released alive", key.0, key.1));
        }
        let odds = inner.odds.releases;
        match inner.dice.percent(odds) {
            true => Err(failed("releasing")),
            false => Ok(()),
        }
    }

    async fn memory_map(&self, _: &Placement) -> Result<Vec<MemoryRange>, BackendError> {
        Ok(Vec::new())
    }
}

impl Network for Machine {
    fn connect(&self, address: Address, port: u32) -> Connecting {
        let machine = self.clone();
        Box::pin(async move {
            let unreachable = |address: Address| ConnectError::Unreachable {
                address,
                port,
                source: std::io::ErrorKind::NotFound.into(),
            };
            let Address::Unix(path) = &address else {
                return Err(unreachable(address));
            };
            let mut parts = path.iter().skip(1).filter_map(|part| part.to_str());
            let name = parts.next().unwrap_or_default().to_owned();
            let generation = parts.next().and_then(|n| n.parse().ok()).unwrap_or(0);
            let key = (name, generation);
            let there = machine.with(&key, |k| k.alive && !k.hangs).unwrap_or(false);
            let cut = machine.inner().cuts.get(&key).map(watch::Sender::subscribe);
            let (true, Some(cut)) = (there, cut) else {
                return Err(unreachable(address));
            };
            let (daemons, kernels) = memory();
            tokio::spawn(agent::serve(machine, key, kernels, cut));
            Ok(daemons)
        })
    }
}
