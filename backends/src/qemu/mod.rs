//! The qemu backend: an instance is a Linux kernel in QEMU, under KVM if that works, else in software emulation.
//!
//! ```text
//!  daemon ── CONNECT 9000 ──▶ vhost-user vsock device ── shared memory ──┐
//!         ── QMP ───────────▶ QEMU ─ guest memory (memfd), vCPUs pinned ─┴▶ guest: agent as init
//! ```
//!
//! * [`probe`](self) determines the machine's capabilities by trial; this module builds the guest image from the
//!   agent, its libraries and the modules that the kernel needs.
//! * Instead of the vhost-user device, a guest can use the host side of kerf-vsock: an ivshmem device, and
//!   `kerf-vsock.ko` in the guest.
//! * The guest's pvpanic driver reports a panic as an event, and the guest stops with its memory intact; without that
//!   driver the panicked kernel resets, which ends QEMU. The backend sees both at once.
//! * The fence is SIGKILL to QEMU and the device, confirmed by their exit. Without them nothing of the guest can run,
//!   and its pending I/O is gone with the memory.

mod command;
mod console;
mod freezing;
mod keeping;
mod lending;
mod memory;
mod prepare;
mod probe;
mod qmp;
mod registers;
mod run_dir;
mod start;
mod watch;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use kmorph_launch::InstanceName;
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use serde_json::json;
use tokio::sync::OnceCell;

use self::command::{Accelerator, Machine, VsockDevice};
use self::prepare::Prepared;
use self::probe::{KvmProbe, Version};
use self::start::{KERF_ROLE, QEMU_ROLE, ROLES, Starting, VHOST_ROLE};
use self::watch::Watches;
use crate::cgroup::{self, Cgroups, NoCgroups};
use crate::contract::{
    Backend, BackendError, BackendKind, Endpoint, ExitCause, FenceUnconfirmed, Fenced, Loan,
    MemoryRange, Observation, Placement, ProcessId, SpawnError, SpawnSpec, ThreadTime,
};
use crate::process::{Exits, Stat};
use crate::{birth, fencing, finding};

/// Makes a kernel panic on a non-maskable interrupt (Linux, admin-guide/kernel-parameters.txt).
const PANICS_ON_NMI: &str = "unknown_nmi_panic=1";
/// The host kernel's own vsock device.
const VHOST_VSOCK: &str = "/dev/vhost-vsock";

/// The choice of accelerator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM if it is proved to work, otherwise software emulation.
    #[default]
    Auto,
    /// KVM only: if a trial shows that it does not work, no instance starts.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// Configuration of the backend.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// The agent, in its build for guests.
    pub agent: PathBuf,
    /// `qemu-system-x86_64`.
    pub program: PathBuf,
    /// `vhost-device-vsock`, used on a host without `/dev/vhost-vsock`.
    pub vhost_vsock: PathBuf,
    /// kerf-vsock, instead of virtio-vsock.
    pub kerf: Option<KerfConfig>,
    /// The choice of accelerator.
    pub accel: AccelChoice,
    /// Directory with a `<release>` directory of modules for each kernel; searched before the image's own directory,
    /// `lib/modules` next to the image, and `/lib/modules`.
    pub modules: Option<PathBuf>,
    /// Directory for built guest images.
    pub cache: PathBuf,
    /// The cgroups of its generations, or why there are none.
    pub cgroups: Arc<Result<Cgroups, NoCgroups>>,
}

/// Configuration of vsock over shared memory (`docs/kerf-vsock.md`).
#[derive(Clone, Debug)]
pub struct KerfConfig {
    /// `kmorph-kerf-host`.
    pub program: PathBuf,
    /// Directory with `<release>/kerf-vsock.ko` for each kernel.
    pub modules: PathBuf,
}

impl KerfConfig {
    fn module(&self, release: &str) -> PathBuf {
        self.modules.join(release).join("kerf-vsock.ko")
    }
}

/// See the module's documentation.
pub struct QemuBackend {
    config: QemuConfig,
    host_boot_id: String,
    exits: Arc<Exits>,
    watches: Watches,
    memory: memory::Held,
    kvm: KvmProbe,
    version: OnceCell<Version>,
}

