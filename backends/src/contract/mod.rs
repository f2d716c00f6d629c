//! The contract that every backend implements.
//!
//! A backend starts, observes, fences and ends instances, and says how to reach them. It makes no decisions: the
//! engines decide when to fence or respawn. The rules:
//!
//! 1. [`Backend::spawn`] returns when the instance's processes exist and its [`Placement`] is complete, not when the
//!    instance is healthy. The instance is a session of its own and survives the daemon.
//! 2. A [`Placement`] is plain data. Written to the journal and read by another daemon process, it is sufficient to
//!    observe, reach, fence or terminate the instance. It identifies processes by pid, exact start time *and* boot
//!    id, and the cgroup by path and inode, so that nothing reused is ever mistaken for the instance.
//! 3. [`Backend::find`] recovers the placement of a spawn whose outcome was never recorded because the daemon died
//!    meanwhile. It reads what exists, not what was intended.
//! 4. [`Backend::fence`] returns a certificate only after *observing* that nothing of the generation can run or do
//!    I/O any more. If it cannot confirm that, it says so and keeps everything; a timeout is never a confirmation. A
//!    fence of a generation that has already ended is confirmed the same way.
//! 5. [`Backend::release`] frees the resources of a fenced generation (sockets, memory, files). It needs the
//!    certificate. Until then the agent's key is in the run directory ([`crate::key::KEY_FILE`]), in every backend: a
//!    directory without a key belongs to nothing that may be running.
//! 6. Every call can be repeated: a second fence or release of the same generation succeeds.
//! 7. [`Backend::freeze`] stops a running generation and says whether it did: a generation that had already stopped
//!    must not be resumed by [`Backend::resume`]. The caller records the freeze before it calls, so that a later
//!    daemon can resume.
//! 8. [`Backend::lend`] lets a survivor read memory of a fenced generation, but never write to it. Whatever the
//!    survivor does with it, [`Backend::take_back`] finishes within the backend's own time limit, and another daemon
//!    can take back what this one lent.
//! 9. A backend refuses a [`Placement`] that another backend created ([`Backend::check_own`]): what it sees of such a
//!    generation means nothing, so it never reports it ended, fenced or released.

mod capabilities;
mod placement;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kmorph_launch::{InstanceName, PublishedPort, StartMode, WorkloadSpec};
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use serde::{Deserialize, Serialize};

use crate::kernel_image::KernelImage;

pub use capabilities::{PANIC_LINE, Uncaptured, Untested};
pub use placement::{CgroupId, Containment, Endpoint, KernelInstance, Placement, ProcessId};

/// Name, in a generation's run directory, of the socket on which its agent hands over descriptors.
pub const HANDOVER_SOCKET: &str = "handover.sock";

/// Name, in a generation's run directory, of an ELF core with a note of the kind `NT_PRSTATUS` for each of
/// its CPUs, and hardly any memory.
pub const REGISTERS: &str = "registers.elf";

/// Which backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendKind {
    /// A child process running the agent.
    Embedded,
    /// A Linux kernel in QEMU.
    Qemu,
    /// A Linux kernel on its own CPUs and memory, beside the host's.
    Multikernel,
}

impl BackendKind {
    /// The name used in configuration, journal, API and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Qemu => "qemu",
            Self::Multikernel => "multikernel",
        }
    }
}

/// A listening socket on the host for one published port.
#[derive(Debug)]
pub struct HostListener {
    /// The published port of the workload.
    pub port: PublishedPort,
    /// The bound, listening socket; a duplicate of the daemon's own.
    pub socket: OwnedFd,
}

/// The order for a spawn. The generation is durable in the journal before this is built.
#[derive(Debug)]
pub struct SpawnSpec {
    /// The instance.
    pub name: InstanceName,
    /// Its new incarnation.
    pub generation: u64,
    /// The kernel to run: read and checked, its hash known.
    pub kernel: KernelImage,
    /// Appended to the backend's own kernel command line.
    pub cmdline: String,
    /// An initramfs of the user's own, used instead of the built one (qemu).
    pub initramfs: Option<PathBuf>,
    /// Host CPUs granted by the pool; never empty.
    pub cpus: Vec<u16>,
    /// Memory granted by the pool, in bytes.
    pub memory_bytes: u64,
    /// The program of the instance, if any.
    pub workload: Option<WorkloadSpec>,
    /// Ports of the workload.
    pub ports: Vec<PublishedPort>,
    /// Listening sockets for those ports, in the same order, where the backend passes sockets
    /// ([`Backend::passes_sockets`]); empty otherwise.
    pub listeners: Vec<HostListener>,
    /// Fresh, or the new side of a morph.
    pub start: StartMode,
    /// The generation it takes over from, in a morph.
    pub predecessor: Option<Arc<Placement>>,
    /// Directory for this generation's sockets, logs and files: `<run>/instances/<name>/<generation>`.
    /// The backend creates it, mode 0700.
    pub run_dir: PathBuf,
    /// Its vsock address: an address, not an identity.
    pub cid: u32,
}

