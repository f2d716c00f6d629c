//! Exit codes of kmorphctl and the mapping from API errors to them.

use std::process::ExitCode;

use kmorph_control_api::ErrorCode;

/// An exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Success.
    Ok = 0,
    /// Internal error of kmorph.
    Internal = 1,
    /// Invalid command line.
    Usage = 2,
    /// No daemon answers.
    Unreachable = 3,
    /// The instance, operation or morph does not exist.
    NotFound = 4,
    /// The present state does not permit the request.
    Refused = 5,
    /// Permission denied.
    Forbidden = 6,
    /// A file or value was refused.
    InvalidInput = 7,
    /// The operation started and failed.
    OperationFailed = 8,
    /// A required resource is not available at this time.
    Resources = 9,
    /// Timeout.
    TimedOut = 10,
    /// Not built yet.
    NotImplemented = 11,
    /// An operator must act.
    OperatorNeeded = 12,
    /// Interrupted by Ctrl-C.
    Interrupted = 130,
}

/// One row of the documented table.
#[derive(Clone, Copy, Debug)]
pub struct ExitCodeRow {
    /// The code.
    pub exit: Exit,
    /// The meaning, as in help and documentation.
    pub meaning: &'static str,
}

const fn row(exit: Exit, meaning: &'static str) -> ExitCodeRow {
    ExitCodeRow { exit, meaning }
}

/// All exit codes, in order. The help text and the man page are generated from this table, and a
/// test compares docs/cli.md with it.
pub const EXIT_CODES: [ExitCodeRow; 14] = [
    row(Exit::Ok, "done"),
    row(
        Exit::Internal,
        "internal error of kmorph, or the output cannot be written",
    ),
    row(Exit::Usage, "invalid command line"),
    row(
        Exit::Unreachable,
        "no daemon answers at the socket, or the daemon did not start",
    ),
    row(
        Exit::NotFound,
        "no such instance, operation, morph or program",
    ),
    row(
        Exit::Refused,
        "not allowed in the current state or by this backend, or already exists",
    ),
    row(Exit::Forbidden, "permission denied"),
    row(
        Exit::InvalidInput,
        "invalid value, policy file, kernel image or vmcore",
    ),
    row(
        Exit::OperationFailed,
        "the operation started and then failed, was rolled back or was cancelled",
    ),
    row(
        Exit::Resources,
        "not enough CPUs or memory, too many operations in progress, or the machine lacks a feature",
    ),
    row(Exit::TimedOut, "timed out"),
    row(Exit::NotImplemented, "not built yet"),
    row(
        Exit::OperatorNeeded,
        "operator action needed: quarantine, unconfirmed fence, or journal not writable",
    ),
    row(Exit::Interrupted, "interrupted by Ctrl-C"),
];

impl Exit {
    /// Returns the number.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// Returns the exit code of a request that the daemon refused.
    pub fn of_refusal(code: ErrorCode) -> Self {
        match code {
            ErrorCode::InvalidRequest
            | ErrorCode::MethodNotAllowed
            | ErrorCode::TooLarge
            | ErrorCode::BadKernelImage
            | ErrorCode::KernelUnreadable
            | ErrorCode::KernelChanged => Self::InvalidInput,
            ErrorCode::StartFailed => Self::OperationFailed,
            ErrorCode::Forbidden => Self::Forbidden,
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::AlreadyExists
            | ErrorCode::WrongState
            | ErrorCode::Incompatible
            | ErrorCode::OverBudget => Self::Refused,
            ErrorCode::InsufficientResources | ErrorCode::Busy | ErrorCode::Unavailable => {
                Self::Resources
            }
            ErrorCode::Timeout => Self::TimedOut,
            ErrorCode::JournalUnavailable | ErrorCode::OperatorActionNeeded => Self::OperatorNeeded,
            ErrorCode::NotImplemented => Self::NotImplemented,
            ErrorCode::Internal => Self::Internal,
        }
    }

    /// Returns the exit code of an operation that was begun and failed. A cause that says more than
    /// "failed" keeps its own code.
    pub fn of_failed_operation(code: ErrorCode) -> Self {
        match Self::of_refusal(code) {
            own @ (Self::InvalidInput
            | Self::Resources
            | Self::NotImplemented
            | Self::OperatorNeeded) => own,
            _ => Self::OperationFailed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Returns the list as text, for the help and the man page.
pub(crate) fn help_text() -> String {
    let mut text = String::from("Exit codes:\n");
    for ExitCodeRow { exit, meaning } in EXIT_CODES {
        text.push_str(&format!("  {:>3}  {meaning}\n", exit.code()));
    }
    text
}
