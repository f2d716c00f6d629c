use std::collections::BTreeMap;

use libkerf::allocate::{self, Exchange, Handover, Nodes, Request, Siblings};
use libkerf::check::{self, Context};
use libkerf::model::{MemoryRequest, PciAddress};
use libkerf::overlay::{self, Status};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use serde::{Deserialize, Serialize};

use crate::arguments::{List, One};
use crate::errors::{OrRaise, Raise};
use crate::instance::Instance;
use crate::machine::Machine;
use crate::overlay::Overlay;
use crate::pickled::{Reduced, reduce};
use crate::report::Report;
use crate::tree::DeviceTree;

/// A pool, its instances and their status, to which overlays are applied. Immutable: each change
/// returns a new state.
#[pyclass(frozen, eq, module = "libkerf")]
#[derive(Clone, PartialEq, Deserialize, Serialize)]
pub(crate) struct State(pub(crate) overlay::State);

/// The status with this name.
pub(crate) fn parse_status(text: &str) -> PyResult<Status> {
    let unknown = || {
        PyValueError::new_err(format!(
            "{text:?} is not a status: empty, ready, loaded, active, failed"
        ))
    };
    Status::parse(text).ok_or_else(unknown)
}

/// Parses PCI addresses.
pub(crate) fn parse_devices(devices: &[String]) -> PyResult<Vec<PciAddress>> {
    let parse = |text: &String| {
        PciAddress::parse(text).ok_or_else(|| {
            PyValueError::new_err(format!(
                "{text:?} is not a PCI address such as 0000:09:00.0"
            ))
        })
    };
    devices.iter().map(parse).collect()
}

#[pymethods]
impl State {
    /// The contents of a pool's or a baseline's tree.
    ///
    /// Raises ValidationError if the tree violates rules.
    #[staticmethod]
    #[pyo3(signature = (tree, machine = None))]
    fn from_device_tree(
        py: Python<'_>,
        tree: PyRef<'_, DeviceTree>,
        machine: Option<Bound<'_, Machine>>,
    ) -> PyResult<Self> {
        let machine = machine.as_ref().map(|machine| &machine.get().0);
        let tree = &tree.inner;
        let (system, report) = py.detach(|| check::system(tree, Context { machine }));
        if !report.is_valid() {
            return Err(report.raise(py));
        }
        let state = overlay::State::new(system);
        Ok(Self(match machine {
            Some(machine) => state.on(machine),
            None => state,
        }))
    }