/// How an instance ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ExitCause {
    /// Its main process was ended by a signal.
    Signal {
        /// Signal number.
        signal: i32,
    },
    /// Its main process, or its kernel, ended by itself.
    Exited {
        /// Exit status; `None` for a guest that powered off or a process that was not our child.
        status: Option<i32>,
    },
    /// Its kernel panicked. The processes still exist and hold its memory.
    KernelPanicked,
    /// Its kernel asked for a reset.
    Reset,
}

impl std::fmt::Display for ExitCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Signal { signal } => write!(f, "ended by signal {signal}"),
            Self::Exited {
                status: Some(status),
            } => write!(f, "exited with status {status}"),
            Self::Exited { status: None } => f.write_str("ended"),
            Self::KernelPanicked => f.write_str("its kernel panicked"),
            Self::Reset => f.write_str("its kernel reset itself"),
        }
    }
}

/// The observed state of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// Running.
    Running,
    /// The instance exists but executes nothing (SIGSTOP, a paused guest).
    Stopped,
    /// The instance has ended.
    Ended(ExitCause),
}

/// The host scheduler's account of one thread (proc_pid_schedstat(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadTime {
    /// Its number on the host.
    pub thread: i32,
    /// Time on a CPU since its start, up to the last tick of the scheduler.
    pub ran: Duration,
    /// Time since its start during which it was runnable but waited for a CPU. A wait in progress is not included.
    pub waited: Duration,
    /// Whether it runs or is ready to.
    pub runnable: bool,
}

/// One range of an instance's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Address in the instance.
    pub guest_address: u64,
    /// Length in bytes.
    pub length: u64,
    /// File on the host through which a process can map it.
    pub host_path: PathBuf,
    /// Offset of the range in that file.
    pub host_offset: u64,
}

/// CPUs and memory of the machine's pool that a daemon's own generations do not account for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldBesides {
    /// Physical ids; ids above 65535 are left out.
    pub cpus: Vec<u16>,
    /// Bytes, with what the kernel keeps for its bookkeeping.
    pub memory_bytes: u64,
}

/// Memory of a fenced generation that a surviving instance can read now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loan {
    /// Location of the memory for the survivor's kernel.
    pub place: LentPlace,
    /// Which memory it is: by ascending offset, none over another; never empty.
    pub windows: Vec<LentWindow>,
}

/// Location of lent memory for a survivor's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LentPlace {
    /// BAR 2 of the one device below a PCI port, by the port's address in the survivor, such as `0000:00:1e.0`.
    PciPort(String),
}

/// Part of what a survivor was lent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LentWindow {
    /// Its physical address in the fenced kernel.
    pub guest_address: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset of its start in the lent memory, in bytes.
    pub offset: u64,
}

/// Why a spawn failed. Nothing of it is left, unless the error says so.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The request is invalid; the user must change it.
    #[error("{0}")]
    Refused(String),
    /// The machine lacks something: the operator's to provide.
    #[error("{0}")]
    Unavailable(String),
    /// The spawn failed, and parts of it could not be undone: [`Backend::find`] finds them, and they are fenced and
    /// released like a running generation.
    #[error("{0}")]
    Remains(String),
    /// The system failed while doing it.
    #[error("{what}: {source}")]
    System {
        /// The attempted action and its object.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// The evidence for a confirmation; `docs/operations.md` says what each proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// The kernel reported the cgroup of its processes empty, and a scan of `/proc` found none outside.
    CgroupEmpty,
    /// Two scans of `/proc` in a row found none of its processes.
    ScansEmpty,
    /// The host's kernel answered for its kernel instance (multikernel).
    KernelReport,
    /// The generation was started in an earlier boot of the host.
    HostRebooted,
}

impl Proof {
    /// The name used in the journal and in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CgroupEmpty => "cgroup_empty",
            Self::ScansEmpty => "scans_empty",
            Self::KernelReport => "kernel_report",
            Self::HostRebooted => "host_rebooted",
        }
    }
}

/// A confirmed fence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// The certificate.
    pub certificate: FenceCertificate,
    /// The evidence for its confirmation.
    pub proof: Proof,
}

