//! Recoveries, as recorded in the journal.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The outcome of a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryOutcome {
    /// In progress.
    Running,
    /// A healthy successor serves.
    Recovered,
    /// The successor could not be started or did not become healthy; retried.
    Failed,
    /// Quarantined, because the instance failed too often.
    Quarantined,
    /// The fence could not be confirmed, or there is no vmcore although the policy requires one.
    OperatorActionNeeded,
}

/// The captured data of a failed kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmcoreRecord {
    /// Path of the vmcore, once it is complete and verified.
    pub path: Option<String>,
    /// Its length, bytes.
    pub bytes: Option<u64>,
    /// Milliseconds from the verdict to the verified vmcore.
    pub captured_ms: Option<f64>,
    /// Why pages that should have been left out are included.
    pub not_filtered: Option<String>,
    /// Bytes of its memory read by each survivor, by name; the daemon read the rest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_by: BTreeMap<String, u64>,
    /// Why there is no vmcore.
    pub error: Option<String>,
    /// Path of the kernel log, which is written before the vmcore.
    pub log_path: Option<String>,
    /// Milliseconds from the verdict to the log.
    pub log_ms: Option<f64>,
    /// The panic message in the log.
    pub panic: Option<String>,
    /// Why there is no log.
    pub log_error: Option<String>,
}

/// One recovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RecoveryRecord {
    /// Number of the recovery.
    pub id: u64,
    /// The instance.
    pub instance: String,
    /// The failed generation.
    pub failed_generation: u64,
    /// The generation that replaced it.
    pub new_generation: Option<u64>,
    /// The verdict: `kernel_dead`, `agent_dead`, `workload_failed`, `operator`.
    pub cause: String,
    /// The evidence, one line each.
    pub evidence: Vec<String>,
    /// How the fence was confirmed.
    pub fence: Option<String>,
    /// The capture of its memory; absent if no capture was planned.
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
