//! Requests that begin work.

use std::net::IpAddr;
use std::path::PathBuf;

use super::Workload;

/// A port to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRequest {
    /// Host address.
    pub address: IpAddr,
    /// Host port; with 0 the system chooses one.
    pub host_port: u16,
    /// The workload's port.
    pub port: u16,
}

/// A new instance.
#[derive(Clone, Debug, PartialEq)]
pub struct SpawnRequest {
    /// Its name.
    pub name: String,
    /// The kernel image on the host.
    pub kernel: PathBuf,
    /// Text to append to the kernel command line.
    pub kernel_cmdline: String,
    /// Initramfs to use instead of the built one.
    pub initramfs: Option<PathBuf>,
    /// Number of CPUs.
    pub cpus: u16,
    /// Memory in bytes (default: the configuration's).
    pub memory_bytes: Option<u64>,
    /// The workload; without one, only the agent runs.
    pub workload: Option<Workload>,
    /// Published ports.
    pub publish: Vec<PortRequest>,
    /// Whether heartbeats watch the instance.
    pub monitor: bool,
    /// Heartbeat timeout in seconds (default: the configuration's).
    pub heartbeat_timeout_s: Option<f64>,
}

/// A morph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MorphRequest {
    /// The target kernel's image on the host.
    pub kernel: PathBuf,
    /// Kernel command line of the target kernel (default: the source kernel's).
    pub kernel_cmdline: Option<String>,
    /// Initramfs of the target kernel (default: the built one).
    pub initramfs: Option<PathBuf>,
    /// Validate as soon as the morph is prepared.
    pub auto_validate: bool,
    /// Commit as soon as the morph is validated.
    pub auto_commit: bool,
    /// Commit even if the estimated downtime exceeds the budget.
    pub force: bool,
    /// Budget for the downtime, microseconds (default: the configuration's).
    pub downtime_budget_us: Option<u32>,
}