/// A fence that could not be confirmed. The order comes back, so that it can be tried again.
#[derive(Debug, thiserror::Error)]
#[error("the fence could not be confirmed: {reason}")]
pub struct FenceUnconfirmed {
    /// The order, still to be carried out.
    pub order: FenceOrder,
    /// The observation that contradicts the end.
    pub reason: String,
}

/// Any other failure.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct BackendError {
    /// The attempted action and its object.
    pub what: String,
    /// The system's reason.
    pub source: std::io::Error,
}

/// A way to run instances. The module documentation has the rules.
#[async_trait]
pub trait Backend: Send + Sync {
    /// Which one it is.
    fn kind(&self) -> BackendKind;

    /// Refuses a placement that another backend made.
    ///
    /// # Errors
    /// If `placement` names another backend than [`Backend::kind`].
    fn check_own(&self, placement: &Placement) -> Result<(), BackendError> {
        if placement.backend == self.kind() {
            return Ok(());
        }
        let reason = format!(
            "the {} backend runs it, not the {} backend",
            placement.backend.as_str(),
            self.kind().as_str()
        );
        Err(BackendError {
            what: format!("{} generation {}", placement.name, placement.generation),
            source: std::io::Error::new(std::io::ErrorKind::InvalidInput, reason),
        })
    }

    /// True when published ports work by passing the listening socket to the workload, false when
    /// the daemon's forwarder carries bytes to the workload over vsock.
    fn passes_sockets(&self) -> bool;

    /// The listening sockets that a running generation was passed, where it is passed them: duplicates of those that it
    /// has. Blocking.
    ///
    /// # Errors
    /// If it does not answer, or not with sockets.
    fn passed_sockets(&self, placement: &Placement) -> std::io::Result<Vec<OwnedFd>> {
        kmorph_launch::handover::ask_listeners(&placement.run_dir.join(HANDOVER_SOCKET))
    }

    /// Checks once that instances can be started here at all, and says in a line what was found
    /// (accelerator, vsock device). Called at the daemon's start.
    ///
    /// # Errors
    /// If something it needs is missing, naming it and how to get it.
    async fn probe(&self) -> Result<String, SpawnError>;

    /// Removes what earlier daemons wrote down of generations below `run_dir` of which nothing is left; what was done, in
    /// a line each. Called once at the daemon's start, after it has taken over what runs and before it starts anything.
    ///
    /// # Errors
    /// If the system could not be asked.
    async fn tidy(&self, run_dir: &std::path::Path) -> Result<Vec<String>, BackendError> {
        let _ = run_dir;
        Ok(Vec::new())
    }

    /// Resources of the machine's pool in use by others than the generations below `run_dir` that are `counted`, by
    /// instance and number; none if the pool is the daemon's own.
    ///
    /// # Errors
    /// If the system could not be asked.
    async fn held_besides(
        &self,
        run_dir: &std::path::Path,
        counted: &[(String, u64)],
    ) -> Result<Option<HeldBesides>, BackendError> {
        let _ = (run_dir, counted);
        Ok(None)
    }

    /// Starts an instance.
    ///
    /// # Errors
    /// If it was not started; nothing is left behind then, except after [`SpawnError::Remains`].
    async fn spawn(&self, spec: SpawnSpec) -> Result<Placement, SpawnError>;

    /// Looks for a spawn that may or may not have happened.
    ///
    /// # Errors
    /// If the system could not be asked.
    async fn find(
        &self,
        name: &InstanceName,
        generation: u64,
        run_dir: &std::path::Path,
    ) -> Result<Option<Placement>, BackendError>;

    /// Observes the current state of the generation.
    ///
    /// # Errors
    /// If the system could not be asked.
    async fn observe(&self, placement: &Placement) -> Result<Observation, BackendError>;

    /// Completes when the instance ends, its kernel panics or resets, and says how. At once when it
    /// has ended already. Dropping the future stops watching and disturbs nothing. Never completes for a placement
    /// of another backend.
    async fn ended(&self, placement: &Placement) -> ExitCause;

    /// Asks it to shut down by itself; does not wait for it.
    ///
    /// # Errors
    /// If it could not be asked.
    async fn request_shutdown(&self, placement: &Placement) -> Result<(), BackendError>;

    /// Stops the generation for good and confirms it.
    ///
    /// # Errors
    /// If the end could not be confirmed within the backend's own bound.
    async fn fence(
        &self,
        placement: &Placement,
        order: FenceOrder,
    ) -> Result<Fenced, FenceUnconfirmed>;

