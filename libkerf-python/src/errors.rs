//! Converts Rust errors to the exceptions of `libkerf.errors`.

use std::io;
use std::path::Path;

use libkerf::allocate::{NoExchange, Shortage};
use libkerf::check::Report;
use libkerf::dtb::DtbError;
use libkerf::dts::{DtsError, Unprintable};
use libkerf::kerf_text::KerfTextError;
use libkerf::kernel::{ApplyError, BootError, KernelError, LoadError, LockError};
use libkerf::overlay::{NoChange, Unsplittable};
use libkerf::record::RecordError;
use pyo3::call::PyCallArgs;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

use crate::control::ControlError;

/// An error that corresponds to an exception.
pub(crate) trait Raise {
    /// The exception.
    fn raise(self, py: Python<'_>) -> PyErr;
}

/// Results whose error corresponds to an exception.
pub(crate) trait OrRaise<T> {
    /// The value, or the exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T, E: Raise> OrRaise<T> for Result<T, E> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| error.raise(py))
    }
}

/// The exception with this name and these arguments.
pub(crate) fn exception<'py>(
    py: Python<'py>,
    class: &str,
    arguments: impl PyCallArgs<'py>,
) -> PyErr {
    let made = py
        .import("libkerf.errors")
        .and_then(|errors| errors.getattr(class))
        .and_then(|class| class.call1(arguments));
    match made {
        Ok(made) => PyErr::from_value(made),
        Err(error) => error,
    }
}

/// A system error on a file, in Python's form: with the file's name, and with the exception class for its
/// number.
pub(crate) fn on_file(error: &io::Error, path: &Path) -> PyErr {
    let reason = match error.raw_os_error() {
        // Without the text that Rust adds.
        Some(number) => nix::errno::Errno::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    };
    PyOSError::new_err((errno(error), reason, path.as_os_str().to_owned()))
}

