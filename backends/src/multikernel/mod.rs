//! The multikernel backend: an instance is a Linux kernel on its own CPUs and memory, beside the host's kernel.
//!
//! ```text
//!  daemon ── /sys/fs/multikernel: overlays, status ──▶ host's kernel ── kexec_file_load, reboot ──▶ instance's kernel
//!         ── kerf's records and lock                                                                agent as init
//!         ── AF_VSOCK, over the kernels' own transport ────────────────────────────────────────────────┘
//! ```
//!
//! * libkerf implements the kernel's interface; this module uses it to run instances.
//! * `layout`: checks whether a kernel may run beside the host's. `slots`: the generation in each kernel instance.
//!   `spawn`, `observe`, `fence`, `release`: the life cycle. `memory` for vmcores, `preflight` for the daemon's start.
//! * `network`: checks which devices a guest would lose in the other kernel instance.
//! * `kcore`: the host's view of an instance's memory.
//! * An instance has no process on the host: its placement names a kernel instance instead.
//!
//! The calls block, some for seconds, so each runs on its own thread.

mod fence;
pub mod kcore;
mod layout;
mod memory;
mod network;
mod observe;
mod preflight;
mod release;
mod slots;
mod spawn;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use kmorph_files::{OwnDir, PRIVATE_DIR};
use kmorph_launch::InstanceName;
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use libkerf::check::SLACK_BYTES;
use libkerf::kernel::{Calls, Kernel, SystemCalls};
use libkerf::model::Instance;
use libkerf::record::Records;

use self::layout::Agreements;
use self::observe::LOOK_EVERY;
use self::slots::{Content, Slots};
use self::spawn::Boot;
use crate::contract::{
    Backend, BackendError, BackendKind, Containment, Endpoint, ExitCause, FenceUnconfirmed, Fenced,
    HeldBesides, KernelInstance, MemoryRange, Observation, Placement, SpawnError, SpawnSpec,
};
use crate::fencing;
use crate::guest::{self, GuestImage, Recipe};
use crate::key;

pub use self::layout::Layout;
pub use self::memory::HostMemory;

/// The option of an AF_VSOCK socket that selects the transport between kernels (`net/vmw_vsock/af_vsock.c` of
/// multikernel Linux).
pub const VSOCK_OPTION: u16 = 9;
/// Path of the kernel's files.
pub const ROOT: &str = libkerf::kernel::ROOT;
/// Path of kerf's lock.
pub const LOCK: &str = libkerf::kernel::KERF_LOCK;
/// Directory of kerf's records.
pub const RECORDS: &str = libkerf::record::DIRECTORY;
/// Directory in which kerf pins the routes of netdevs.
pub const XDP_PINS: &str = network::XDP_PINS;
/// The module that carries vsock between kernels; loaded unless it is built in.
const NEEDED: [&str; 1] = ["mk_transport"];
/// Name of a generation's initramfs.
const INITRAMFS: &str = "initramfs.img";

/// Configuration of the backend.
#[derive(Clone, Debug)]
pub struct MultikernelConfig {
    /// The agent, in its build for instances.
    pub agent: PathBuf,
    /// The kernel's files.
    pub root: PathBuf,
    /// kerf's lock.
    pub lock: PathBuf,
    /// The directory of kerf's records.
    pub records: PathBuf,
    /// Directory with a `<release>` directory of modules for each kernel; searched first.
    pub modules: Option<PathBuf>,
    /// Directory for built guest images.
    pub cache: PathBuf,
    /// The connection to instances.
    pub vsock: Vsock,
    /// How the layout of a kernel image is ensured.
    pub layout: Layout,
    /// The files from which an instance's memory is read.
    pub memory: HostMemory,
    /// Directory in which kerf pins the routes of netdevs.
    pub xdp_pins: PathBuf,
}

/// The connection to instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vsock {
    /// AF_VSOCK. An instance's context id is the sum of its kernel instance's id and `cid_offset`.
    Kernel {
        /// Added to the id: 0 with the kernel's own transport.
        cid_offset: u32,
        /// The socket option that selects the transport; `None` if there is no choice.
        option: Option<i32>,
    },
    /// A Unix socket `<id>.sock` for each instance, which accepts `CONNECT <port>`: for emulated kernels.
    Sockets {
        /// Directory of the sockets.
        directory: PathBuf,
    },
}