    /// Frees what a fenced generation held. Logs are kept.
    ///
    /// # Errors
    /// If something could not be freed; what, is named.
    async fn release(
        &self,
        placement: &Placement,
        proof: &FenceCertificate,
    ) -> Result<(), BackendError>;

    /// The instance's memory as the host can map it; empty where there is none to map. It stays there until the
    /// generation is released, also after its fence.
    ///
    /// # Errors
    /// If the system could not be asked.
    async fn memory_map(&self, placement: &Placement) -> Result<Vec<MemoryRange>, BackendError>;

    /// The accounts that the host's scheduler keeps of its processes' threads, as of now; none where the host keeps none.
    /// Reads a few files of `/proc` and does not wait.
    fn scheduled(&self, placement: &Placement) -> Vec<ThreadTime> {
        let _ = placement;
        Vec::new()
    }

    /// The panic message on the instance's console, else the last lines printed there, as one line of printable
    /// characters; none if the backend keeps no console, or nothing was printed. Reads at most 64 KiB and does not
    /// wait.
    fn console_tail(&self, placement: &Placement) -> Option<String> {
        let _ = placement;
        None
    }

    /// Has the memory of an instance that is about to be fenced last until its release also when the daemon does not;
    /// false where there is none to keep.
    ///
    /// # Errors
    /// If it lasts no longer than the daemon.
    async fn keep_memory(&self, placement: &Placement) -> Result<bool, BackendError> {
        let _ = placement;
        Ok(false)
    }

    /// Has an instance execute nothing until it is resumed, with its memory as it is; false when it executed nothing
    /// before: it has ended, its kernel panicked, or somebody else stopped it.
    ///
    /// # Errors
    /// If the backend cannot do it, or it could not be confirmed; it may be frozen all the same.
    async fn freeze(&self, placement: &Placement) -> Result<bool, BackendError> {
        Err(cannot("freezing", self.kind(), placement))
    }

    /// Resumes a frozen instance. An instance that is already running, or has ended, is left as it is.
    ///
    /// # Errors
    /// If it could not be confirmed.
    async fn resume(&self, placement: &Placement) -> Result<(), BackendError> {
        Err(cannot("resuming", self.kind(), placement))
    }

    /// Options for the kernel command line with which [`Backend::provoke_panic`] makes the kernel panic; none if the
    /// backend cannot do that, or captures no memory.
    fn panic_cmdline(&self) -> Option<&'static str> {
        None
    }

    /// Has the instance's kernel panic, for a test. It was started with [`Backend::panic_cmdline`].
    ///
    /// # Errors
    /// If it could not be done.
    async fn provoke_panic(&self, placement: &Placement) -> Result<(), BackendError> {
        Err(cannot("panicking the kernel of", self.kind(), placement))
    }

    /// Has the registers of its CPUs written into the file [`REGISTERS`] of its run directory; false where it
    /// has none, or nothing is left that knows them. The file goes with the release. For an instance that is
    /// frozen, or has failed and was not fenced yet: it may be stopped for a moment.
    ///
    /// # Errors
    /// If they should be there, and could not be had.
    async fn save_registers(&self, placement: &Placement) -> Result<bool, BackendError> {
        let _ = placement;
        Ok(false)
    }

    /// Lends a survivor memory of a fenced generation, as [`Backend::memory_map`] names it, for reading only: the end
    /// of it where it cannot be had whole. None where the backend cannot, or this survivor has no place for it. What
    /// the survivor was lent before is taken back first. The survivor's kernel may find it only a moment later. What
    /// the fenced kernel never touched can take memory of the host when it is read this way, until the release.
    ///
    /// # Errors
    /// If nothing was lent.
    async fn lend(
        &self,
        survivor: &Placement,
        memory: &[MemoryRange],
    ) -> Result<Option<Loan>, BackendError> {
        let _ = (survivor, memory);
        Ok(None)
    }

    /// Takes back what a survivor was lent, if anything; one that has ended has nothing any more.
    ///
    /// # Errors
    /// If its kernel has not let go of it within the backend's bound. It can be tried again.
    async fn take_back(&self, survivor: &Placement) -> Result<(), BackendError> {
        let _ = survivor;
        Ok(())
    }
}

fn cannot(what: &str, kind: BackendKind, placement: &Placement) -> BackendError {
    let reason = format!("the {} backend cannot", kind.as_str());
    BackendError {
        what: format!("{what} {}", placement.name),
        source: std::io::Error::new(std::io::ErrorKind::Unsupported, reason),
    }
}
