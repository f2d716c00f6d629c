//! How the API refuses.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a request was not done. The order of the list is by who is to blame: the caller, the state
/// of things, the machine, kmorph itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request does not parse, or a value is out of its range. HTTP 400.
    InvalidRequest,
    /// The caller may look, not change. HTTP 403.
    Forbidden,
    /// There is no such instance, operation or path. HTTP 404.
    NotFound,
    /// The path is there, and is not asked with this method. HTTP 405.
    MethodNotAllowed,
    /// The request is larger than the daemon reads. HTTP 413.
    TooLarge,
    /// The file is no kernel image that can be booted. HTTP 422.
    BadKernelImage,
    /// The kernel image is not there, or the daemon may not read it. HTTP 404.
    KernelUnreadable,
    /// The kernel image is not the one that was recorded. HTTP 409.
    KernelChanged,
    /// An instance did not start: its program ended, or its kernel or agent did not come up. HTTP 422.
    StartFailed,
    /// It exists already. HTTP 409.
    AlreadyExists,
    /// Not possible in the present state: a second morph, a commit before validate. Or never with this backend. HTTP 409.
    WrongState,
    /// The other kernel lacks what the morph needs. HTTP 409.
    Incompatible,
    /// The estimated downtime is above the budget. HTTP 409.
    OverBudget,
    /// The pool has not enough CPUs or memory. HTTP 409.
    InsufficientResources,
    /// A limit on work in progress is reached; try again later. HTTP 503.
    Busy,
    /// The instance's agent did not answer in time. HTTP 504.
    Timeout,
    /// The machine lacks something the backend needs. HTTP 503.
    Unavailable,
    /// The journal cannot be written: nothing may change now. HTTP 507.
    JournalUnavailable,
    /// The instance is quarantined or needs an operator. HTTP 409.
    OperatorActionNeeded,
    /// Not built yet. HTTP 501.
    NotImplemented,
    /// A fault of kmorph's own. HTTP 500.
    Internal,
}

impl ErrorCode {
    /// The HTTP status it is served with.
    pub fn http_status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::Forbidden => 403,
            Self::NotFound | Self::KernelUnreadable => 404,
            Self::MethodNotAllowed => 405,
            Self::AlreadyExists
            | Self::WrongState
            | Self::KernelChanged
            | Self::Incompatible
            | Self::OverBudget
            | Self::InsufficientResources
            | Self::OperatorActionNeeded => 409,
            Self::TooLarge => 413,
            Self::BadKernelImage | Self::StartFailed => 422,
            Self::Internal => 500,
            Self::NotImplemented => 501,
            Self::Busy | Self::Unavailable => 503,
            Self::Timeout => 504,
            Self::JournalUnavailable => 507,
        }
    }
}

/// The body of every refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind, for programs.
    pub code: ErrorCode,
    /// What was tried, on what, and what happened, for people.
    pub message: String,
    /// What to do next, when there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_step: Option<String>,
}

impl ApiError {
    /// An error without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            next_step: None,
        }
    }

    /// The same error with what to do next.
    #[must_use]
    pub fn hint(mut self, next_step: impl Into<String>) -> Self {
        self.next_step = Some(next_step.into());
        self
    }
}