impl fmt::Display for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel { option: None, .. } => f.write_str("AF_VSOCK"),
            Self::Kernel {
                option: Some(option),
                ..
            } => write!(f, "AF_VSOCK, chosen by option {option}"),
            Self::Sockets { directory } => write!(f, "sockets in {}", directory.display()),
        }
    }
}

impl Vsock {
    fn endpoint(&self, id: u32) -> Endpoint {
        match self {
            Self::Kernel { cid_offset, option } => {
                let cid = id.saturating_add(*cid_offset);
                match option {
                    Some(option) => Endpoint::ChosenVsock {
                        cid,
                        option: *option,
                    },
                    None => Endpoint::Vsock { cid },
                }
            }
            Self::Sockets { directory } => Endpoint::Unix {
                path: directory.join(format!("{id}.sock")),
            },
        }
    }

    fn option(&self) -> Option<i32> {
        match self {
            Self::Kernel { option, .. } => *option,
            Self::Sockets { .. } => None,
        }
    }
}

/// All CPUs and memory of the kernel's pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelPool {
    /// Physical ids; ids above 65535 are left out.
    pub cpus: Vec<u16>,
    /// Size of the memory, bytes.
    pub memory_bytes: u64,
    /// Memory reserved for the kernel's own bookkeeping per kernel instance, bytes.
    pub bookkeeping_bytes: u64,
}

/// See the module's documentation.
pub struct MultikernelBackend {
    config: MultikernelConfig,
    host_boot_id: String,
    slots: Arc<Slots>,
    agreements: Arc<Agreements>,
}

impl MultikernelBackend {
    /// Creates a backend for the running kernel.
    ///
    /// # Errors
    /// If the host's boot id cannot be read.
    pub fn new(config: MultikernelConfig) -> io::Result<Self> {
        Self::with_calls(config, Box::new(SystemCalls))
    }

    /// As [`MultikernelBackend::new`], with loads, boots and halts made through `calls`.
    ///
    /// # Errors
    /// If the host's boot id cannot be read.
    pub fn with_calls(
        config: MultikernelConfig,
        calls: Box<dyn Calls + Send + Sync>,
    ) -> io::Result<Self> {
        let host_boot_id = kmorph_launch::boot_id()?;
        let kernel = Kernel::at(&config.root, &config.lock);
        let records = Records::in_directory(&config.records);
        Ok(Self {
            slots: Arc::new(Slots::new(kernel, records, calls, host_boot_id.clone())),
            host_boot_id,
            config,
            agreements: Arc::default(),
        })
    }

    /// Returns the kernel's current pool: instances get resources of this pool, not of the host.
    ///
    /// # Errors
    /// If it cannot be read, or does not exist.
    pub fn pool(config: &MultikernelConfig) -> io::Result<KernelPool> {
        let state = Kernel::at(&config.root, &config.lock).state(None);
        let resources = state.map_err(io::Error::other)?.system.resources;
        Ok(KernelPool {
            memory_bytes: u64::try_from(resources.memory_bytes()).unwrap_or(u64::MAX),
            bookkeeping_bytes: SLACK_BYTES,
            cpus: short(&resources.cpus),
        })
    }

