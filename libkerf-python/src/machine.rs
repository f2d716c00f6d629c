use std::path::PathBuf;

use libkerf::machine;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use serde::{Deserialize, Serialize};

use crate::pickled::{Reduced, reduce};

/// A CPU and its location.
#[pyclass(frozen, eq, hash, module = "libkerf", get_all)]
#[derive(Clone, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub(crate) struct Cpu {
    /// Physical id: APIC id on x86.
    id: u64,
    /// The running kernel's number for it, if that kernel has the CPU.
    logical: Option<u32>,
    /// NUMA node.
    node: u32,
    /// Socket.
    package: u32,
    /// Core, within the socket.
    core: u32,
}

#[pymethods]
impl Cpu {
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        reduce(py, "Cpu", self)
    }

    fn __repr__(&self) -> String {
        format!("<Cpu {} on node {}>", self.id, self.node)
    }
}

/// A machine, as far as its files describe it.
#[pyclass(frozen, module = "libkerf")]
#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct Machine(pub(crate) machine::Machine);

#[pymethods]
impl Machine {
    /// Reads the machine with this root directory.
    ///
    /// CPUs that have left the host are missing: read the machine before a pool is created.
    ///
    /// Raises OSError if /proc/cpuinfo cannot be read.
    #[staticmethod]
    #[pyo3(signature = (root = PathBuf::from("/")), text_signature = "(root='/')")]
    fn read(py: Python<'_>, root: PathBuf) -> PyResult<Self> {
        Ok(Self(py.detach(|| machine::Machine::read(&root))?))
    }

    /// All CPUs, by physical id.
    #[getter]
    fn cpus<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let cpus = self.0.cpus().map(|cpu| Cpu {
            id: cpu.id,
            logical: cpu.logical,
            node: cpu.node,
            package: cpu.package,
            core: cpu.core,
        });
        PyTuple::new(py, cpus.collect::<Vec<Cpu>>())
    }

    /// The unit, in bytes, in which memory moves to and from a running kernel.
    #[getter]
    fn memory_block(&self) -> u64 {
        self.0.memory_block()
    }

    /// Chunks of the pool in /proc/iomem, as (address, bytes).
    #[getter]
    fn pool_chunks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.pool_chunks().unwrap_or_default())
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        reduce(py, "Machine", self)
    }

    fn __repr__(&self) -> String {
        format!("<Machine: {} CPUs>", self.0.cpus().count())
    }
}
