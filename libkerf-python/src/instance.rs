use std::path::PathBuf;

use libkerf::check::{self, Context, Rule};
use libkerf::kernel;
use libkerf::model;
use libkerf::model::Kind;
use libkerf::overlay;
use libkerf::record::{DIRECTORY, Records};
use libkerf::tree;
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use serde::{Deserialize, Serialize};

use crate::arguments::{List, One};
use crate::daemon::{Daemon, Spawn};
use crate::errors::{OrRaise, Raise, exception};
use crate::monitor::Monitor;
use crate::pickled::{Reduced, reduce};
use crate::report::Report;
use crate::state::State;
use crate::tree::DeviceTree;

/// An instance: its resources, actual or requested.
#[pyclass(module = "libkerf")]
#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct Instance {
    pub(crate) model: model::Instance,
    /// Its own tree, whose other contents are kept.
    tree: Option<tree::DeviceTree>,
    /// The tree of pool and instances from which it was read.
    system: Option<tree::DeviceTree>,
}

impl From<model::Instance> for Instance {
    fn from(model: model::Instance) -> Self {
        Self {
            model,
            tree: None,
            system: None,
        }
    }
}

impl Instance {
    /// All instances of a tree.
    pub(crate) fn all_of(py: Python<'_>, tree: &DeviceTree) -> PyResult<Vec<Self>> {
        let inner = &tree.inner;
        match Kind::of(inner) {
            Kind::Overlay => {
                let message = "this is an overlay: Overlay.from_device_tree reads it";
                Err(PyValueError::new_err(message))
            }
            Kind::Instance => match check::instance(inner) {
                (Some(model), _) => Ok(vec![Self {
                    tree: Some(inner.clone()),
                    ..model.into()
                }]),
                (None, report) => Err(report.raise(py)),
            },
            Kind::Pool | Kind::Baseline => {
                let (system, _) = py.detach(|| check::system(inner, Context::default()));
                let instances = system.instances.into_iter().map(|model| Self {
                    system: Some(inner.clone()),
                    ..model.into()
                });
                Ok(instances.collect())
            }
        }
    }

    fn own_tree(&self) -> tree::DeviceTree {
        match &self.tree {
            Some(tree) => {
                let mut tree = tree.clone();
                self.model.write_to(&mut tree);
                tree
            }
            None => self.model.to_tree(),
        }
    }

    /// Findings about the instance itself. The kernel picks an id and an address if none is given.
    fn own_report(&self) -> check::Report {
        let (_, all) = check::instance(&self.own_tree());
        let mut report = check::Report::default();
        let left_to_the_kernel = |finding: &&check::Finding| {
            finding.rule == Rule::IdMissing
                || finding.rule == Rule::InstanceMemoryMissing
                    && finding.property.as_deref() == Some("memory-base")
                    && self.model.memory_bytes > 0
        };
        let findings = all.findings().iter().filter(|f| !left_to_the_kernel(f));
        take_over(findings, &mut report);
        report
    }
}

/// Reports why this instance cannot be created in this state. It replaces an existing instance with
/// its name.
fn judge(model: &model::Instance, state: &overlay::State, report: &mut check::Report) {
    let mut before = state.clone();
    if before.system.instance(&model.name).is_some() {
        before.status.remove(&model.name);
        let remove = overlay::Operation::Remove(model.name.clone());
        let remove = overlay::Overlay::new([(overlay::Target::Instances, vec![remove])]);
        match before.apply(&remove) {
            Ok(without) => before = without,
            Err(found) => return take_over(found.findings(), report),
        }
    }
    let mut after = before.system.clone();
    after.instances.push(model.clone());
    match before.overlay_to(&after) {
        Err(overlay::NoChange::Refused(found)) => take_over(found.findings(), report),
        Err(overlay::NoChange::Device(name)) => {
            let path = tree::NodePath::from("/resources");
            let problem = format!("{name:?} is not a device of the pool");
            let advice = "name one that it has";
            let finding = check::Finding::new(Rule::DeviceUnknown, path, problem, advice);
            report.push(finding.of("device-names"));
        }
        // No other change prevents the creation of an instance.
        Ok(_) | Err(_) => {}
    }
}

fn take_over<'f>(
    findings: impl IntoIterator<Item = &'f check::Finding>,
    report: &mut check::Report,
) {
    for finding in findings {
        report.push(finding.clone());
    }
}

