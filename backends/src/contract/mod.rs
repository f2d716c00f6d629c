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
//! 3. [`Backend::find`] recovers the placement of a spawn whose outcome was never recorded because the daemon died.
//!    It reads the actual state, not the intended one.
//! 4. [`Backend::fence`] returns a certificate only after *observing* that nothing of the generation can run or do
//!    I/O any more. If it cannot confirm that, it returns an error and keeps everything; a timeout is never a
//!    confirmation. A fence of a generation that has already ended is confirmed the same way.
//! 5. [`Backend::release`] frees the resources of a fenced generation (sockets, memory, files). It needs the
//!    certificate. Until then the agent's key is in the run directory ([`crate::key::KEY_FILE`]), in every backend: a
//!    directory without a key belongs to no generation that may be running.
//! 6. Every call can be repeated: a second fence or release of the same generation succeeds.
//! 7. [`Backend::freeze`] stops a running generation and returns whether it did: a generation that had already
//!    stopped must not be resumed by [`Backend::resume`]. The caller records the freeze before it calls, so that a
//!    later daemon can resume.
//! 8. [`Backend::lend`] lets a survivor read memory of a fenced generation, but never write to it. Whatever the
//!    survivor does with the memory, [`Backend::take_back`] finishes within the backend's own timeout, and another
//!    daemon can take back a loan of this one.
//! 9. A backend refuses a [`Placement`] that another backend created ([`Backend::check_own`]): its observations of
//!    such a generation are meaningless, so it never reports the generation ended, fenced or released.

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

/// Name, in a generation's run directory, of an ELF core with a note of the type `NT_PRSTATUS` for each of
/// its CPUs, and almost no memory.
pub const REGISTERS: &str = "registers.elf";

/// The kind of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendKind {
    /// A child process running the agent.
    Embedded,
    /// A Linux kernel in QEMU.
    Qemu,
    /// A Linux kernel on its own CPUs and memory, next to the host's.
    Multikernel,
}

impl BackendKind {
    /// Returns the name used in configuration, journal, API and logs.
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

/// The parameters of a spawn. The generation is durable in the journal before this is created.
#[derive(Debug)]
pub struct SpawnSpec {
    /// The instance.
    pub name: InstanceName,
    /// Its new incarnation.
    pub generation: u64,
    /// The kernel to run, already read and checked, with its hash.
    pub kernel: KernelImage,
    /// Text to append to the backend's own kernel command line.
    pub cmdline: String,
    /// The user's own initramfs, to use instead of the built one (qemu).
    pub initramfs: Option<PathBuf>,
    /// Host CPUs granted by the pool; never empty.
    pub cpus: Vec<u16>,
    /// Memory granted by the pool, in bytes.
    pub memory_bytes: u64,
    /// The program of the instance, if any.
    pub workload: Option<WorkloadSpec>,
    /// Ports of the workload.
    pub ports: Vec<PublishedPort>,
    /// Listening sockets for those ports, in the same order, if the backend passes sockets
    /// ([`Backend::passes_sockets`]); empty otherwise.
    pub listeners: Vec<HostListener>,
    /// Fresh, or the target of a morph.
    pub start: StartMode,
    /// The source generation of a morph.
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
    /// A signal ended its main process.
    Signal {
        /// Signal number.
        signal: i32,
    },
    /// Its main process, or its kernel, ended by itself.
    Exited {
        /// Exit status; `None` for a guest that powered off, or a process that is not a child of the daemon.
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
    /// Its id on the host.
    pub thread: i32,
    /// Time on a CPU since its start, up to the last tick of the scheduler.
    pub ran: Duration,
    /// Time since its start during which it was runnable but waited for a CPU. A wait in progress is not included.
    pub waited: Duration,
    /// Whether it runs or is ready to run.
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

/// CPUs and memory of the machine's pool that others than the daemon's own generations hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldBesides {
    /// Physical ids; ids above 65535 are left out.
    pub cpus: Vec<u16>,
    /// Memory including the kernel's bookkeeping, bytes.
    pub memory_bytes: u64,
}

/// Memory of a fenced generation that a surviving instance can read now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loan {
    /// Location of the memory for the survivor's kernel.
    pub place: LentPlace,
    /// The lent parts of the memory: sorted by offset, disjoint, never empty.
    pub windows: Vec<LentWindow>,
}

/// Location of lent memory for a survivor's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LentPlace {
    /// BAR 2 of the one device below a PCI port, by the port's address in the survivor, such as `0000:00:1e.0`.
    PciPort(String),
}

