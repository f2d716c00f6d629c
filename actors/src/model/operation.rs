//! Long work: started, watched, listed, cancelled.

use serde::{Deserialize, Serialize};

use super::{CaptureReport, DoctorReport, Failure, MorphRecord, RecoveryRecord};

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Starts an instance and waits until it is healthy.
    Spawn,
    /// Ends an instance.
    Terminate,
    /// Heals an instance.
    Recover,
    /// Brings a morph up to its transferred state.
    MorphPrepare,
    /// Validates a prepared morph.
    MorphValidate,
    /// Commits a validated morph.
    MorphCommit,
    /// Rolls a morph back.
    MorphRollback,
    /// A whole morph in one.
    Morph,
    /// Captures an instance's memory.
    VmcoreCapture,
    /// Tests that a failed instance is captured.
    Doctor,
}

/// Where an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// Ended without its goal; `error` says why.
    Failed,
    /// Undone by request.
    Cancelled,
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The step under way, in words.
    pub step: String,
    /// Units done in this step; 0 of 0 when it has none.
    pub done: u64,
    /// Units of this step.
    pub total: u64,
    /// `bytes`, `steps`, or empty.
    pub unit: String,
}

/// What came of an operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationResult {
    /// An instance that serves.
    Running {
        /// Its name.
        name: String,
    },
    /// A morph, as it ended.
    Morph(Box<MorphRecord>),
    /// A recovery, as it ended.
    Recovery(Box<RecoveryRecord>),
    /// A vmcore.
    Capture(Box<CaptureReport>),
    /// A self-test.
    Doctor(Box<DoctorReport>),
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// Its id, `op-` and a number that only grows.
    pub id: String,
    /// What it does.
    pub kind: OperationKind,
    /// The instance.
    pub instance: String,
    /// Where it is.
    pub state: OperationState,
    /// Grows with each change: give it as `seen` to wait for the next one.
    pub revision: u64,
    /// How far it is.
    pub progress: Progress,
    /// Uid of the caller; absent for the daemon's own.
    pub requested_by: Option<u32>,
    /// When it began.
    pub started_at: String,
    /// When it ended.
    pub ended_at: Option<String>,
    /// Why it failed.
    pub error: Option<Failure>,
    /// What came of it.
    pub result: Option<OperationResult>,
}

impl Operation {
    /// True once it does not change any more.
    pub fn is_over(&self) -> bool {
        self.state != OperationState::Running
    }
}
