//! Failures: why the daemon refuses a request, or why its work fails.

use serde::{Deserialize, Serialize};

use super::NextStep;

/// Why a request failed. The variants are ordered by cause: the caller, the present state, the machine, kmorph itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The request does not parse, or a value is out of range.
    InvalidRequest,
    /// The instance, operation or path does not exist.
    NotFound,
    /// The file is not a bootable kernel image.
    BadKernelImage,
    /// The kernel image does not exist, or the daemon may not read it.
    KernelUnreadable,
    /// The kernel image has changed since it was recorded.
    KernelChanged,
    /// An instance did not start: its program ended, or its kernel or agent did not come up.
    StartFailed,
    /// The name already exists.
    AlreadyExists,
    /// The present state does not allow the request, for example a second morph or a commit before validation; or the
    /// backend never allows it.
    WrongState,
    /// The other kernel lacks something that the morph needs.
    Incompatible,
    /// The estimated downtime is above the budget.
    OverBudget,
    /// The pool does not have enough CPUs or memory.
    InsufficientResources,
    /// A limit on work in progress is reached; retry later.
    Busy,
    /// The instance's agent did not answer in time.
    Timeout,
    /// The machine lacks something the backend needs.
    Unavailable,
    /// The journal cannot be written: the daemon refuses all changes.
    JournalUnavailable,
    /// The instance is quarantined or needs an operator.
    OperatorActionNeeded,
    /// Not implemented yet.
    NotImplemented,
    /// An internal error of kmorph.
    Internal,
}

/// Why a request was refused, or why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of failure.
    #[serde(rename = "code")]
    pub kind: FailureKind,
    /// The attempted action, its object and the error, for people.
    pub message: String,
    /// The next step, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_step: Option<NextStep>,
}

impl Failure {
    /// Creates a failure without a next step.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            next_step: None,
        }
    }

    /// Returns this failure with a next step.
    #[must_use]
    pub fn hint(mut self, next_step: impl Into<NextStep>) -> Self {
        self.next_step = Some(next_step.into());
        self
    }
}
