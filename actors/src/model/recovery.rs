//! Recoveries, as stored in the journal.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The outcome of a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryOutcome {
    /// Still under way.
    Running,
    /// A healthy successor serves.
    Recovered,
    /// The successor did not start or did not become healthy; the daemon retries.
    Failed,
    /// Failed too often: the instance is quarantined.
    Quarantined,
    /// The fence could not be confirmed, or the policy requires a vmcore and there is none.
    OperatorActionNeeded,
}

/// The capture of a failed kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmcoreRecord {
    /// The vmcore, once it is complete and verified.
    pub path: Option<String>,
    /// Its length, bytes.
    pub bytes: Option<u64>,
    /// Milliseconds from the verdict to the verified vmcore.
    pub captured_ms: Option<f64>,
    /// Why the vmcore contains pages that the filter should have left out.
    pub not_filtered: Option<String>,
    /// Bytes of memory read by each survivor, by name; the daemon has read the rest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_by: BTreeMap<String, u64>,
    /// Why there is no vmcore.
    pub error: Option<String>,
    /// The kernel's log; written before the vmcore.
    pub log_path: Option<String>,
    /// Milliseconds from the verdict to the log.
    pub log_ms: Option<f64>,
    /// How the kernel ended, as its log says.
    pub panic: Option<String>,
    /// Why there is no log.
    pub log_error: Option<String>,
}

/// One recovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryRecord {
    /// Its id.
    pub id: u64,
    /// The instance.
    pub instance: String,
    /// The failed generation.
    pub failed_generation: u64,
    /// The successor's generation.
    pub new_generation: Option<u64>,
    /// The verdict: `kernel_dead`, `agent_dead`, `workload_failed`, `operator`.
    pub cause: String,
    /// The evidence, one line each.
    pub evidence: Vec<String>,
    /// How the fence was confirmed.
    pub fence: Option<String>,
    /// The capture; absent if the policy wanted none.
    #[serde(default)]
    pub vmcore: Option<VmcoreRecord>,
    /// Its outcome.
    pub outcome: RecoveryOutcome,
    /// Why it failed, or which step remains.
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
