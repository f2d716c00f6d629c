//! Failures of commands.

use std::fmt;
use std::path::Path;

use kmorph_control_api::{ApiError, ErrorCode};

use crate::exit::Exit;

/// A failure: what happened, what to do next, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code of the process.
    pub(crate) exit: Exit,
    /// The daemon's error code, if the failure came from the daemon.
    pub(crate) code: Option<ErrorCode>,
    /// The attempted action, its object and the error.
    pub(crate) message: String,
    /// The next step.
    pub(crate) next_step: Option<String>,
    /// Whether to print nothing, because the reader of the output has exited.
    pub(crate) silent: bool,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            code: None,
            message: message.into(),
            next_step: None,
            silent: false,
        }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Exit::Internal, message)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Exit::InvalidInput, message)
    }

    /// Returns this failure with a next step.
    #[must_use]
    pub(crate) fn hint(mut self, next_step: impl Into<String>) -> Self {
        self.next_step = Some(next_step.into());
        self
    }

    /// Returns a refusal by the daemon.
    pub(crate) fn refused(error: ApiError) -> Self {
        Self::from_api(Exit::of_refusal(error.code), error)
    }

    /// Returns a failed operation of the daemon.
    pub(crate) fn operation(error: ApiError) -> Self {
        Self::from_api(Exit::of_failed_operation(error.code), error)
    }

    fn from_api(exit: Exit, error: ApiError) -> Self {
        Self {
            exit,
            code: Some(error.code),
            message: error.message,
            next_step: error.next_step,
            silent: false,
        }
    }

    /// Creates the failure for an unusable file that the user named.
    pub(crate) fn file(verb: &str, path: &Path, error: &std::io::Error) -> Self {
        let inner = error.get_ref();
        match inner.is_some_and(|inner| inner.is::<kmorph_files::NamedFileError>()) {
            // The error text already names the file.
            true => Self::invalid(error.to_string()),
            false => Self::invalid(format!("cannot {verb} {}: {error}", path.display())),
        }
    }

    /// Creates the failure for output that cannot be written. A reader that exits early (`| head`) is not an error.
    pub(crate) fn output(error: &std::io::Error) -> Self {
        let silent = error.kind() == std::io::ErrorKind::BrokenPipe;
        Self {
            exit: if silent { Exit::Ok } else { Exit::Internal },
            silent,
            ..Self::internal(format!("cannot write the output: {error}"))
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
