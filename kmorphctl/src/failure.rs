//! Failures of commands.

use std::fmt;
use std::path::Path;

use kmorph_control_api::{ApiError, ErrorCode};

use crate::exit::Exit;

/// A failure: what happened, what to do next, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    /// How the process ends.
    pub(crate) exit: Exit,
    /// The daemon's own word for it, when it came from the daemon.
    pub(crate) code: Option<ErrorCode>,
    /// What was attempted, on what, and what happened.
    pub(crate) message: String,
    /// What to do next.
    pub(crate) next_step: Option<String>,
    /// Whether to print nothing: the reader of our output has gone away.
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

    /// The same failure with what to do next.
    #[must_use]
    pub(crate) fn hint(mut self, next_step: impl Into<String>) -> Self {
        self.next_step = Some(next_step.into());
        self
    }

    /// The daemon refused.
    pub(crate) fn refused(error: ApiError) -> Self {
        Self::from_api(Exit::of_refusal(error.code), error)
    }

    /// The daemon began and failed.
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

    /// A file named by the user cannot be used.
    pub(crate) fn file(verb: &str, path: &Path, error: &std::io::Error) -> Self {
        let inner = error.get_ref();
        match inner.is_some_and(|inner| inner.is::<kmorph_files::NamedFileError>()) {
            // It says so itself.
            true => Self::invalid(error.to_string()),
            false => Self::invalid(format!("cannot {verb} {}: {error}", path.display())),
        }
    }

    /// The output cannot be written. A reader that exits early (`| head`) is not an error.
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