/// A lent part of the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LentWindow {
    /// Its physical address in the fenced kernel.
    pub guest_address: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset of its start in the lent memory, in bytes.
    pub offset: u64,
}

/// Why a spawn failed. Nothing of the generation is left, unless the error says so.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The request is invalid; the user must change it.
    #[error("{0}")]
    Refused(String),
    /// The machine lacks something that the operator must provide.
    #[error("{0}")]
    Unavailable(String),
    /// The spawn failed, and parts of it could not be undone: [`Backend::find`] finds them, and they are fenced and
    /// released like a running generation.
    #[error("{0}")]
    Remains(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// The attempted action and its object.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
}

/// The evidence for a confirmation; `docs/operations.md` describes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// The kernel reported the cgroup of its processes empty, and a scan of `/proc` found none outside.
    CgroupEmpty,
    /// Two consecutive scans of `/proc` found none of its processes.
    ScansEmpty,
    /// The host's kernel answered for its kernel instance (multikernel).
    KernelReport,
    /// The generation was started in an earlier boot of the host.
    HostRebooted,
}

impl Proof {
    /// Returns the name used in the journal and in logs.
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

/// A fence that could not be confirmed. It returns the order, so that the fence can be retried.
#[derive(Debug, thiserror::Error)]
#[error("the fence could not be confirmed: {reason}")]
pub struct FenceUnconfirmed {
    /// The order, which remains to be carried out.
    pub order: FenceOrder,
    /// The observation that contradicts the end.
    pub reason: String,
}

/// Another failure.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct BackendError {
    /// The attempted action and its object.
    pub what: String,
    /// The system's error.
    pub source: std::io::Error,
}

/// A way to run instances. The module's documentation contains the rules.
#[async_trait]
pub trait Backend: Send + Sync {
    /// Returns the kind of this backend.
    fn kind(&self) -> BackendKind;

    /// Refuses a placement that another backend created.
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

    /// Returns true if the backend passes the listening sockets of published ports to the workload;
    /// false if the daemon's forwarder carries the bytes to the workload over vsock.
    fn passes_sockets(&self) -> bool;

    /// Returns duplicates of the listening sockets that a running generation has, if the backend passes sockets.
    /// Blocking.
    ///
    /// # Errors
    /// If the generation does not answer, or not with sockets.
    fn passed_sockets(&self, placement: &Placement) -> std::io::Result<Vec<OwnedFd>> {
        kmorph_launch::handover::ask_listeners(&placement.run_dir.join(HANDOVER_SOCKET))
    }

    /// Checks once whether instances can be started here, and returns the findings in one line
    /// (accelerator, vsock device). Called at the daemon's start.
    ///
    /// # Errors
    /// If a requirement is missing, with its name and a remedy.
    async fn probe(&self) -> Result<String, SpawnError>;

    /// Removes earlier daemons' records of generations below `run_dir` of which nothing is left. Returns one line for
    /// each action. Called once at the daemon's start, after the daemon has taken over running generations and before
    /// it starts any.
    ///
    /// # Errors
    /// If a query of the system failed.
    async fn tidy(&self, run_dir: &std::path::Path) -> Result<Vec<String>, BackendError> {
        let _ = run_dir;
        Ok(Vec::new())
    }

    /// Resources of the machine's pool that are in use by others than the `counted` generations below `run_dir`
    /// (instance and number); none if the pool is the daemon's own.
    ///
    /// # Errors
    /// If a query of the system failed.
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
    /// If it was not started; then nothing is left behind, except after [`SpawnError::Remains`].
    async fn spawn(&self, spec: SpawnSpec) -> Result<Placement, SpawnError>;

    /// Looks for a spawn that may or may not have happened.
    ///
    /// # Errors
    /// If a query of the system failed.
    async fn find(
        &self,
        name: &InstanceName,
        generation: u64,
        run_dir: &std::path::Path,
    ) -> Result<Option<Placement>, BackendError>;

    /// Observes the current state of the generation.
    ///
    /// # Errors
    /// If a query of the system failed.
    async fn observe(&self, placement: &Placement) -> Result<Observation, BackendError>;

    /// Completes with the cause when the instance ends, or its kernel panics or resets; at once if it has ended
    /// already. Dropping the future stops the watch and has no other effect. Never completes for a placement of
    /// another backend.
    async fn ended(&self, placement: &Placement) -> ExitCause;

