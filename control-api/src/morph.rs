//! Morphs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The phase of a morph; the names of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MorphPhase {
    /// The target kernel boots beside the source.
    Preparing,
    /// Both state what they can do.
    Negotiating,
    /// State moves while the source kernel serves.
    Transferring,
    /// The target kernel checks what it has.
    Validating,
    /// Validated; waits for the commit.
    Committable,
    /// Freeze, last delta, activate, record, serve, retire.
    Committing,
    /// Going back to the source kernel.
    RollingBack,
    /// The target kernel serves.
    Committed,
    /// The source kernel serves.
    RolledBack,
    /// Neither side could be brought back by the morph; a recovery took over.
    Failed,
}

/// A request to morph an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MorphRequest {
    /// Absolute path of the target kernel image on the host.
    #[schema(pattern = "^/[^\\x00]*[^\\x00/]$")]
    pub kernel: String,
    /// Kernel command line of the target kernel; the source kernel's by default.
    #[serde(default)]
    pub kernel_cmdline: Option<String>,
    /// Initramfs of the target kernel (default: the built one).
    #[serde(default)]
    pub initramfs: Option<String>,
    /// Go on to validate once prepared.
    #[serde(default)]
    pub auto_validate: bool,
    /// Go on to commit once validated.
    #[serde(default)]
    pub auto_commit: bool,
    /// Commit even when the estimated downtime is above the budget.
    #[serde(default)]
    pub force: bool,
    /// Budget for the downtime, microseconds; `morph.downtime_budget_ms` of the configuration by default.
    #[serde(default)]
    pub downtime_budget_us: Option<u32>,
}

/// A request to commit a validated morph.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommitRequest {
    /// Commit even when the estimated downtime is above the budget.
    #[serde(default)]
    pub force: bool,
    /// Budget for the downtime, microseconds; the morph's own by default.
    #[serde(default)]
    pub downtime_budget_us: Option<u32>,
}

/// One check of the validation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Whether it held.
    pub passed: bool,
    /// How long it took, microseconds.
    pub duration_us: u64,
    /// What was found.
    pub detail: String,
}

/// Downtime by step, microseconds, each as the daemon saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DowntimeSteps {
    /// Freezing the source workload.
    pub freeze_us: u64,
    /// Moving what changed last.
    pub final_delta_us: u64,
    /// Activating the target workload until it answered.
    pub activate_us: u64,
    /// Writing the commit record durably.
    pub record_us: u64,
    /// Letting the target workload serve.
    pub serve_us: u64,
    /// All of it: from the freeze to the first request the target kernel could answer.
    pub total_us: u64,
}

/// A state provider that does not carry the morph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OtherProvider {
    /// Its name in the protocol.
    pub provider: String,
    /// Why it does not carry the morph.
    pub reason: String,
}

/// Where a morph is.
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
    /// Generation that is left.
    pub from_generation: u64,
    /// Generation that is gone to.
    pub to_generation: u64,
    /// Release of the source kernel.
    pub from_kernel: String,
    /// Release of the target kernel.
    pub to_kernel: String,
    /// What carries the state, once negotiated: the name of a state provider, such as `cooperative`.
    #[serde(default)]
    pub provider: Option<String>,
    /// The other state providers that the daemon knows, each with the reason why it does not carry the state; filled in
    /// once negotiated.
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
    /// Estimate, once known.
    pub estimated_downtime_us: Option<u64>,
    /// When a morph that waits for its commit or validation is rolled back, RFC 3339.
    #[serde(default)]
    pub expires_at: Option<String>,
    /// Measured, once committed.
    pub downtime: Option<DowntimeSteps>,
    /// Why it was rolled back or failed.
    pub reason: Option<String>,
    /// When it began.
    pub started_at: String,
    /// When it ended.
    pub ended_at: Option<String>,
}
