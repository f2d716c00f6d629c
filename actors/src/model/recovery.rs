//! Recoveries, as the journal keeps them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How a recovery ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryOutcome {
    /// Still under way.
    Running,
    /// A healthy successor serves.
    Recovered,
    /// The successor could not be started or did not become healthy; tried again.
    Failed,
    /// Failed too often: quarantined.
    Quarantined,
    /// The fence could not be confirmed, or there is no vmcore although the policy requires one.
    OperatorActionNeeded,
}

/// What was captured of a kernel that failed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmcoreRecord {
    /// The vmcore, once it is complete and verified.
    pub path: Option<String>,
    /// Its length, bytes.
    pub bytes: Option<u64>,
    /// Milliseconds from the verdict to the verified vmcore.
    pub captured_ms: Option<f64>,
    /// Why pages are in it that should have been left out.
    pub not_filtered: Option<String>,
    /// Bytes of its memory that survivors have read, by name; the daemon has read the rest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_by: BTreeMap<String, u64>,
    /// Why there is no vmcore.
    pub error: Option<String>,
    /// The kernel's log, there before the vmcore is.
    pub log_path: Option<String>,
    /// Milliseconds from the verdict to the log.
    pub log_ms: Option<f64>,
    /// What the log says of the kernel's end.
    pub panic: Option<String>,
    /// Why there is no log.
    pub log_error: Option<String>,
}

/// One recovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryRecord {
    /// Its number.
    pub id: u64,
    /// The instance.
    pub instance: String,
    /// Generation that failed.
    pub failed_generation: u64,
    /// Generation that took its place.
    pub new_generation: Option<u64>,
    /// The verdict: `kernel_dead`, `agent_dead`, `workload_failed`, `operator`.
    pub cause: String,
    /// The evidence, a line each.
    pub evidence: Vec<String>,
    /// How the fence was confirmed.
    pub fence: Option<String>,
    /// What was captured of its memory; absent when nothing was to be.
    #[serde(default)]
    pub vmcore: Option<VmcoreRecord>,
    /// Its outcome.
    pub outcome: RecoveryOutcome,
    /// Why it failed, or what is left to do.
    pub reason: Option<String>,
    /// When the verdict was reached.
    pub started_at: String,
    /// When it ended.
    pub ended_at: Option<String>,
    /// Milliseconds from the verdict to the confirmed fence.
    pub fence_ms: Option<f64>,
    /// Milliseconds from the verdict to the first healthy heartbeat of the successor.
    pub total_ms: Option<f64>,
}