#[pymethods]
impl Instance {
    /// A planned instance: CPUs by physical ids, devices by their names in the pool. Without an id the
    /// kernel picks one.
    #[new]
    #[pyo3(
        signature = (name, *, cpus = List::default(), memory_bytes = One(0), id = None, devices = List::default(), numa_nodes = List::default()),
        text_signature = "(name, *, cpus=(), memory_bytes=0, id=None, devices=(), numa_nodes=())"
    )]
    fn new(
        name: String,
        cpus: List<u64>,
        memory_bytes: One<u64>,
        id: Option<One<u32>>,
        devices: List<String>,
        numa_nodes: List<u32>,
    ) -> Self {
        let model = model::Instance {
            name,
            id: id.map(|id| id.0),
            cpus: cpus.0,
            memory_bytes: memory_bytes.0,
            devices: devices.0,
            numa_nodes: numa_nodes.0,
            ..model::Instance::default()
        };
        model.into()
    }

    /// The instance in a tree: the tree of one instance, or a pool or baseline with instances. `name`
    /// selects one of several.
    ///
    /// Raises KeyError if the instance does not exist, ValueError if there are several and no name.
    #[staticmethod]
    #[pyo3(signature = (tree, name = None))]
    fn from_device_tree(
        py: Python<'_>,
        tree: PyRef<'_, DeviceTree>,
        name: Option<&str>,
    ) -> PyResult<Self> {
        let mut all = Self::all_of(py, &tree)?;
        if let Some(name) = name {
            all.retain(|instance| instance.model.name == name);
        }
        let names: Vec<&str> = all.iter().map(|i| i.model.name.as_str()).collect();
        if all.len() > 1 {
            let message = format!("the tree has several instances, name one: {names:?}");
            return Err(PyValueError::new_err(message));
        }
        let missing = || match name {
            Some(name) => PyKeyError::new_err(format!("the tree has no instance {name:?}")),
            None => PyKeyError::new_err("the tree has no instance"),
        };
        all.pop().ok_or_else(missing)
    }

    /// The instance that was saved under this name; otherwise the one in the kernel.
    ///
    /// Raises InstanceNotFoundError if neither exists, RecordError if it cannot be read.
    #[staticmethod]
    #[pyo3(signature = (name, directory = PathBuf::from(DIRECTORY)), text_signature = "(name, directory='/var/lib/kerf/instances')")]
    fn load(py: Python<'_>, name: &str, directory: PathBuf) -> PyResult<Self> {
        let records = Records::in_directory(&directory);
        let saved = py.detach(|| records.load_definition(name)).or_raise(py)?;
        if let Some(tree) = saved {
            let tree = DeviceTree::from(tree);
            return Self::all_of(py, &tree)?
                .into_iter()
                .find(|instance| instance.model.name == name)
                .ok_or_else(|| {
                    let path = records.definition_path(name).unwrap_or(directory);
                    let message = format!("{} defines no instance {name:?}", path.display());
                    exception(py, "InstanceNotFoundError", (message,))
                });
        }
        let kernel = kernel::Kernel::default();
        match py.detach(|| kernel.instance(name)) {
            Ok(model) => Ok(model.into()),
            Err(_) => {
                let message = format!(
                    "no instance {name:?} is saved in {}, and the kernel has none",
                    directory.display()
                );
                Err(exception(py, "InstanceNotFoundError", (message,)))
            }
        }
    }

    /// Saves the instance's tree as NAME.dts, next to kerf's record of the instance, and returns the
    /// path. Other contents of the original tree are kept.
    ///
    /// Raises RecordError if it cannot be written.
    #[pyo3(signature = (directory = PathBuf::from(DIRECTORY)), text_signature = "($self, directory='/var/lib/kerf/instances')")]
    fn save(&self, py: Python<'_>, directory: PathBuf) -> PyResult<PathBuf> {
        let records = Records::in_directory(directory);
        let (name, tree) = (&self.model.name, self.own_tree());
        py.detach(|| records.save_definition(name, &tree))
            .or_raise(py)
    }

    /// Checks the instance itself, and whether it can be created from a pool, next to the other
    /// instances. The pool is `state`; otherwise the pool in the instance's original tree; otherwise the
    /// kernel's pool, if it exists. Returns the report, which may contain warnings.
    ///
    /// Raises ValidationError if something is refused.
    #[pyo3(signature = (state = None))]
    fn validate_resources(
        &self,
        py: Python<'_>,
        state: Option<Bound<'_, State>>,
    ) -> PyResult<Report> {
        let state = state.map(|state| state.get().0.clone());
        let report = py.detach(|| {
            let mut report = self.own_report();
            let state = match (state, &self.system) {
                (Some(state), _) => Some(state),
                (None, Some(tree)) => {
                    let (system, found) = check::system(tree, Context::default());
                    let path = format!("/instances/{}", self.model.name);
                    let own = |f: &&check::Finding| {
                        let rest = f.path.as_str().strip_prefix(&path);
                        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                    };
                    take_over(found.findings().iter().filter(own), &mut report);
                    Some(overlay::State::new(system))
                }
                (None, None) => kernel::Kernel::default().state(None).ok(),
            };
            if let Some(state) = state {
                judge(&self.model, &state, &mut report);
            }
            report
        });
        match report.is_valid() {
            true => Ok(report.into()),
            false => Err(report.raise(py)),
        }
    }

    /// The instance's own tree.
    fn to_device_tree(&self) -> DeviceTree {
        self.own_tree().into()
    }

    /// Asks kmorphd to start the instance, and waits until it is healthy; then returns its status, in the format of the
    /// control API. The numbers of CPUs and bytes are the instance's.
    ///
    /// `workload` is a program and its arguments; `publish` lists its ports, as (host address, host port, port).
    /// kmorphd reads `env_file`, with one NAME=VALUE per line, at each start and stores none of it. Without `timeout`,
    /// in seconds, the call waits until the instance is healthy or has failed. `socket` is kmorphd's socket (default:
    /// KMORPH_SOCKET, or the socket in its configuration).
    ///
    /// Raises UnreachableError if kmorphd cannot be reached, DaemonError if it refuses or the instance fails,
    /// SilentError if it takes longer than `timeout`; kmorphd continues in that case.
    #[pyo3(
        signature = (kernel, *, cmdline = String::new(), initramfs = None, workload = Vec::new(), env = None, env_file = None, publish = Vec::new(), monitor = true, heartbeat_timeout = None, timeout = None, socket = None),
        text_signature = "($self, kernel, *, cmdline='', initramfs=None, workload=(), env=None, env_file=None, publish=(), monitor=True, heartbeat_timeout=None, timeout=None, socket=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "they have names in Python")]
    fn spawn<'py>(
        &self,
        py: Python<'py>,
        kernel: PathBuf,
        cmdline: String,
        initramfs: Option<PathBuf>,
        workload: Vec<String>,
        env: Option<Bound<'py, PyDict>>,
        env_file: Option<PathBuf>,
        publish: Vec<(String, u16, u16)>,
        monitor: bool,
        heartbeat_timeout: Option<f64>,
        timeout: Option<f64>,
        socket: Option<PathBuf>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let too_many = |_| PyValueError::new_err("kmorphd gives an instance at most 65535 CPUs");
        let cpus = u16::try_from(self.model.cpus.len()).map_err(too_many)?;
        let spawn = Spawn {
            name: self.model.name.clone(),
            kernel,
            cmdline,
            initramfs,
            cpus: cpus.max(1),
            memory_bytes: Some(self.model.memory_bytes).filter(|bytes| *bytes > 0),
            workload,
            env: env
                .map(|env| env.extract())
                .transpose()?
                .unwrap_or_default(),
            env_file,
            publish,
            monitor,
            heartbeat_timeout,
        };
        Daemon::at(socket).start(py, spawn, timeout)
    }

    /// Has kmorphd watch the running instance with this heartbeat timeout, in seconds (0.1 to 3600;
    /// default: unchanged), and follows its events from now on.
    ///
    /// Raises UnreachableError if kmorphd cannot be reached, DaemonError if it refuses.
    #[pyo3(signature = (heartbeat_timeout = None, *, socket = None))]
    fn monitor(
        &self,
        py: Python<'_>,
        heartbeat_timeout: Option<f64>,
        socket: Option<PathBuf>,
    ) -> PyResult<Monitor> {
        Daemon::at(socket).monitor(py, self.model.name.clone(), heartbeat_timeout)
    }

    /// The name.
    #[getter]
    fn name(&self) -> &str {
        &self.model.name
    }

    /// The id; None if the kernel is to pick one.
    #[getter]
    fn id(&self) -> Option<u32> {
        self.model.id
    }

    #[setter]
    fn set_id(&mut self, id: Option<One<u32>>) {
        self.model.id = id.map(|id| id.0);
    }

    /// Physical ids of its CPUs; the first one boots.
    #[getter]
    fn cpus<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.model.cpus)
    }

    #[setter]
    fn set_cpus(&mut self, cpus: List<u64>) {
        self.model.cpus = cpus.0;
    }

    /// Total size of its memory, in bytes.
    #[getter]
    fn memory_bytes(&self) -> u64 {
        self.model.memory_bytes
    }

    #[setter]
    fn set_memory_bytes(&mut self, bytes: One<u64>) {
        self.model.memory_bytes = bytes.0;
    }

    /// Physical address of its first memory; None if the kernel has not placed it.
    #[getter]
    fn memory_base(&self) -> Option<u64> {
        self.model.memory_base
    }

    /// Its devices, as the tree names them.
    #[getter]
    fn devices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.model.devices)
    }

    #[setter]
    fn set_devices(&mut self, devices: List<String>) {
        self.model.devices = devices.0;
    }

    /// Its preferred NUMA nodes.
    #[getter]
    fn numa_nodes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.model.numa_nodes)
    }

    #[setter]
    fn set_numa_nodes(&mut self, nodes: List<u32>) {
        self.model.numa_nodes = nodes.0;
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.model == other.model
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        reduce(py, "Instance", self)
    }

    fn __repr__(&self) -> String {
        let model = &self.model;
        format!(
            "<Instance {}: CPUs {:?}, {} bytes>",
            model.name, model.cpus, model.memory_bytes
        )
    }
}