    /// The instances.
    #[getter]
    fn instances<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let instances = self.0.system.instances.iter();
        let instances: Vec<Instance> = instances.cloned().map(Instance::from).collect();
        PyTuple::new(py, instances)
    }

    /// Physical ids of the pool's CPUs.
    #[getter]
    fn cpus<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.0.system.resources.cpus)
    }

    /// Physical ids of the CPUs that no instance has.
    #[getter]
    fn free_cpus<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.system.free_cpus())
    }

    /// Size of the pool's memory, in bytes.
    #[getter]
    fn memory_bytes(&self) -> u128 {
        self.0.system.resources.memory_bytes()
    }

    /// Names of the pool's devices.
    #[getter]
    fn devices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let devices = self.0.system.resources.devices.iter();
        let names: Vec<&str> = devices.map(|device| device.name.as_str()).collect();
        PyTuple::new(py, names)
    }

    /// Size of the pool's memory that no instance has, on one NUMA node or on all, in bytes.
    #[pyo3(signature = (node = None))]
    fn free_bytes(&self, node: Option<One<u32>>) -> u128 {
        self.0.free_bytes(node.map(|node| node.0))
    }

    /// The instance with this name.
    ///
    /// Raises KeyError if it does not exist.
    fn instance(&self, name: &str) -> PyResult<Instance> {
        let instance = self.0.system.instance(name).cloned();
        let missing = || PyKeyError::new_err(format!("there is no instance {name:?}"));
        instance.map(Instance::from).ok_or_else(missing)
    }

    /// The status of an instance: "empty", "ready", "loaded", "active" or "failed".
    fn status(&self, name: &str) -> &'static str {
        self.0.status_of(name).as_str()
    }

    /// This state with the status of an instance.
    ///
    /// Raises ValueError for an unknown status.
    fn with_status(&self, name: &str, status: &str) -> PyResult<Self> {
        let status = parse_status(status)?;
        Ok(Self(self.0.clone().with_status(name, status)))
    }

    /// This state with this instance, which replaces one with the same name.
    fn with_instance(&self, instance: PyRef<'_, Instance>) -> Self {
        let mut state = self.0.clone();
        let instances = &mut state.system.instances;
        let new = instance.model.clone();
        match instances.iter_mut().find(|there| there.name == new.name) {
            Some(there) => *there = new,
            None => instances.push(new),
        }
        Self(state)
    }

    /// This state without this instance.
    ///
    /// Raises KeyError if it does not exist.
    fn without_instance(&self, name: &str) -> PyResult<Self> {
        self.instance(name)?;
        let mut state = self.0.clone();
        state.system.instances.retain(|there| there.name != name);
        state.status.remove(name);
        Ok(Self(state))
    }

    /// Checks this state. Returns the findings.
    fn check(&self, py: Python<'_>) -> Report {
        py.detach(|| self.0.check()).into()
    }

    /// The state after an overlay.
    ///
    /// Raises ValidationError with everything that the kernel would refuse.
    fn apply(&self, py: Python<'_>, overlay: PyRef<'_, Overlay>) -> PyResult<Self> {
        let overlay = &overlay.0;
        let applied = py.detach(|| self.0.apply(overlay));
        applied.map(Self).or_raise(py)
    }

    /// The overlay that turns this state into `after`; it takes the given resources first.
    ///
    /// Raises ChangeError if no overlay can make the change, ValidationError if the kernel would refuse it.
    fn overlay_to(&self, py: Python<'_>, after: Bound<'_, State>) -> PyResult<Overlay> {
        let after = &after.get().0.system;
        let overlay = py.detach(|| self.0.overlay_to(after));
        overlay.map(Overlay::from).or_raise(py)
    }

    /// The overlay that makes the pool match a baseline: CPUs, devices, and memory for each NUMA node. Memory is
    /// returned in whole chunks, and chunks in use stay. `memory`, such as "2GB" or "8GB@0,8GB@1", replaces the
    /// baseline's own.
    ///
    /// Raises ValueError for an invalid size, ValidationError if the baseline violates rules or the kernel would refuse
    /// the overlay.
    #[pyo3(signature = (baseline, *, memory = None))]
    fn reshape(
        &self,
        py: Python<'_>,
        baseline: PyRef<'_, DeviceTree>,
        memory: Option<&str>,
    ) -> PyResult<Overlay> {
        let (system, report) = check::baseline(&baseline.inner, Context::default());
        if !report.is_valid() {
            return Err(report.raise(py));
        }
        let mut wanted = system.resources;
        if let Some(memory) = memory {
            let requests = MemoryRequest::parse_list(memory);
            wanted.requests = requests.map_err(|error| PyValueError::new_err(error.to_string()))?;
        }
        let overlay = py.detach(|| self.0.reshape(&wanted));
        overlay.map(Overlay::from).or_raise(py)
    }

    /// Chooses CPUs and memory for a new instance, and returns the overlay that creates it.
    ///
    /// CPUs and memory are from one NUMA node if a node has enough of both; `one_node` or `node`
    /// permits nothing else. No core is shared with another instance unless `share_cores` is true.
    /// `machine` gives the location of CPUs.
    ///
    /// Raises ShortageError if the resources cannot be chosen.
    #[pyo3(signature = (name, *, cpus, memory, id = None, node = None, one_node = false, share_cores = false, machine = None))]
    #[allow(clippy::too_many_arguments, reason = "they have names in Python")]
    fn allocate(
        &self,
        py: Python<'_>,
        name: String,
        cpus: One<u32>,
        memory: One<u64>,
        id: Option<One<u32>>,
        node: Option<One<u32>>,
        one_node: bool,
        share_cores: bool,
        machine: Option<Bound<'_, Machine>>,
    ) -> PyResult<Overlay> {
        let request = Request {
            name,
            id: id.map(|id| id.0),
            cpus: cpus.0 as usize,
            memory: memory.0,
            nodes: match node {
                Some(node) => Nodes::This(node.0),
                None if one_node => Nodes::One,
                None => Nodes::PreferOne,
            },
            siblings: match share_cores {
                true => Siblings::Apart,
                false => Siblings::Together,
            },
        };
        let known = machine.as_ref().map(|machine| machine.get().0.clone());
        let machine = known.or_else(|| self.0.machine.clone()).unwrap_or_default();
        let overlay = py.detach(|| allocate::instance(&self.0, &machine, &request));
        overlay.map(Overlay::from).or_raise(py)
    }

    /// Plans an exchange of resources between two instances, as one overlay: these CPUs and devices;
    /// or, with `everything`, all resources of the giver, which then ends. `memory` is the additional
    /// memory of the receiver, in bytes.
    ///
    /// Raises ExchangeError if the exchange is impossible, ValidationError if the kernel would refuse
    /// it.
    #[pyo3(signature = (giver, getter, *, cpus = List::default(), devices = List::default(), memory = One(0), everything = false), text_signature = "($self, giver, getter, *, cpus=(), devices=(), memory=0, everything=False)")]
    #[allow(clippy::too_many_arguments, reason = "they have names in Python")]
    fn plan_exchange(
        &self,
        py: Python<'_>,
        giver: String,
        getter: String,
        cpus: List<u64>,
        devices: List<String>,
        memory: One<u64>,
        everything: bool,
    ) -> PyResult<Overlay> {
        let (cpus, memory) = (cpus.0, memory.0);
        let devices = parse_devices(&devices.0)?;
        if everything && !(cpus.is_empty() && devices.is_empty()) {
            let message = "everything goes over: name no CPUs and devices";
            return Err(PyValueError::new_err(message));
        }
        let exchange = Exchange {
            from: giver,
            to: getter,
            handover: match everything {
                true => Handover::Everything,
                false => Handover::These { cpus, devices },
            },
            memory,
        };
        let overlay = py.detach(|| allocate::plan(&self.0, &exchange));
        overlay.map(Overlay::from).or_raise(py)
    }

    /// Pool and instances as a baseline with instances, for files and for kerf.
    fn to_device_tree(&self) -> DeviceTree {
        self.0.system.to_tree().into()
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        reduce(py, "State", self)
    }

    fn __repr__(&self) -> String {
        let does: BTreeMap<&str, &str> = self
            .0
            .system
            .instances
            .iter()
            .map(|i| (i.name.as_str(), self.0.status_of(&i.name).as_str()))
            .collect();
        format!(
            "<State: {} CPUs, instances {does:?}>",
            self.0.system.resources.cpus.len()
        )
    }
}
