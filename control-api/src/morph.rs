//! Morphs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The phase of a morph, with the names used in the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MorphPhase {
    /// The target kernel boots beside the source.
    Preparing,
    /// Both sides state their capabilities.
    Negotiating,
    /// The state is transferred while the source kernel serves.
    Transferring,
    /// The target kernel validates the state it received.
    Validating,
    /// Validated; waits for the commit.
    Committable,
    /// Freeze, last delta, activate, record, serve, retire.
    Committing,
    /// Returning to the source kernel.
    RollingBack,
    /// The target kernel serves.
    Committed,
    /// The source kernel serves.
    RolledBack,
    /// The morph could not restore either side; a recovery took over.
    Failed,
}

/// A request to morph an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MorphRequest {
    /// Absolute path of the target kernel image on the host.
    #[schema(pattern = "^/[^\\x00]*[^\\x00/]$")]
    pub kernel: String,
    /// Kernel command line of the target kernel (default: that of the source kernel).
    #[serde(default)]
    pub kernel_cmdline: Option<String>,
    /// Initramfs of the target kernel (default: the built one).
    #[serde(default)]
    pub initramfs: Option<String>,
    /// Validate once prepared.
    #[serde(default)]
    pub auto_validate: bool,
    /// Commit once validated.
    #[serde(default)]
    pub auto_commit: bool,
    /// Commit even if the estimated downtime exceeds the budget.
    #[serde(default)]
    pub force: bool,
    /// Downtime budget, microseconds (default: `morph.downtime_budget_ms` of the configuration).
    #[serde(default)]
    pub downtime_budget_us: Option<u32>,
}

/// A request to commit a validated morph.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommitRequest {
    /// Commit even if the estimated downtime exceeds the budget.
    #[serde(default)]
    pub force: bool,
    /// Downtime budget, microseconds (default: that of the morph).
    #[serde(default)]
    pub downtime_budget_us: Option<u32>,
}

/// One check of the validation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// The name of the check.
    pub name: String,
    /// Whether the check passed.
    pub passed: bool,
    /// Duration, microseconds.
    pub duration_us: u64,
    /// The finding.
    pub detail: String,
}

/// Downtime by step, microseconds, as measured by the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DowntimeSteps {
    /// Freezing the source workload.
    pub freeze_us: u64,
    /// Transferring the last changes.
    pub final_delta_us: u64,
    /// Activating the target workload until it answered.
    pub activate_us: u64,
    /// Making the commit record durable.
    pub record_us: u64,
    /// Making the target workload serve.
    pub serve_us: u64,
    /// Total: from the freeze to the first request that the target kernel could answer.
    pub total_us: u64,
}

/// A state provider that the morph does not use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OtherProvider {
    /// Its name in the protocol.
    pub provider: String,
    /// Why the morph does not use it.
    pub reason: String,
}

/// The status of a morph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MorphStatus {
    /// The instance.
    pub instance: String,
    /// Session id of the morph.
    pub session: u64,
    /// Operation that drives it.
    pub operation: String,
    /// Its phase.
    pub phase: MorphPhase,
    /// The source generation.
    pub from_generation: u64,
    /// The target generation.
    pub to_generation: u64,
    /// Release of the source kernel.
    pub from_kernel: String,
    /// Release of the target kernel.
    pub to_kernel: String,
    /// The state provider in use, once negotiated, such as `cooperative`.
    #[serde(default)]
    pub provider: Option<String>,
    /// The other state providers that the daemon knows, each with the reason why it is not used; filled in once
    /// negotiated.
    #[serde(default)]
    pub other_providers: Vec<OtherProvider>,
    /// `by_reference` or `rounds`, once negotiated.
    pub mode: Option<String>,
    /// Bytes of state.
    pub state_bytes: u64,
    /// Bytes sent so far (rounds).
    pub sent_bytes: u64,
    /// Rounds so far.
    pub rounds: u32,
    /// Checks of the validation.
    pub checks: Vec<Check>,
    /// Budget for the downtime, microseconds.
    pub downtime_budget_us: u64,
    /// Estimated downtime, microseconds, once known.
    pub estimated_downtime_us: Option<u64>,
    /// When a morph that waits for its commit or validation will be rolled back, RFC 3339.
    #[serde(default)]
    pub expires_at: Option<String>,
    /// Measured downtime, once committed.
    pub downtime: Option<DowntimeSteps>,
    /// Why the morph was rolled back or failed.
    pub reason: Option<String>,
    /// When the morph started.
    pub started_at: String,
    /// When the morph ended.
    pub ended_at: Option<String>,
}
