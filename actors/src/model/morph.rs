//! Morphs, as stored in the journal.

use serde::{Deserialize, Serialize};

/// The phase of a morph. The names are those of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MorphPhase {
    /// The target kernel boots next to the source kernel.
    Preparing,
    /// Both sides state their capabilities.
    Negotiating,
    /// State moves while the source kernel serves.
    Transferring,
    /// The target kernel checks the state that it received.
    Validating,
    /// Validated; the morph waits for the commit.
    Committable,
    /// Freeze, last delta, activate, record, serve, retire.
    Committing,
    /// The morph returns to the source kernel.
    RollingBack,
    /// The target kernel serves.
    Committed,
    /// The source kernel serves.
    RolledBack,
    /// The morph could bring back neither side; a recovery took over.
    Failed,
}

/// One check of the validation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The name of the check.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// Its duration, microseconds.
    pub duration_us: u64,
    /// The finding.
    pub detail: String,
}

/// Downtime by step, microseconds, as measured by the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DowntimeSteps {
    /// Freezing the source workload.
    pub freeze_us: u64,
    /// Transferring the last delta.
    pub final_delta_us: u64,
    /// Activating the target workload, until it answered.
    pub activate_us: u64,
    /// Writing the commit record durably.
    pub record_us: u64,
    /// Letting the target workload serve.
    pub serve_us: u64,
    /// The total: from the freeze to the first request that the target kernel could answer.
    pub total_us: u64,
}

/// A state provider that the morph does not use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherProvider {
    /// Its name in the protocol.
    pub provider: String,
    /// Why the morph does not use it.
    pub reason: String,
}

/// One morph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MorphRecord {
    /// The instance.
    pub instance: String,
    /// The morph's session id.
    pub session: u64,
    /// The operation that drives the morph.
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
    /// The name of the state provider, once negotiated.
    #[serde(default)]
    pub provider: Option<String>,
    /// The other state providers that the daemon knows, each with the reason why the morph does not use it.
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
    /// Estimated downtime, once known, microseconds.
    pub estimated_downtime_us: Option<u64>,
    /// When the daemon rolls back a morph that waits for its commit or validation, RFC 3339.
    #[serde(default)]
    pub expires_at: Option<String>,
    /// Measured downtime, once committed.
    pub downtime: Option<DowntimeSteps>,
    /// Why it was rolled back or failed.
    pub reason: Option<String>,
    /// When it began.
    pub started_at: String,
    /// When it ended.
    pub ended_at: Option<String>,
}
