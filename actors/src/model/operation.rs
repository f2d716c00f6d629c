//! Operations: long work that a client starts, watches, lists and cancels.

use serde::{Deserialize, Serialize};

use super::{CaptureReport, DoctorReport, Failure, MorphRecord, RecoveryRecord};

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Starts an instance and waits until it is healthy.
    Spawn,
    /// Ends an instance.
    Terminate,
    /// Heals an instance.
    Recover,
    /// Prepares a morph, up to the end of the transfer.
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
    /// Tests that the daemon captures a failed instance.
    Doctor,
}

/// The state of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// Ended without success; `error` says why.
    Failed,
    /// Undone on request.
    Cancelled,
}

/// The progress of an operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The step under way, in words.
    pub step: String,
    /// Completed units of this step; 0 of 0 if the step has no units.
    pub done: u64,
    /// Total units of this step.
    pub total: u64,
    /// `bytes`, `steps`, or empty.
    pub unit: String,
}

/// The result of an operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationResult {
    /// An instance that serves.
    Running {
        /// Its name.
        name: String,
    },
    /// The final record of a morph.
    Morph(Box<MorphRecord>),
    /// The final record of a recovery.
    Recovery(Box<RecoveryRecord>),
    /// A vmcore.
    Capture(Box<CaptureReport>),
    /// A self-test.
    Doctor(Box<DoctorReport>),
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// Its id: `op-` and a number that only grows.
    pub id: String,
    /// Its kind.
    pub kind: OperationKind,
    /// The instance.
    pub instance: String,
    /// Its state.
    pub state: OperationState,
    /// Grows with each change. Pass it as `seen` to wait for the next change.
    pub revision: u64,
    /// Its progress.
    pub progress: Progress,
    /// Uid of the caller; absent when the daemon started the operation.
    pub requested_by: Option<u32>,
    /// When it began.
    pub started_at: String,
    /// When it ended.
    pub ended_at: Option<String>,
    /// Why it failed.
    pub error: Option<Failure>,
    /// Its result.
    pub result: Option<OperationResult>,
}

impl Operation {
    /// Returns true once the operation has ended and no longer changes.
    pub fn is_over(&self) -> bool {
        self.state != OperationState::Running
    }
}
