use libkerf::check;
use libkerf::overlay::{
    self, CpuMove, Create, DeviceMove, Fragment, MemoryMove, Operation, Target,
};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use serde::{Deserialize, Serialize};

use crate::arguments::{List, One};
use crate::errors::{OrRaise, Raise};
use crate::instance::Instance;
use crate::pickled::{Reduced, reduce};
use crate::state::parse_devices;
use crate::tree::DeviceTree;

/// A change of a pool and of instances, in the kernel's terms: operations, in the order of their addition.
///
/// If an instance is named, its new resources come from the pool. Without a name, the pool receives them from the host.
#[pyclass(eq, module = "libkerf")]
#[derive(Clone, PartialEq, Deserialize, Serialize)]
pub(crate) struct Overlay(pub(crate) overlay::Overlay);

impl From<overlay::Overlay> for Overlay {
    fn from(overlay: overlay::Overlay) -> Self {
        Self(overlay)
    }
}

fn target(instance: Option<String>) -> Target {
    instance.map_or(Target::Pool, Target::Instance)
}

impl Overlay {
    fn push(&mut self, target: Target, operation: Operation) {
        self.0.fragments.push(Fragment {
            target,
            operations: vec![operation],
        });
    }
}

#[pymethods]
impl Overlay {
    /// An empty overlay. `note` is the description in the transaction's directory.
    #[new]
    #[pyo3(signature = (*, note = None))]
    fn new(note: Option<String>) -> Self {
        Self(overlay::Overlay {
            note,
            fragments: Vec::new(),
        })
    }

    /// Reads an overlay's tree.
    ///
    /// Raises ValidationError if it violates rules.
    #[staticmethod]
    fn from_device_tree(py: Python<'_>, tree: PyRef<'_, DeviceTree>) -> PyResult<Self> {
        let (overlay, report) = check::overlay(&tree.inner, None);
        match report.is_valid() {
            true => Ok(Self(overlay)),
            false => Err(report.raise(py)),
        }
    }

    /// Creates an instance from free resources of the pool. Its devices are added with `add_devices`.
    fn create(&mut self, instance: PyRef<'_, Instance>) {
        let create = Create {
            instance: instance.model.clone(),
            ..Create::default()
        };
        self.push(Target::Instances, Operation::Create(Box::new(create)));
    }

    /// Removes an instance; its resources return to the pool. The kernel cannot undo this.
    fn remove(&mut self, name: String) {
        self.push(Target::Instances, Operation::Remove(name));
    }

    /// Adds CPUs, by their physical ids.
    #[pyo3(signature = (cpus, instance = None))]
    fn add_cpus(&mut self, cpus: List<u64>, instance: Option<String>) {
        let moves = cpus.0.into_iter().map(CpuMove::from).collect();
        self.push(target(instance), Operation::CpuAdd(moves));
    }

    /// Removes CPUs, by their physical ids.
    #[pyo3(signature = (cpus, instance = None))]
    fn remove_cpus(&mut self, cpus: List<u64>, instance: Option<String>) {
        let moves = cpus.0.into_iter().map(CpuMove::from).collect();
        self.push(target(instance), Operation::CpuRemove(moves));
    }

    /// Adds memory, in bytes; for a running instance, at the given address. For the pool the kernel
    /// picks the address, on NUMA node `node`.
    #[pyo3(signature = (size, instance = None, *, base = None, node = None))]
    fn add_memory(
        &mut self,
        size: One<u64>,
        instance: Option<String>,
        base: Option<One<u64>>,
        node: Option<One<u32>>,
    ) {
        let memory = MemoryMove {
            base: base.map(|base| base.0).or(instance.as_ref().map(|_| 0)),
            size: size.0,
            node: node.map(|node| node.0),
            ..MemoryMove::default()
        };
        self.push(target(instance), Operation::MemoryAdd(vec![memory]));
    }

    /// Removes memory: a whole region of an instance, or a whole chunk of the pool.
    #[pyo3(signature = (base, size, instance = None))]
    fn remove_memory(&mut self, base: One<u64>, size: One<u64>, instance: Option<String>) {
        let memory = MemoryMove {
            base: Some(base.0),
            size: size.0,
            ..MemoryMove::default()
        };
        self.push(target(instance), Operation::MemoryRemove(vec![memory]));
    }

    /// Adds devices, by their PCI addresses.
    ///
    /// Raises ValueError for an invalid address.
    #[pyo3(signature = (devices, instance = None))]
    fn add_devices(&mut self, devices: List<String>, instance: Option<String>) -> PyResult<()> {
        let moves = parse_devices(&devices.0)?.into_iter().map(DeviceMove::from);
        self.push(target(instance), Operation::DeviceAdd(moves.collect()));
        Ok(())
    }

    /// Removes devices, by their PCI addresses.
    ///
    /// Raises ValueError for an invalid address.
    #[pyo3(signature = (devices, instance = None))]
    fn remove_devices(&mut self, devices: List<String>, instance: Option<String>) -> PyResult<()> {
        let moves = parse_devices(&devices.0)?.into_iter().map(DeviceMove::from);
        self.push(target(instance), Operation::DeviceRemove(moves.collect()));
        Ok(())
    }

    /// Its operations, in order: (the target's path, the operation's name).
    #[getter]
    fn operations<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let fragments = self.0.fragments.iter();
        let operations = fragments.flat_map(|fragment| {
            let named = fragment.operations.iter().map(|o| o.name());
            named.map(|name| (fragment.target.path(), name))
        });
        PyTuple::new(py, operations.collect::<Vec<_>>())
    }

    /// Whether the overlay changes nothing.
    #[getter]
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The overlay's tree.
    fn to_device_tree(&self) -> DeviceTree {
        self.0.to_tree().into()
    }

    /// The overlay's blob.
    ///
    /// Raises BlobError if a name cannot be written.
    fn to_bytes(&self, py: Python<'_>) -> PyResult<Vec<u8>> {
        py.detach(|| self.0.to_blob()).or_raise(py)
    }

    /// Splits the change into overlays of at most 4096 bytes each, to be applied in this order.
    ///
    /// Raises UnsplittableError if one operation alone is too large.
    fn split(&self, py: Python<'_>) -> PyResult<Vec<Self>> {
        let parts = py.detach(|| self.0.split()).or_raise(py)?;
        Ok(parts.into_iter().map(Self).collect())
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        reduce(py, "Overlay", self)
    }

    fn __repr__(&self) -> String {
        let count: usize = self.0.fragments.iter().map(|f| f.operations.len()).sum();
        format!("<Overlay: {count} operations>")
    }
}
