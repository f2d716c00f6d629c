//! How the daemon refuses a request, and how what it began fails.

use serde::{Deserialize, Serialize};

use super::NextStep;

/// Why a request was not done. The order of the list is by who is to blame: the caller, the state
/// of things, the machine, kmorph itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The request does not parse, or a value is out of its range.
    InvalidRequest,
    /// There is no such instance, operation or path.
    NotFound,
    /// The file is no kernel image that can be booted.
    BadKernelImage,
    /// The kernel image is not there, or the daemon may not read it.
    KernelUnreadable,
    /// The kernel image is not the one that was recorded.
    KernelChanged,
    /// An instance did not start: its program ended, or its kernel or agent did not come up.
    StartFailed,
    /// It exists already.
    AlreadyExists,
    /// Not possible in the present state: a second morph, a commit before validate. Or never with this backend.
    WrongState,
    /// The other kernel lacks what the morph needs.
    Incompatible,
    /// The estimated downtime is above the budget.
    OverBudget,
    /// The pool has not enough CPUs or memory.
    InsufficientResources,
    /// A limit on work in progress is reached; try again later.
    Busy,
    /// The instance's agent did not answer in time.
    Timeout,
    /// The machine lacks something the backend needs.
    Unavailable,
    /// The journal cannot be written: nothing may change now.
    JournalUnavailable,
    /// The instance is quarantined or needs an operator.
    OperatorActionNeeded,
    /// Not built yet.
    NotImplemented,
    /// A fault of kmorph's own.
    Internal,
}

/// Why something was refused, or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind.
    #[serde(rename = "code")]
    pub kind: FailureKind,
    /// What was tried, on what, and what happened, for people.
    pub message: String,
    /// What to do next, when there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_step: Option<NextStep>,
}

impl Failure {
    /// A failure without a next step.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            next_step: None,
        }
    }

    /// The same failure with what to do next.
    #[must_use]
    pub fn hint(mut self, next_step: impl Into<NextStep>) -> Self {
        self.next_step = Some(next_step.into());
        self
    }
}
