use std::path::PathBuf;

use libkerf::machine;
use pyo3::prelude::*;

/// A CPU and its place.
#[pyclass(frozen, eq, hash, module = "libkerf", get_all)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Cpu {
    /// Physical id: APIC id on x86.
    id: u64,
    /// The running kernel's number for it, when it has it.
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
    fn __repr__(&self) -> String {
        format!("<Cpu {} on node {}>", self.id, self.node)
    }
}

/// A machine, as far as its files tell.
#[pyclass(frozen, module = "libkerf")]
pub(crate) struct Machine(pub(crate) machine::Machine);

#[pymethods]
impl Machine {
    /// Reads the machine whose root directory this is.
    ///
    /// CPUs that have left the host are not found any more: read it before a pool is made.
    ///
    /// Raises OSError when /proc/cpuinfo cannot be read.
    #[staticmethod]
    #[pyo3(signature = (root = PathBuf::from("/")), text_signature = "(root='/')")]
    fn read(py: Python<'_>, root: PathBuf) -> PyResult<Self> {
        Ok(Self(py.detach(|| machine::Machine::read(&root))?))
    }

    /// All CPUs, by physical id.
    #[getter]
    fn cpus(&self) -> Vec<Cpu> {
        let cpus = self.0.cpus().map(|cpu| Cpu {
            id: cpu.id,
            logical: cpu.logical,
            node: cpu.node,
            package: cpu.package,
            core: cpu.core,
        });
        cpus.collect()
    }

    /// The unit, in bytes, in which memory comes and goes while a kernel runs.
    #[getter]
    fn memory_block(&self) -> u64 {
        self.0.memory_block()
    }

    /// Chunks of the pool in /proc/iomem, as (address, bytes).
    #[getter]
    fn pool_chunks(&self) -> Vec<(u64, u64)> {
        self.0.pool_chunks().unwrap_or_default().to_vec()
    }
}
