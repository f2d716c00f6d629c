//! Errors of the API.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The reason why a request failed. The list is ordered by the cause: the caller, the current state, the machine,
/// kmorph itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is malformed, or a value is out of range. HTTP 400.
    InvalidRequest,
    /// The caller may read, but not make changes. HTTP 403.
    Forbidden,
    /// The instance, operation or path does not exist. HTTP 404.
    NotFound,
    /// The path exists, but does not support this method. HTTP 405.
    MethodNotAllowed,
    /// The request is too large. HTTP 413.
    TooLarge,
    /// The file is not a bootable kernel image. HTTP 422.
    BadKernelImage,
    /// The kernel image does not exist, or the daemon may not read it. HTTP 404.
    KernelUnreadable,
    /// The kernel image differs from the recorded one. HTTP 409.
    KernelChanged,
    /// An instance did not start: its program ended, or its kernel or agent did not come up. HTTP 422.
    StartFailed,
    /// The name is already in use. HTTP 409.
    AlreadyExists,
    /// Not possible in the current state (a second morph, a commit before validate), or never with this backend. HTTP
    /// 409.
    WrongState,
    /// The other kernel lacks what the morph needs. HTTP 409.
    Incompatible,
    /// The estimated downtime exceeds the budget. HTTP 409.
    OverBudget,
    /// The pool does not have enough CPUs or memory. HTTP 409.
    InsufficientResources,
    /// A limit on work in progress is reached; try again later. HTTP 503.
    Busy,
    /// The instance's agent did not answer in time. HTTP 504.
    Timeout,
    /// The machine lacks something that the backend needs. HTTP 503.
    Unavailable,
    /// The journal cannot be written, so no changes are possible. HTTP 507.
    JournalUnavailable,
    /// The instance is quarantined or needs an operator. HTTP 409.
    OperatorActionNeeded,
    /// Not built yet. HTTP 501.
    NotImplemented,
    /// Internal error of kmorph. HTTP 500.
    Internal,
}

impl ErrorCode {
    /// Returns the HTTP status of this error.
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

/// The body of every error response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Error code for programs.
    pub code: ErrorCode,
    /// The attempted action, its object and the error, for people.
    pub message: String,
    /// The next step, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_step: Option<String>,
}

impl ApiError {
    /// Creates an error without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            next_step: None,
        }
    }

    /// Returns this error with a next step.
    #[must_use]
    pub fn hint(mut self, next_step: impl Into<String>) -> Self {
        self.next_step = Some(next_step.into());
        self
    }
}
