//! The daemon itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The CPUs and memory for instances, and their use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolUsage {
    /// Host CPUs in the pool.
    pub cpus: Vec<u16>,
    /// CPUs that no instance uses.
    pub cpus_free: Vec<u16>,
    /// Whether several instances may share a CPU.
    pub cpus_shared: bool,
    /// Memory in the pool, in bytes.
    pub memory_bytes: u64,
    /// Memory that no instance uses, in bytes. Memory that the kernel keeps for its bookkeeping counts as used.
    pub memory_free_bytes: u64,
    /// CPUs in the pool that are used by others than this daemon, such as kernel instances created with kerf. They
    /// are not free.
    #[serde(default)]
    pub cpus_besides: Vec<u16>,
    /// Memory in the pool that is used by others, in bytes, including the kernel's bookkeeping.
    #[serde(default)]
    pub memory_besides_bytes: u64,
}

/// The status of the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DaemonStatus {
    /// Version of kmorphd.
    pub version: String,
    /// Its pid.
    pub pid: u32,
    /// When it started.
    pub started_at: String,
    /// Seconds since then.
    pub uptime_s: u64,
    /// Name of the backend.
    pub backend: String,
    /// The backend's findings on this machine.
    pub backend_detail: String,
    /// Its configuration file, if one was read.
    pub config_path: Option<String>,
    /// Its state directory.
    pub state_dir: String,
    /// Its runtime directory.
    pub run_dir: String,
    /// Number of instances.
    pub instances: u32,
    /// Recoveries and morphs in progress.
    pub operations_running: u32,
    /// The pool.
    pub pool: PoolUsage,
    /// Ended generations, of all instances, whose CPUs and memory could not be released yet.
    #[serde(default)]
    pub kept: Vec<crate::KeptGeneration>,
    /// False when the journal cannot be written; `journal_error` says why.
    pub journal_ok: bool,
    /// Why the journal cannot be written.
    pub journal_error: Option<String>,
    /// Number of actors that panicked and were replaced since the start.
    pub actor_restarts: u64,
    /// Maximum delay of the daemon in the last minute, in milliseconds.
    pub self_lag_ms: u64,
    /// Whether the daemon was asked to stop.
    pub stopping: bool,
    /// Whether the self-test is available: the backend can capture the memory of failed instances.
    #[serde(default)]
    pub can_self_test: bool,
    /// The last self-test; absent if there was none.
    #[serde(default)]
    pub last_doctor: Option<crate::DoctorReport>,
}

/// How the daemon stops. Instances keep running in both cases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Finish operations in progress first; new ones are refused meanwhile. Otherwise the next daemon finishes or
    /// undoes them.
    #[serde(default)]
    pub graceful: bool,
}

/// The result of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReloadReport {
    /// Keys whose new value is now in force.
    pub applied: Vec<String>,
    /// Keys that differ and require a restart of the daemon.
    pub needs_restart: Vec<String>,
}
