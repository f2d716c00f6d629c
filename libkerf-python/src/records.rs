use std::path::PathBuf;

use libkerf::record::{self, DIRECTORY, Image, Record};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert::{dumps, to_python};
use crate::errors::OrRaise;
use crate::tree::DeviceTree;

/// kerf's records of loaded kernels, and the definitions of instances next to them.
#[pyclass(frozen, module = "libkerf")]
#[derive(Clone)]
pub(crate) struct Records(pub(crate) record::Records);

#[pymethods]
impl Records {
    /// The records in a directory (default: kerf's own).
    #[new]
    #[pyo3(signature = (directory = PathBuf::from(DIRECTORY)), text_signature = "(directory='/var/lib/kerf/instances')")]
    fn new(directory: PathBuf) -> Self {
        Self(record::Records::in_directory(directory))
    }

    /// An instance's record, in kerf's format; None if nothing was loaded.
    ///
    /// Raises RecordError if it exists but cannot be read.
    fn load<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        let record = py.detach(|| self.0.load(name)).or_raise(py)?;
        record.map(|record| to_python(py, &record)).transpose()
    }

    /// Writes an instance's record atomically.
    ///
    /// Raises ValueError if it has another format than kerf's, RecordError if it cannot be written.
    fn save(&self, py: Python<'_>, name: &str, record: Bound<'_, PyAny>) -> PyResult<()> {
        let record: Record = serde_json::from_str(&dumps(&record)?)
            .map_err(|error| PyValueError::new_err(format!("invalid record: {error}")))?;
        py.detach(|| self.0.save(name, &record)).or_raise(py)
    }

    /// Removes an instance's record. A missing record is not an error.
    ///
    /// Raises RecordError if it cannot be removed.
    fn remove(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        py.detach(|| self.0.remove(name)).or_raise(py)
    }

    /// An instance's definition; None if it does not exist.
    ///
    /// Raises RecordError if it exists but cannot be read.
    fn load_definition(&self, py: Python<'_>, name: &str) -> PyResult<Option<DeviceTree>> {
        let tree = py.detach(|| self.0.load_definition(name)).or_raise(py)?;
        Ok(tree.map(DeviceTree::from))
    }

    /// Writes an instance's definition atomically, and returns its path.
    ///
    /// Raises RecordError if it cannot be written.
    fn save_definition(
        &self,
        py: Python<'_>,
        name: &str,
        tree: PyRef<'_, DeviceTree>,
    ) -> PyResult<PathBuf> {
        let tree = &tree.inner;
        py.detach(|| self.0.save_definition(name, tree))
            .or_raise(py)
    }

    /// Removes an instance's definition. A missing definition is not an error.
    ///
    /// Raises RecordError if it cannot be removed.
    fn remove_definition(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        py.detach(|| self.0.remove_definition(name)).or_raise(py)
    }
}

/// The origin of a kernel image, as kerf records it: path, size, SHA-256, format, compression, version.
///
/// Raises RecordError if the file cannot be read.
#[pyfunction]
pub(crate) fn inspect_kernel(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyAny>> {
    let image = py.detach(|| Image::of_kernel(&path)).or_raise(py)?;
    to_python(py, &image)
}

/// The origin of an initial file system, as kerf records it: path, size, SHA-256, compression.
///
/// Raises RecordError if the file cannot be read.
#[pyfunction]
pub(crate) fn inspect_initrd(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyAny>> {
    let image = py.detach(|| Image::of_initrd(&path)).or_raise(py)?;
    to_python(py, &image)
}