    /// Requests a clean shutdown; does not wait for it.
    ///
    /// # Errors
    /// If the request failed.
    async fn request_shutdown(&self, placement: &Placement) -> Result<(), BackendError>;

    /// Stops the generation for good and confirms it.
    ///
    /// # Errors
    /// If the end could not be confirmed within the backend's own timeout.
    async fn fence(
        &self,
        placement: &Placement,
        order: FenceOrder,
    ) -> Result<Fenced, FenceUnconfirmed>;

    /// Releases the resources of a fenced generation. Logs are kept.
    ///
    /// # Errors
    /// If a resource could not be released, with its name.
    async fn release(
        &self,
        placement: &Placement,
        proof: &FenceCertificate,
    ) -> Result<(), BackendError>;

    /// Returns the instance's memory as the host can map it; empty if it cannot be mapped. The memory stays
    /// until the generation is released, also after its fence.
    ///
    /// # Errors
    /// If a query of the system failed.
    async fn memory_map(&self, placement: &Placement) -> Result<Vec<MemoryRange>, BackendError>;

    /// Returns the current scheduler accounts of its processes' threads; empty if the host has none. Reads a few
    /// files of `/proc` and does not wait.
    fn scheduled(&self, placement: &Placement) -> Vec<ThreadTime> {
        let _ = placement;
        Vec::new()
    }

    /// Returns the panic message on the instance's console, otherwise the last lines printed there, as one line
    /// of printable characters; `None` if the backend keeps no console, or nothing was printed. Reads at most 64
    /// KiB and does not wait.
    fn console_tail(&self, placement: &Placement) -> Option<String> {
        let _ = placement;
        None
    }

    /// Makes the memory of an instance that is about to be fenced survive the daemon, until its release. Returns
    /// false if there is no memory to keep.
    ///
    /// # Errors
    /// If the memory lasts no longer than the daemon.
    async fn keep_memory(&self, placement: &Placement) -> Result<bool, BackendError> {
        let _ = placement;
        Ok(false)
    }

    /// Freezes an instance until it is resumed, without a change of its memory. Returns false if it executed nothing
    /// before: it has ended, its kernel panicked, or another program stopped it.
    ///
    /// # Errors
    /// If the backend cannot freeze, or the freeze could not be confirmed; the instance may be frozen all the same.
    async fn freeze(&self, placement: &Placement) -> Result<bool, BackendError> {
        Err(cannot("freezing", self.kind(), placement))
    }

    /// Resumes a frozen instance. Does nothing if it is running or has ended.
    ///
    /// # Errors
    /// If it could not be confirmed.
    async fn resume(&self, placement: &Placement) -> Result<(), BackendError> {
        Err(cannot("resuming", self.kind(), placement))
    }

    /// Returns options for the kernel command line with which [`Backend::provoke_panic`] makes the kernel panic;
    /// `None` if the backend cannot do that, or captures no memory.
    fn panic_cmdline(&self) -> Option<&'static str> {
        None
    }

    /// Makes the instance's kernel panic, for a test. The instance was started with [`Backend::panic_cmdline`].
    ///
    /// # Errors
    /// If it failed.
    async fn provoke_panic(&self, placement: &Placement) -> Result<(), BackendError> {
        Err(cannot("panicking the kernel of", self.kind(), placement))
    }

    /// Writes the registers of the instance's CPUs into the file [`REGISTERS`] of its run directory. Returns
    /// false if it has none, or they can no longer be read. The release removes the file. Only for an
    /// instance that is frozen, or has failed and was not fenced yet: it may be stopped for a moment.
    ///
    /// # Errors
    /// If the registers should exist but could not be read.
    async fn save_registers(&self, placement: &Placement) -> Result<bool, BackendError> {
        let _ = placement;
        Ok(false)
    }

    /// Lends a survivor memory of a fenced generation, as named by [`Backend::memory_map`], for reading only; only the
    /// end of the memory if it does not fit. Returns `None` if the backend cannot lend, or this survivor has no place
    /// for a loan. Takes an earlier loan of the survivor back first. The survivor's kernel may find the memory only a
    /// moment later. Memory that the fenced kernel never touched may be allocated on the host when it is read this way,
    /// until the release.
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

    /// Takes back a survivor's loan, if any; a survivor that has ended has none.
    ///
    /// # Errors
    /// If its kernel has not released the memory within the backend's timeout. The call can be repeated.
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
