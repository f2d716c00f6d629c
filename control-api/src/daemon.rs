//! The daemon itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// CPUs and memory that instances may be given, and what of it is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolUsage {
    /// Host CPUs in the pool.
    pub cpus: Vec<u16>,
    /// Those not given to any instance.
    pub cpus_free: Vec<u16>,
    /// True when several instances may be given the same CPU.
    pub cpus_shared: bool,
    /// Memory in the pool, in bytes.
    pub memory_bytes: u64,
    /// Of it not given to any instance, in bytes. What a kernel keeps for its bookkeeping counts as given.
    pub memory_free_bytes: u64,
    /// CPUs in the pool that others than this daemon hold, such as kernel instances that were made with kerf. They are
    /// not free.
    #[serde(default)]
    pub cpus_besides: Vec<u16>,
    /// Memory in the pool that others hold, in bytes, with what the kernel keeps for its bookkeeping.
    #[serde(default)]
    pub memory_besides_bytes: u64,
}

/// What the daemon says of itself.
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
    /// What the backend found on this machine.
    pub backend_detail: String,
    /// Its configuration file, if one was read.
    pub config_path: Option<String>,
    /// Its state directory.
    pub state_dir: String,
    /// Its runtime directory.
    pub run_dir: String,
    /// Number of instances.
    pub instances: u32,
    /// Recoveries and morphs under way.
    pub operations_running: u32,
    /// The pool.
    pub pool: PoolUsage,
    /// Ended generations, of all instances, that could not give their CPUs and memory back yet.
    #[serde(default)]
    pub kept: Vec<crate::KeptGeneration>,
    /// False when the journal cannot be written; `journal_error` says why.
    pub journal_ok: bool,
    /// Why the journal cannot be written.
    pub journal_error: Option<String>,
    /// Actors that panicked and were replaced since the start.
    pub actor_restarts: u64,
    /// Longest time, in milliseconds, that the daemon was late in the last minute.
    pub self_lag_ms: u64,
    /// True once it was asked to stop.
    pub stopping: bool,
    /// Whether there is anything to test: its backend captures the memory of what fails.
    #[serde(default)]
    pub can_self_test: bool,
    /// The last self-test; absent when there was none.
    #[serde(default)]
    pub last_doctor: Option<crate::DoctorReport>,
}

/// How the daemon shall stop. Instances keep running in both cases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Finish operations under way first; new ones are refused meanwhile. Otherwise they are
    /// finished or undone by the next start.
    #[serde(default)]
    pub graceful: bool,
}

/// What a reload changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReloadReport {
    /// Keys whose new value is now in force.
    pub applied: Vec<String>,
    /// Keys that differ and need a restart of the daemon.
    pub needs_restart: Vec<String>,
}
