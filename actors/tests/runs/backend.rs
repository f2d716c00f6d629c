//! The daemon's access to the machine of a run: a backend, and a network of links in memory.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
use crate::machine::{Complaint, HOST_BOOT, Inner, Kernel, Machine, Part};

/// Size of a kernel's memory, bytes.
const MEMORY_BYTES: usize = 2 * 4096;
/// Number of fences of a stubborn kernel that are not confirmed: more than any engine tries.
const STUBBORN: u32 = 12;

fn key(placement: &Placement) -> (String, u64) {
    (placement.name.as_str().to_owned(), placement.generation)
}

fn failed(what: &str) -> BackendError {
    BackendError {
        what: what.to_owned(),
        source: io::Error::other("as the seed has it"),
    }
}

/// Returns the path of the file that holds a kernel's memory.
fn memory_of(inner: &Inner, (name, generation): &(String, u64)) -> PathBuf {
    inner.dir.join(format!("{name}-{generation}"))
}

#[async_trait]
impl Backend for Machine {
    /// Only a guest's memory can be captured.
    fn kind(&self) -> BackendKind {
        match self.inner().make.captures {
            true => BackendKind::Qemu,
            false => BackendKind::Embedded,
        }
    }

    fn passes_sockets(&self) -> bool {
        true
    }

    fn passed_sockets(&self, placement: &Placement) -> io::Result<Vec<OwnedFd>> {
        let inner = self.inner();
        let answers = |k: &&Kernel| k.alive && !k.hangs && !k.stopped;
        let kernel = inner.kernels.get(&key(placement)).filter(answers);
        let kernel = kernel.ok_or_else(|| io::Error::other("it does not answer"))?;
        kernel.sockets.iter().map(OwnedFd::try_clone).collect()
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
        let kind = match inner.make.captures {
            true => BackendKind::Qemu,
            false => BackendKind::Embedded,
        };
        if inner.make.captures {
            std::fs::write(memory_of(&inner, &key), [0xA5; MEMORY_BYTES]).unwrap();
        }
        let odds = inner.odds;
        let stubborn = match inner.dice.percent(odds.stubborn) {
            true => STUBBORN,
            false => 0,
        };
        let complains = match inner.dice.percent(odds.complaints) {
            true if inner.dice.percent(50) => Complaint::Ended,
            true => Complaint::Degraded,
            false => Complaint::None,
        };
        let sockets = spec.listeners.into_iter().map(|listener| listener.socket);
        let sockets: Arc<Vec<OwnedFd>> = Arc::new(sockets.collect());
        let placement = Placement {
            backend: kind,
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
            // The daemon gives up a spawn whose program ends.
            hurt: complains == Complaint::Ended,
            stopped: false,
            incoming: 0,
            complains,
            stubborn,
            released: false,
            sockets,
            placement: placement.clone(),
        };
        inner.told.push(format!("{} {} starts", key.0, key.1));
        inner.kernels.insert(key.clone(), kernel);
        inner.cuts.insert(key.clone(), watch::channel(0).0);
        inner.ends.insert(key.clone(), watch::channel(false).0);
        inner.says.insert(key.clone(), watch::channel(complains).0);
        drop(inner);
        if fresh {
            self.serve(&key);
        }
        if let Some(after) = self.dies_after(&key.0) {
            let machine = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                machine.kill(&key);
            });
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
        let there = kernel.filter(|kernel| !kernel.released);
        Ok(there.map(|kernel| kernel.placement.clone()))
    }

    async fn observe(&self, placement: &Placement) -> Result<Observation, BackendError> {
        let inner = self.inner();
        let kernel = inner.kernels.get(&key(placement)).filter(|k| k.alive);
        Ok(match kernel {
            Some(kernel) if kernel.stopped => Observation::Stopped,
            Some(_) => Observation::Running,
            None => Observation::Ended(ExitCause::Signal { signal: 9 }),
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
        let stubborn = inner.kernels.get_mut(&key).is_some_and(|kernel| {
            let stubborn = kernel.stubborn > 0;
            kernel.stubborn = kernel.stubborn.saturating_sub(1);
            stubborn
        });
        if inner.dice.percent(odds) || stubborn {
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
        if inner.dice.percent(odds) {
            return Err(failed("releasing"));
        }
        if inner.make.captures {
            let _ = std::fs::remove_file(memory_of(&inner, &key));
        }
        if let Some(kernel) = inner.kernels.get_mut(&key) {
            kernel.released = true;
        }
        Ok(())
    }

    async fn memory_map(&self, placement: &Placement) -> Result<Vec<MemoryRange>, BackendError> {
        let mut inner = self.inner();
        let odds = inner.odds.memories;
        if inner.dice.percent(odds) {
            return Err(failed("asking for its memory"));
        }
        let key = key(placement);
        let there = inner.kernels.get(&key).is_some_and(|k| !k.released);
        if !there || !inner.make.captures {
            return Ok(Vec::new());
        }
        Ok(vec![MemoryRange {
            guest_address: 0,
            length: MEMORY_BYTES as u64,
            host_path: memory_of(&inner, &key),
            host_offset: 0,
        }])
    }

    async fn freeze(&self, placement: &Placement) -> Result<bool, BackendError> {
        self.takes(30).await;
        let mut inner = self.inner();
        let odds = inner.odds.memories;
        let fails = inner.dice.percent(odds);
        let text = format!("{} {} stands still", placement.name, placement.generation);
        let kernel = inner.kernels.get_mut(&key(placement));
        let Some(kernel) = kernel.filter(|k| k.alive && !k.stopped) else {
            return Ok(false);
        };
        // An operation that fails may have taken effect nevertheless.
        kernel.stopped = true;
        inner.told.push(text);
        match fails {
            true => Err(failed("freezing")),
            false => Ok(true),
        }
    }

    async fn resume(&self, placement: &Placement) -> Result<(), BackendError> {
        self.takes(30).await;
        let mut inner = self.inner();
        let odds = inner.odds.memories;
        let fails = inner.dice.percent(odds);
        let text = format!("{} {} goes on", placement.name, placement.generation);
        let Some(kernel) = inner.kernels.get_mut(&key(placement)) else {
            return Ok(());
        };
        if fails {
            // The kernel stays stopped, and the daemon may heal it as a kernel that hangs.
            kernel.hurt = true;
            return Err(failed("resuming"));
        }
        kernel.stopped = false;
        inner.told.push(text);
        Ok(())
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
            let there = machine
                .with(&key, |k| k.alive && !k.hangs && !k.stopped)
                .unwrap_or(false);
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