impl QemuBackend {
    /// Creates a backend from `config`.
    ///
    /// # Errors
    /// If the host's boot id cannot be read.
    pub fn new(config: QemuConfig) -> io::Result<Self> {
        let host_boot_id = kmorph_launch::boot_id()?;
        Ok(Self {
            kvm: KvmProbe::new(&config.program, &host_boot_id, &config.cache),
            config,
            host_boot_id,
            exits: Arc::new(Exits::default()),
            watches: Watches::default(),
            memory: memory::Held::default(),
            version: OnceCell::new(),
        })
    }

    async fn version(&self) -> Result<&Version, SpawnError> {
        let ask = || Version::of(&self.config.program);
        self.version.get_or_try_init(ask).await
    }

    async fn accelerator(&self, kernel: &Path) -> Result<Accelerator, SpawnError> {
        match self.config.accel {
            AccelChoice::Kvm => {
                let version = self.version().await?;
                self.kvm.required(version, Some(kernel)).await
            }
            AccelChoice::Tcg => Ok(Accelerator::Tcg),
            AccelChoice::Auto => Ok(self.kvm.accelerator(self.version().await?, kernel).await),
        }
    }

    /// Starts the processes; the placement contains those that were started, also after a failure.
    async fn start(&self, prepared: &mut Prepared) -> Result<(), SpawnError> {
        let placement = &mut prepared.placement;
        let directory = placement.run_dir.clone();
        let cpus = placement.cpus.clone();
        let containment = placement.containment.clone();
        let cgroup = prepared.cgroup.as_ref();
        let system = |what: &'static str| {
            move |source| SpawnError::System {
                what: what.to_owned(),
                source,
            }
        };
        let vsock = match &placement.endpoint {
            Endpoint::Vsock { cid } | Endpoint::ChosenVsock { cid, .. } => {
                VsockDevice::Kernel { cid: *cid }
            }
            Endpoint::Unix { path } => {
                let socket = directory.join(run_dir::VHOST);
                let (role, line) = match &self.config.kerf {
                    None => {
                        let program = &self.config.vhost_vsock;
                        let line = command::vhost_vsock(program, prepared.cid, &socket, path);
                        (VHOST_ROLE, line)
                    }
                    Some(kerf) => {
                        let line = command::kerf_host(&kerf.program, &socket, path);
                        (KERF_ROLE, line)
                    }
                };
                let device = Starting {
                    role,
                    agent: &self.config.agent,
                    line,
                    run_dir: &directory,
                    log: run_dir::VHOST_LOG,
                    cpus: &cpus,
                    cgroup,
                    containment: &containment,
                };
                let process = device
                    .start()
                    .await
                    .map_err(system("starting the vsock device"))?;
                placement.processes.push(process.clone());
                device.wait_for(&process, run_dir::VHOST).await?;
                match self.config.kerf {
                    None => VsockDevice::VhostUser { socket },
                    Some(_) => VsockDevice::Kerf { socket },
                }
            }
        };
        let machine = Machine {
            qemu: &self.config.program,
            name: format!("{}.{}", placement.name, placement.generation),
            accelerator: prepared.accelerator,
            kernel: &prepared.kernel,
            initramfs: &directory.join(run_dir::INITRAMFS),
            cmdline: &prepared.cmdline,
            vcpus: cpus.len(),
            memory_mib: placement.memory_bytes >> 20,
            vsock,
            console: directory.join(run_dir::CONSOLE),
            commands: directory.join(run_dir::COMMANDS),
            events: directory.join(run_dir::EVENTS),
        };
        let qemu = Starting {
            role: QEMU_ROLE,
            agent: &self.config.agent,
            line: machine.command_line(),
            run_dir: &directory,
            log: run_dir::QEMU_LOG,
            cpus: &cpus,
            cgroup,
            containment: &containment,
        };
        let process = qemu.start().await.map_err(system("starting QEMU"))?;
        // The process whose end is the instance's end comes first.
        placement.processes.insert(0, process.clone());
        qemu.wait_for(&process, run_dir::EVENTS).await?;
        match start::pin_vcpus(&directory, &cpus).await {
            Ok(()) => Ok(()),
            Err(source) => {
                // QEMU may have ended instead: then its output is the reason.
                qemu.wait_for(&process, run_dir::COMMANDS).await?;
                let said = console::tail(&directory.join(run_dir::QEMU_LOG));
                Err(SpawnError::System {
                    what: format!("pinning the virtual CPUs (QEMU said {said:?})"),
                    source,
                })
            }
        }
    }

    /// Returns the state that the process alone shows; `None` if it runs, so that the caller must query QEMU.
    async fn observe_process(&self, qemu: &ProcessId) -> io::Result<Option<Observation>> {
        let stat = Stat::read(qemu.pid)?;
        match stat.filter(|stat| stat.is(qemu)) {
            Some(stat) if matches!(stat.state, b'T' | b't') => Ok(Some(Observation::Stopped)),
            Some(stat) if !stat.is_over() => Ok(None),
            _ => {
                let cause = self.exits.wait(qemu).await?;
                Ok(Some(Observation::Ended(cause)))
            }
        }
    }

    /// Removes everything of a failed spawn except its logs. `error` is the reason of the failure.
    async fn undo(&self, placement: &Placement, error: SpawnError) -> SpawnError {
        let order = FenceOrder::new(placement.generation);
        let undone = match self.fence(placement, order).await {
            Ok(fenced) => {
                let released = self.release(placement, &fenced.certificate).await;
                released.map_err(|why| why.to_string())
            }
            Err(unconfirmed) => Err(unconfirmed.to_string()),
        };
        match undone {
            Ok(()) => error,
            Err(why) => SpawnError::Remains(format!(
                "{error}; and some of the started processes remain: {why}"
            )),
        }
    }

    /// Returns QEMU's own process; `None` if it was never started, or in another boot of the host.
    fn qemu_of<'a>(&self, placement: &'a Placement) -> Option<&'a ProcessId> {
        let now = placement.host_boot_id == self.host_boot_id;
        let first = placement.processes.first();
        first.filter(|process| now && process.role == QEMU_ROLE)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, SpawnError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| SpawnError::System {
        what: "preparing the guest image".to_owned(),
        source: io::Error::other(error),
    })
}