fn errno(error: &io::Error) -> Option<i32> {
    error.raw_os_error()
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

impl Raise for DtbError {
    fn raise(self, py: Python<'_>) -> PyErr {
        exception(py, "BlobError", (self.to_string(), self.offset))
    }
}

impl Raise for DtsError {
    fn raise(self, py: Python<'_>) -> PyErr {
        let at = self.position;
        exception(py, "SourceError", (self.to_string(), at.line, at.column))
    }
}

impl Raise for KerfTextError {
    fn raise(self, py: Python<'_>) -> PyErr {
        exception(py, "KerfTextError", (self.to_string(),))
    }
}

impl Raise for Unprintable {
    fn raise(self, py: Python<'_>) -> PyErr {
        let path = self.path.to_string();
        exception(py, "UnprintableError", (self.to_string(), path))
    }
}

impl Raise for Report {
    fn raise(self, py: Python<'_>) -> PyErr {
        let report = crate::report::Report::from(self);
        exception(py, "ValidationError", (report,))
    }
}

impl Raise for Unsplittable {
    fn raise(self, py: Python<'_>) -> PyErr {
        exception(py, "UnsplittableError", (self.to_string(),))
    }
}

impl Raise for Shortage {
    fn raise(self, py: Python<'_>) -> PyErr {
        let kind = match &self {
            Shortage::Senseless(_) => "senseless",
            Shortage::NameTaken(_) => "name-taken",
            Shortage::IdTaken { .. } => "id-taken",
            Shortage::Cpus { .. } => "cpus",
            Shortage::Cores { .. } => "cores",
            Shortage::Memory { .. } => "memory",
            Shortage::Node { .. } => "node",
        };
        exception(py, "ShortageError", (self.to_string(), kind))
    }
}

impl Raise for NoExchange {
    fn raise(self, py: Python<'_>) -> PyErr {
        let kind = match self {
            NoExchange::Refused(report) => return report.raise(py),
            NoExchange::Unsplittable(error) => return error.raise(py),
            NoExchange::Unknown(_) => "unknown",
            NoExchange::Itself(_) => "itself",
            NoExchange::Memory { .. } => "memory",
            NoExchange::Unplaced => "unplaced",
        };
        exception(py, "ExchangeError", (self.to_string(), kind))
    }
}

impl Raise for NoChange {
    fn raise(self, py: Python<'_>) -> PyErr {
        let kind = match self {
            NoChange::Refused(report) => return report.raise(py),
            NoChange::Unsplittable(error) => return error.raise(py),
            NoChange::Fixed { .. } => "fixed",
            NoChange::Device(_) => "device",
            NoChange::Regions { .. } => "regions",
            NoChange::Unplaced => "unplaced",
            NoChange::Memory { .. } => "memory",
        };
        exception(py, "ChangeError", (self.to_string(), kind))
    }
}

impl Raise for KernelError {
    fn raise(self, py: Python<'_>) -> PyErr {
        let message = self.to_string();
        match &self {
            KernelError::Io { path, source, .. } => {
                exception(py, "KernelError", (message, shown(path), errno(source)))
            }
            KernelError::Tree { path, .. } | KernelError::Unknown { path, .. } => {
                exception(py, "KernelError", (message, shown(path)))
            }
            KernelError::NoPool { path } => exception(py, "NoPoolError", (message, shown(path))),
            KernelError::Late { .. } => exception(py, "LateError", (message,)),
            KernelError::Invalid(report) => report.clone().raise(py),
        }
    }
}

impl Raise for LockError {
    fn raise(self, py: Python<'_>) -> PyErr {
        let message = self.to_string();
        let (path, kind) = match &self {
            LockError::Held { path, .. } => (path, "held"),
            LockError::Kerf { path, .. } => (path, "kerf"),
            LockError::Io { path, .. } => (path, "io"),
        };
        exception(py, "LockError", (message, kind, shown(path)))
    }
}

impl Raise for ApplyError {
    fn raise(self, py: Python<'_>) -> PyErr {
        let message = self.to_string();
        let (kind, transactions) = match self {
            ApplyError::Invalid(report) => return report.raise(py),
            ApplyError::Unwritable(error) => return error.raise(py),
            ApplyError::Locked(error) => return error.raise(py),
            ApplyError::Kernel(error) => return error.raise(py),
            ApplyError::Outdated => ("outdated", Vec::new()),
            ApplyError::Lost { .. } => ("lost", Vec::new()),
            ApplyError::RolledBack { .. } => ("rolled-back", Vec::new()),
            ApplyError::Stuck { transaction, .. } => ("stuck", vec![transaction]),
            ApplyError::NotAsPlanned { transaction, .. } => ("not-as-planned", vec![transaction]),
            ApplyError::PartsUndone { .. } => ("parts-undone", Vec::new()),
            ApplyError::PartsInPlace { transactions, .. } => ("parts-in-place", transactions),
        };
        exception(py, "ApplyError", (message, kind, transactions))
    }
}

impl Raise for BootError {
    fn raise(self, py: Python<'_>) -> PyErr {
        let message = self.to_string();
        let (kind, errno) = match self {
            BootError::Kernel(error) => return error.raise(py),
            BootError::State { .. } => ("state", None),
            BootError::Id { .. } => ("id", None),
            BootError::CommandLine => ("command-line", None),
            BootError::Ended { .. } => ("ended", None),
            BootError::Refused { source, .. } => ("refused", errno(&source)),
        };
        exception(py, "BootError", (message, kind, errno))
    }
}

impl Raise for RecordError {
    fn raise(self, py: Python<'_>) -> PyErr {
        let message = self.to_string();
        let (kind, path) = match &self {
            RecordError::Name(_) => ("name", None),
            RecordError::Io { path, .. } => ("io", Some(path)),
            RecordError::Content { path, .. } => ("content", Some(path)),
            RecordError::Source { path, .. } => ("source", Some(path)),
            RecordError::Unprintable { path, .. } => ("unprintable", Some(path)),
        };
        let path = path.map(|path| shown(path));
        exception(py, "RecordError", (message, kind, path))
    }
}

impl Raise for LoadError {
    fn raise(self, py: Python<'_>) -> PyErr {
        let message = self.to_string();
        let kind = match self {
            LoadError::Boot(error) => return error.raise(py),
            LoadError::File(_) => "file",
            LoadError::Packed { .. } => "packed",
            LoadError::Memory(_) => "memory",
            LoadError::Unrecorded(_) => "unrecorded",
            LoadError::StillRecorded(_) => "still-recorded",
        };
        exception(py, "LoadError", (message, kind))
    }
}

impl Raise for ControlError {
    fn raise(self, py: Python<'_>) -> PyErr {
        let message = self.to_string();
        match self {
            ControlError::Unreachable { .. } | ControlError::Broken { .. } => {
                exception(py, "UnreachableError", (message,))
            }
            ControlError::Silent { .. } => exception(py, "SilentError", (message,)),
            ControlError::Signal(raised) => raised,
            ControlError::NotUnderstood { .. } => exception(py, "DaemonError", (message,)),
            ControlError::Refused {
                code, next_step, ..
            } => exception(py, "DaemonError", (message, code, next_step)),
        }
    }
}