    /// Runs work that blocks.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Slots) -> T + Send + 'static,
    ) -> io::Result<T> {
        let slots = Arc::clone(&self.slots);
        let done = tokio::task::spawn_blocking(move || work(&slots)).await;
        done.map_err(io::Error::other)
    }

    /// Returns the image for the kernel, without its configuration. Blocking.
    fn image(config: &MultikernelConfig, spec: &SpawnSpec) -> Result<GuestImage, SpawnError> {
        if let Some(own) = &spec.initramfs {
            return GuestImage::own(own).map_err(guest::image_failed);
        }
        let workload = spec.workload.as_ref().map(|w| w.program.clone());
        let recipe = Recipe {
            release: spec.kernel.release().to_owned(),
            modules: guest::modules_of(spec, config.modules.as_deref()),
            needed: match &config.vsock {
                Vsock::Kernel {
                    option: Some(_), ..
                } => &NEEDED,
                Vsock::Kernel { option: None, .. } | Vsock::Sockets { .. } => &[],
            },
            welcome: &[],
            agent: config.agent.clone(),
            kerf: None,
            programs: workload.into_iter().collect(),
        };
        recipe.image(&config.cache).map_err(guest::image_failed)
    }

    /// Creates the run directory with the files to boot. Blocking.
    fn prepare(config: &MultikernelConfig, spec: &SpawnSpec) -> Result<Boot, SpawnError> {
        let system = |what: &str| {
            let what = format!("{what} for {} generation {}", spec.name, spec.generation);
            move |source| SpawnError::System { what, source }
        };
        let cmdline = spawn::cmdline(&spec.cmdline)?;
        let mut image = Self::image(config, spec)?;
        let run_dir = OwnDir::make(&spec.run_dir, PRIVATE_DIR);
        let run_dir = run_dir.map_err(|e| system("making the run directory")(e.into()))?;
        let key = key::make().map_err(system("making the agent's key"))?;
        key::keep(&run_dir, &key).map_err(system("keeping the agent's key"))?;
        let told = guest::agent_config(spec, key, image.modules, config.vsock.option());
        let told = told.to_json().map_err(io::Error::from);
        let told = told.map_err(system("writing the agent's configuration"))?;
        let initramfs = run_dir.empty_file(INITRAMFS).map_err(io::Error::from);
        initramfs
            .and_then(|file| guest::with_configuration(&mut image.archive, &told, file))
            .map_err(system("writing the guest image"))?;
        Ok(Boot {
            kernel: spec.kernel.path().to_owned(),
            initramfs: spec.run_dir.join(INITRAMFS),
            cmdline,
        })
    }

    fn placement(
        &self,
        of: (&InstanceName, u64, &Path),
        kernel_release: String,
        kernel_instance: KernelInstance,
        has: &Instance,
    ) -> Placement {
        let (name, generation, run_dir) = of;
        Placement {
            backend: BackendKind::Multikernel,
            name: name.clone(),
            generation,
            processes: Vec::new(),
            endpoint: self.config.vsock.endpoint(kernel_instance.id),
            run_dir: run_dir.to_owned(),
            cpus: short(&has.cpus),
            memory_bytes: has.memory_bytes,
            kernel_release,
            host_boot_id: self.host_boot_id.clone(),
            containment: Containment::default(),
            kernel_instance: Some(kernel_instance),
        }
    }
}

/// Returns physical ids in the daemon's 16-bit form. Larger ids, which some machines have, are left out: the
/// kernel's own tree has the complete list.
fn short(cpus: &[u64]) -> Vec<u16> {
    let mut cpus: Vec<u16> = cpus
        .iter()
        .filter_map(|cpu| u16::try_from(*cpu).ok())
        .collect();
    cpus.sort_unstable();
    cpus
}

fn failed<E: std::error::Error>(what: String) -> impl FnOnce(E) -> BackendError {
    move |error| BackendError {
        what,
        source: io::Error::other(error.to_string()),
    }
}