fn system(spec: &SpawnSpec) -> impl Fn(&str) -> Box<dyn FnOnce(io::Error) -> SpawnError> + use<> {
    let of = format!("for {} generation {}", spec.name, spec.generation);
    move |what| {
        let what = format!("{what} {of}");
        Box::new(move |source| SpawnError::System { what, source })
    }
}

fn failed(what: String) -> impl FnOnce(io::Error) -> BackendError {
    move |source| BackendError { what, source }
}

#[async_trait]
impl Backend for QemuBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Qemu
    }

    fn passes_sockets(&self) -> bool {
        false
    }

    async fn probe(&self) -> Result<String, SpawnError> {
        let version = self.version().await?;
        let agent = &self.config.agent;
        if !agent.is_file() {
            return Err(SpawnError::Unavailable(format!(
                "the agent {agent:?} does not exist; name it with paths.agent"
            )));
        }
        let accelerator = match self.config.accel {
            AccelChoice::Auto => self.kvm.first(version).await,
            AccelChoice::Kvm => {
                self.kvm.required(version, None).await?;
                "kvm, as configured".to_owned()
            }
            AccelChoice::Tcg => "software emulation, as configured".to_owned(),
        };
        let vsock = if let Some(kerf) = &self.config.kerf {
            probe::first_line(&kerf.program).await.map_err(|reason| {
                SpawnError::Unavailable(format!(
                    "the host's side of kerf-vsock ({:?}) cannot be used: {reason}; name \
                     kmorph-kerf-host with qemu.kerf_host",
                    kerf.program
                ))
            })?
        } else if Path::new(VHOST_VSOCK).exists() {
            VHOST_VSOCK.to_owned()
        } else {
            let program = &self.config.vhost_vsock;
            let line = probe::first_line(program).await.map_err(|reason| {
                SpawnError::Unavailable(format!(
                    "this host has no {VHOST_VSOCK}, and vhost-device-vsock ({program:?}) cannot be \
                     used: {reason}; load the module vhost_vsock, or run scripts/fetch-vhost-vsock \
                     and name the program with qemu.vhost_vsock"
                ))
            })?;
            probe::judge_vsock_device(&line)
        };
        let version = &version.text;
        let cgroups = cgroup::told(&self.config.cgroups);
        Ok(format!(
            "qemu {version}, {accelerator}; vsock: {vsock}; {cgroups}"
        ))
    }

    async fn spawn(&self, spec: SpawnSpec) -> Result<Placement, SpawnError> {
        Self::check(&spec)?;
        let mut prepared = self.prepare(&spec).await?;
        if let Err(error) = self.start(&mut prepared).await {
            return Err(self.undo(&prepared.placement, error).await);
        }
        Ok(prepared.placement)
    }

    async fn find(
        &self,
        name: &InstanceName,
        generation: u64,
        run_dir: &Path,
    ) -> Result<Option<Placement>, BackendError> {
        let (name, run_dir) = (name.clone(), run_dir.to_owned());
        let (kind, boot_id) = (self.kind(), self.host_boot_id.clone());
        let what = failed(format!("searching for {name} generation {generation}"));
        let look = move || finding::find(kind, &name, generation, &run_dir, &ROLES, &boot_id);
        let found = tokio::task::spawn_blocking(look).await;
        found.map_err(io::Error::other).flatten().map_err(what)
    }

    async fn observe(&self, placement: &Placement) -> Result<Observation, BackendError> {
        self.check_own(placement)?;
        let Some(qemu) = self.qemu_of(placement) else {
            return Ok(Observation::Ended(ExitCause::Exited { status: None }));
        };
        if let Some(cause) = self.watches.seen(qemu) {
            return Ok(Observation::Ended(cause));
        }
        let what = || failed(format!("observing QEMU, process {}", qemu.pid));
        if let Some(seen) = self.observe_process(qemu).await.map_err(what())? {
            return Ok(seen);
        }
        let socket = placement.run_dir.join(run_dir::COMMANDS);
        match qmp::status(&socket).await {
            Ok(status) => Ok(match status.as_str() {
                "running" => Observation::Running,
                "guest-panicked" => Observation::Ended(ExitCause::KernelPanicked),
                "shutdown" => Observation::Ended(ExitCause::Exited { status: None }),
                _ => Observation::Stopped,
            }),
            // QEMU may have been stopped, or have ended, before it could answer.
            Err(error) => match self.observe_process(qemu).await.map_err(what())? {
                Some(seen) => Ok(seen),
                None => Err(what()(error)),
            },
        }
    }

    async fn ended(&self, placement: &Placement) -> ExitCause {
        if self.check_own(placement).is_err() {
            return std::future::pending().await;
        }
        match self.qemu_of(placement) {
            Some(qemu) => {
                let directory = &placement.run_dir;
                // A guest can run without this, but cannot be captured; a request for a vmcore will report that.
                let _ = self.memory.hold(qemu, directory);
                self.watches.ended(qemu, directory, &self.exits).await
            }
            None => ExitCause::Exited { status: None },
        }
    }

    async fn request_shutdown(&self, placement: &Placement) -> Result<(), BackendError> {
        self.check_own(placement)?;
        // All init programs understand this request: Ctrl-Alt-Del, SIGINT to PID 1.
        let keys = ["ctrl", "alt", "delete"].map(|key| json!({"type": "qcode", "data": key}));
        let socket = placement.run_dir.join(run_dir::COMMANDS);
        let sent = qmp::command(&socket, "send-key", Some(json!({ "keys": keys }))).await;
        match sent {
            Ok(_) => Ok(()),
            // QEMU has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(error) => Err(failed(format!("asking {} to shut down", placement.name))(
                error,
            )),
        }
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
        if let Some(qemu) = self.qemu_of(placement) {
            let _ = self.memory.hold(qemu, &placement.run_dir);
        }
        fencing::fence(placement, &self.exits, &self.host_boot_id, order).await
    }

    async fn release(
        &self,
        placement: &Placement,
        proof: &FenceCertificate,
    ) -> Result<(), BackendError> {
        self.check_own(placement)?;
        fencing::check_proof(placement, proof)?;
        // Includes memory that another daemon held, and that a helper process has kept for this one.
        let mut given = match self.qemu_of(placement) {
            Some(qemu) => self.memory.hold(qemu, &placement.run_dir).map(drop),
            None => Ok(()),
        };
        let ended = keeping::end(&placement.run_dir, &self.exits).await;
        given = given.and(ended);
        for process in &placement.processes {
            self.watches.forget(process);
            self.exits.forget(process);
            if let Some(memory) = self.memory.take(process) {
                let work = tokio::task::spawn_blocking(move || memory::give_back(&memory));
                given = given.and(work.await.map_err(io::Error::other).flatten());
            }
        }
        let what = |what: &str| failed(format!("{what} of {}", placement.name));
        finding::remove_cgroup(&placement.containment).map_err(what("removing the cgroup"))?;
        birth::forget(&placement.run_dir, &ROLES).map_err(what("removing the records"))?;
        for name in run_dir::REMOVED {
            let path = placement.run_dir.join(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(format!("removing {path:?}"))(error));
                }
                _ => {}
            }
        }
        given.map_err(what("releasing the memory"))
    }

    async fn memory_map(&self, placement: &Placement) -> Result<Vec<MemoryRange>, BackendError> {
        let Some(qemu) = self.qemu_of(placement) else {
            return Ok(Vec::new());
        };
        let what = || {
            failed(format!(
                "searching for the memory of QEMU, process {}",
                qemu.pid
            ))
        };
        self.memory
            .ranges(qemu, &placement.run_dir, placement.memory_bytes)
            .map_err(what())
    }

    fn scheduled(&self, placement: &Placement) -> Vec<ThreadTime> {
        crate::scheduling::accounts(&placement.processes)
    }

    fn console_tail(&self, placement: &Placement) -> Option<String> {
        let said = console::last_words(&placement.run_dir.join(run_dir::CONSOLE));
        Some(said).filter(|said| !said.is_empty())
    }

    async fn keep_memory(&self, placement: &Placement) -> Result<bool, BackendError> {
        let Some(qemu) = self.qemu_of(placement) else {
            return Ok(false);
        };
        let kept = self.memory.keep(qemu, &placement.run_dir);
        kept.map_err(failed(format!("keeping the memory of {}", placement.name)))
    }

    async fn freeze(&self, placement: &Placement) -> Result<bool, BackendError> {
        if self.observe(placement).await? != Observation::Running {
            return Ok(false);
        }
        let frozen = freezing::freeze(&placement.run_dir).await;
        frozen.map_err(failed(format!("freezing {}", placement.name)))?;
        Ok(true)
    }

    async fn resume(&self, placement: &Placement) -> Result<(), BackendError> {
        if let Observation::Ended(_) = self.observe(placement).await? {
            return Ok(());
        }
        let resumed = freezing::resume(&placement.run_dir).await;
        resumed.map_err(failed(format!("resuming {}", placement.name)))
    }

    fn panic_cmdline(&self) -> Option<&'static str> {
        Some(PANICS_ON_NMI)
    }

    async fn provoke_panic(&self, placement: &Placement) -> Result<(), BackendError> {
        let socket = placement.run_dir.join(run_dir::COMMANDS);
        let sent = qmp::command(&socket, "inject-nmi", None).await;
        let what = format!("sending a non-maskable interrupt to {}", placement.name);
        sent.map(drop).map_err(failed(what))
    }

    async fn save_registers(&self, placement: &Placement) -> Result<bool, BackendError> {
        let Some(qemu) = self.qemu_of(placement) else {
            return Ok(false);
        };
        let what = || failed(format!("asking QEMU, process {}, for registers", qemu.pid));
        match self.observe_process(qemu).await.map_err(what())? {
            // QEMU runs, whatever its guest does, so it can be queried.
            None => {
                let saved = registers::save(&placement.run_dir).await;
                saved.map(|()| true).map_err(what())
            }
            Some(_) => Ok(false),
        }
    }

    async fn lend(
        &self,
        survivor: &Placement,
        memory: &[MemoryRange],
    ) -> Result<Option<Loan>, BackendError> {
        let what = failed(format!("lending memory to {}", survivor.name));
        lending::lend(&survivor.run_dir, memory).await.map_err(what)
    }

    async fn take_back(&self, survivor: &Placement) -> Result<(), BackendError> {
        let ended = async || {
            let seen = self.observe(survivor).await?;
            Ok(matches!(seen, Observation::Ended(_)))
        };
        // A dead kernel no longer reads its memory, and the fence handles the end of its QEMU.
        if ended().await? {
            return Ok(());
        }
        match lending::take_back(&survivor.run_dir).await {
            Err(_) if ended().await? => Ok(()),
            taken => taken.map_err(failed(format!(
                "taking back the memory lent to {}",
                survivor.name
            ))),
        }
    }
}
