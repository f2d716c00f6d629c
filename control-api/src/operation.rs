//! Operations: work that outlasts a request. They are started, watched, listed and cancelled.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Starts an instance and waits until it is healthy.
    Spawn,
    /// Terminates an instance.
    Terminate,
    /// Recovers an instance.
    Recover,
    /// Runs a morph up to the transfer of its state.
    MorphPrepare,
    /// Validates a prepared morph.
    MorphValidate,
    /// Commits a validated morph.
    MorphCommit,
    /// Rolls a morph back.
    MorphRollback,
    /// Runs a whole morph.
    Morph,
    /// Captures an instance's memory.
    VmcoreCapture,
    /// Tests that a failed instance is captured.
    Doctor,
}

/// The state of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// In progress.
    Running,
    /// Done.
    Succeeded,
    /// Failed; `error` says why.
    Failed,
    /// Undone on request.
    Cancelled,
}

/// The progress of an operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// The current step, in words.
    pub step: String,
    /// Units done in this step; 0 of 0 if the step has no units.
    pub done: u64,
    /// Total units of this step.
    pub total: u64,
    /// `bytes`, `steps`, or empty.
    pub unit: String,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Id of the operation: `op-` and a number that only grows.
    pub id: String,
    /// Kind of the operation.
    pub kind: OperationKind,
    /// The instance.
    pub instance: String,
    /// State of the operation.
    pub state: OperationState,
    /// Grows with each change: pass it as `seen` to wait for the next change.
    pub revision: u64,
    /// Progress of the operation.
    pub progress: Progress,
    /// Uid of the caller; absent for the daemon's own operations.
    pub requested_by: Option<u32>,
    /// When the operation started.
    pub started_at: String,
    /// When the operation ended.
    pub ended_at: Option<String>,
    /// Why the operation failed.
    pub error: Option<crate::ApiError>,
    /// The instance's status at the end; the morph's status for a morph, a [`CaptureReport`](crate::CaptureReport)
    /// for a capture, a [`DoctorReport`](crate::DoctorReport) for a self-test.
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
}

impl Operation {
    /// Returns whether the operation has ended and does not change any more.
    pub fn is_over(&self) -> bool {
        self.state != OperationState::Running
    }
}
