//! The location of a generation, as plain data that the journal stores and another daemon process can read.

use std::path::PathBuf;

use kmorph_launch::InstanceName;
use kmp_transport::link::Address;
use serde::{Deserialize, Serialize};

use super::BackendKind;

/// A process of an instance, safe against reuse of its pid.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    /// Role of the process: `agent`, `qemu`, `vhost-user-vsock`.
    pub role: String,
    /// Its pid on the host.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: start time in clock ticks since boot.
    pub start_ticks: u64,
}

/// How the daemon reaches an instance's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Endpoint {
    /// A Unix socket that accepts `CONNECT <port>`.
    Unix {
        /// Its path.
        path: PathBuf,
    },
    /// An AF_VSOCK address.
    Vsock {
        /// Context id.
        cid: u32,
    },
    /// An AF_VSOCK address of a transport that must be selected per socket.
    ChosenVsock {
        /// Context id.
        cid: u32,
        /// The socket option that selects the transport.
        option: i32,
    },
}

impl From<Endpoint> for Address {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Unix { path } => Self::Unix(path),
            Endpoint::Vsock { cid } => Self::Vsock(cid),
            Endpoint::ChosenVsock { cid, option } => Self::ChosenVsock { cid, option },
        }
    }
}

/// The host kernel's name for a kernel instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInstance {
    /// Its name there.
    pub name: String,
    /// Id of the kernel instance, which identifies its CPUs and its vsock.
    pub id: u32,
}

/// A cgroup, safe against reuse of its path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupId {
    /// Its directory.
    pub path: PathBuf,
    /// Inode of the directory: the kernel assigns a number only once in a boot.
    pub id: u64,
}

/// Marks that the host's kernel preserves on a generation's processes, whatever they do to themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Containment {
    /// The cgroup (version 2) in which its processes were started; `None` if none was available.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<CgroupId>,
    /// The resource limit `RLIMIT_RTTIME` with which its processes were started: a unique number, far
    /// above any measured time. Descendants inherit it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<u64>,
}

/// The location of one generation of an instance, with everything that a daemon needs to take it over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The backend that created it.
    pub backend: BackendKind,
    /// The instance.
    pub name: InstanceName,
    /// Its incarnation.
    pub generation: u64,
    /// Its processes; the first one is the process whose end is the instance's end.
    pub processes: Vec<ProcessId>,
    /// The endpoint of its agent.
    pub endpoint: Endpoint,
    /// Its files.
    pub run_dir: PathBuf,
    /// Its host CPUs.
    pub cpus: Vec<u16>,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// Release of its kernel at the start.
    pub kernel_release: String,
    /// Boot id of the host at the spawn: after a host reboot nothing of the generation exists.
    pub host_boot_id: String,
    /// Identification of its processes (embedded, qemu).
    #[serde(default)]
    pub containment: Containment,
    /// Its kernel instance (multikernel), which has no processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_instance: Option<KernelInstance>,
}