#[async_trait]
impl Backend for MultikernelBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Multikernel
    }

    fn passes_sockets(&self) -> bool {
        false
    }

    async fn probe(&self) -> Result<String, SpawnError> {
        let config = self.config.clone();
        let looked = self
            .blocking(move |slots| preflight::look(&config, slots))
            .await;
        let looked = looked.map_err(|source| SpawnError::System {
            what: "checking the machine".to_owned(),
            source,
        })?;
        looked.map_err(|missing| {
            SpawnError::Unavailable(format!(
                "this machine cannot run the multikernel backend: {}",
                missing.join("; ")
            ))
        })
    }

    async fn tidy(&self, run_dir: &Path) -> Result<Vec<String>, BackendError> {
        let what = || "reading the records of kernel instances".to_owned();
        let run_dir = run_dir.to_owned();
        let looked = self.blocking(move |slots| slots.tidy(&run_dir)).await;
        let tidied = looked.map_err(failed(what()))?.map_err(failed(what()))?;
        Ok(tidied.iter().map(ToString::to_string).collect())
    }

    async fn held_besides(
        &self,
        run_dir: &Path,
        counted: &[(String, u64)],
    ) -> Result<Option<HeldBesides>, BackendError> {
        let what = || "reading the resources of kernel instances".to_owned();
        let (run_dir, counted) = (run_dir.to_owned(), counted.to_vec());
        let looked = self
            .blocking(move |slots| slots.held_besides(&run_dir, &counted))
            .await;
        let held = looked.map_err(failed(what()))?.map_err(failed(what()))?;
        let bytes = |instance: &Instance| instance.memory_bytes.saturating_add(SLACK_BYTES);
        let cpus: Vec<u64> = held.iter().flat_map(|held| held.cpus.clone()).collect();
        Ok(Some(HeldBesides {
            cpus: short(&cpus),
            memory_bytes: held.iter().map(bytes).fold(0, u64::saturating_add),
        }))
    }

    async fn spawn(&self, spec: SpawnSpec) -> Result<Placement, SpawnError> {
        guest::check(&spec)?;
        guest::check_memory(spec.memory_bytes)?;
        let config = self.config.clone();
        let agreements = Arc::clone(&self.agreements);
        let begun = self.blocking(move |slots| {
            // Checked at the daemon's start too, but a module can be unloaded later.
            preflight::reachable(&config.vsock).map_err(SpawnError::Unavailable)?;
            agreements.check(&config.layout, &spec.kernel)?;
            let boot = Self::prepare(&config, &spec)?;
            let started = slots.spawn(&spec, &boot, &config.xdp_pins);
            if started.is_err() {
                let _ = std::fs::remove_file(&boot.initramfs);
            }
            started.map(|started| (spec, started))
        });
        let started = begun.await.map_err(|source| SpawnError::System {
            what: "starting a kernel".to_owned(),
            source,
        })?;
        let (spec, (kernel_instance, has)) = started?;
        let of = (&spec.name, spec.generation, spec.run_dir.as_path());
        let release = spec.kernel.release().to_owned();
        Ok(self.placement(of, release, kernel_instance, &has))
    }

    async fn find(
        &self,
        name: &InstanceName,
        generation: u64,
        run_dir: &Path,
    ) -> Result<Option<Placement>, BackendError> {
        let what = || format!("searching for {name} generation {generation}");
        let (wanted, own_dir) = (name.clone(), run_dir.to_owned());
        let look = self.blocking(move |slots| {
            for name in Slots::names(&wanted) {
                let Content::Marked(mark, _) = slots.content(&name)? else {
                    continue;
                };
                // Includes fenced generations, which remain to be released.
                if !mark.is_of(generation, &own_dir) {
                    continue;
                }
                let (id, has) = (slots.kernel.id(&name)?, slots.kernel.instance(&name)?);
                let record = slots.records.load(&name)?;
                return Ok(Some((KernelInstance { name, id }, has, record)));
            }
            Ok::<_, slots::SlotError>(None)
        });
        let found = look
            .await
            .map_err(failed(what()))?
            .map_err(failed(what()))?;
        Ok(found.map(|(kernel_instance, has, record)| {
            let version = record.and_then(|record| record.kernel?.version);
            let release = version.unwrap_or_default();
            let release = release.split(' ').next().unwrap_or_default().to_owned();
            let of = (name, generation, run_dir);
            self.placement(of, release, kernel_instance, &has)
        }))
    }

    async fn observe(&self, placement: &Placement) -> Result<Observation, BackendError> {
        self.check_own(placement)?;
        let what = || format!("looking at {}", described(placement));
        let owned = placement.clone();
        let seen = self.blocking(move |slots| slots.observe(&owned)).await;
        seen.map_err(failed(what()))?.map_err(failed(what()))
    }

    async fn ended(&self, placement: &Placement) -> ExitCause {
        if self.check_own(placement).is_err() {
            return std::future::pending().await;
        }
        loop {
            // If this query fails, the next one may succeed; otherwise the heartbeats will detect the end.
            if let Ok(Observation::Ended(cause)) = self.observe(placement).await {
                return cause;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn request_shutdown(&self, placement: &Placement) -> Result<(), BackendError> {
        self.check_own(placement)?;
        let what = || format!("asking {} to halt", described(placement));
        if self.observe(placement).await? != Observation::Running {
            return Ok(());
        }
        let Some(KernelInstance { name, .. }) = placement.kernel_instance.clone() else {
            return Ok(());
        };
        observe::note_asked(&placement.run_dir).map_err(failed(what()))?;
        // The kernel waits up to 30 s for the instance, so no task here waits for the kernel. The status shows the
        // result.
        let slots = Arc::clone(&self.slots);
        let ask = move || drop(slots.kernel.halt(&*slots.calls, &name));
        let asked = std::thread::Builder::new()
            .name("halt".to_owned())
            .spawn(ask);
        asked.map(drop).map_err(failed(what()))
    }

    async fn fence(
        &self,
        placement: &Placement,
        order: FenceOrder,
    ) -> Result<Fenced, FenceUnconfirmed> {
        if let Err(error) = self.check_own(placement) {
            let reason = error.to_string();
            return Err(FenceUnconfirmed { order, reason });
        }
        let generation = order.generation();
        let owned = placement.clone();
        let fenced = self.blocking(move |slots| slots.fence(&owned, order)).await;
        fenced.unwrap_or_else(|error| {
            Err(FenceUnconfirmed {
                order: FenceOrder::new(generation),
                reason: error.to_string(),
            })
        })
    }

    async fn release(
        &self,
        placement: &Placement,
        proof: &FenceCertificate,
    ) -> Result<(), BackendError> {
        self.check_own(placement)?;
        fencing::check_proof(placement, proof)?;
        let what = || format!("releasing {}", described(placement));
        let owned = placement.clone();
        let released = self.blocking(move |slots| slots.release(&owned)).await;
        released.map_err(failed(what()))??;
        for name in [INITRAMFS, key::KEY_FILE] {
            let path = placement.run_dir.join(name);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    let what = format!("removing {path:?}");
                    return Err(BackendError { what, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A kernel beside the host's cannot be stopped and resumed, so a running one cannot be frozen.
    async fn freeze(&self, placement: &Placement) -> Result<bool, BackendError> {
        match self.observe(placement).await? {
            Observation::Running => Err(BackendError {
                what: format!("freezing {}", described(placement)),
                source: io::Error::new(
                    io::ErrorKind::Unsupported,
                    "a kernel beside the host's runs until it is halted; its memory can be captured once it has \
                     failed, or by the policy vmcore",
                ),
            }),
            _ => Ok(false),
        }
    }

    async fn memory_map(&self, placement: &Placement) -> Result<Vec<MemoryRange>, BackendError> {
        let what = || format!("searching for the memory of {}", described(placement));
        let (owned, host) = (placement.clone(), self.config.memory.clone());
        let mapped = self
            .blocking(move |slots| slots.memory_map(&host, &owned))
            .await;
        mapped.map_err(failed(what()))?
    }
}

fn described(placement: &Placement) -> String {
    let instance = placement.kernel_instance.as_ref();
    let name = instance.map_or("none", |instance| instance.name.as_str());
    format!(
        "{} generation {} (kernel instance {name})",
        placement.name, placement.generation
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instances_address_follows_from_its_id() {
        let kernel = |cid_offset, option| Vsock::Kernel { cid_offset, option };
        assert_eq!(
            kernel(0, Some(VSOCK_OPTION.into())).endpoint(3),
            Endpoint::ChosenVsock { cid: 3, option: 9 }
        );
        assert_eq!(kernel(2, None).endpoint(3), Endpoint::Vsock { cid: 5 });
        let directory = PathBuf::from("/run/x");
        assert_eq!(
            Vsock::Sockets { directory }.endpoint(3),
            Endpoint::Unix {
                path: "/run/x/3.sock".into()
            }
        );
    }
}
