use std::collections::BTreeSet;
use std::os::fd::IntoRawFd as _;
use std::path::PathBuf;
use std::time::Duration;

use libkerf::check::Context;
use libkerf::kernel::{self, CONSOLE, Files, KERF_LOCK, Parked, ROOT, SystemCalls};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::convert::to_python;
use crate::errors::OrRaise;
use crate::instance::Instance;
use crate::machine::Machine;
use crate::overlay::Overlay;
use crate::records::Records;
use crate::state::{State, parse_status};
use crate::tree::DeviceTree;

/// Default time to wait for other changes, or for a status, in seconds.
const PATIENCE_S: f64 = 10.0;

/// A number of seconds as a duration.
pub(crate) fn seconds(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| PyValueError::new_err(format!("{seconds} is not a valid number of seconds")))
}

/// An applied overlay.
#[pyclass(frozen, module = "libkerf")]
pub(crate) struct Applied {
    /// The kernel's number of the transaction; of several, the last one.
    #[pyo3(get)]
    transaction: u64,
    earlier: Vec<u64>,
    /// Pool and instances afterwards, read back.
    #[pyo3(get)]
    state: State,
}

#[pymethods]
impl Applied {
    /// The numbers of the earlier transactions.
    #[getter]
    fn earlier<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.earlier)
    }

    fn __repr__(&self) -> String {
        format!("<Applied: transaction {}>", self.transaction)
    }
}

/// The kernel's files, /sys/fs/multikernel, and the calls that load, boot and halt.
#[pyclass(frozen, module = "libkerf")]
pub(crate) struct Kernel(pub(crate) kernel::Kernel);

#[pymethods]
impl Kernel {
    /// The files below `root`, and the lock for changes; a change waits up to `patience` seconds
    /// for others that are under way.
    #[new]
    #[pyo3(
        signature = (root = PathBuf::from(ROOT), *, lock = PathBuf::from(KERF_LOCK), patience = PATIENCE_S),
        text_signature = "(root='/sys/fs/multikernel', *, lock='/var/run/kerf.lock', patience=10.0)"
    )]
    fn new(root: PathBuf, lock: PathBuf, patience: f64) -> PyResult<Self> {
        let kernel = kernel::Kernel::at(root, lock);
        Ok(Self(kernel.with_patience(seconds(patience)?)))
    }

    /// The pool's current tree.
    ///
    /// Raises KernelError if it cannot be read, NoPoolError if there is no pool.
    fn pool(&self, py: Python<'_>) -> PyResult<DeviceTree> {
        Ok(py.detach(|| self.0.pool()).or_raise(py)?.into())
    }

    /// The names of all instances, sorted.
    ///
    /// Raises KernelError if they cannot be read.
    fn instance_names(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        py.detach(|| self.0.instance_names()).or_raise(py)
    }

    /// The resources of one instance.
    ///
    /// Raises KernelError if it cannot be read.
    fn instance(&self, py: Python<'_>, name: &str) -> PyResult<Instance> {
        let instance = py.detach(|| self.0.instance(name)).or_raise(py)?;
        Ok(instance.into())
    }

    /// The status of one instance: "empty", "ready", "loaded", "active" or "failed".
    ///
    /// Raises KernelError if it cannot be read.
    fn status(&self, py: Python<'_>, name: &str) -> PyResult<&'static str> {
        let status = py.detach(|| self.0.status(name)).or_raise(py)?;
        Ok(status.as_str())
    }

    /// Waits until an instance has this status.
    ///
    /// Raises LateError if it does not within `timeout` seconds.
    #[pyo3(signature = (name, status, timeout = PATIENCE_S))]
    fn wait_for(&self, py: Python<'_>, name: &str, status: &str, timeout: f64) -> PyResult<()> {
        let (status, timeout) = (parse_status(status)?, seconds(timeout)?);
        py.detach(|| self.0.wait_for(name, status, timeout))
            .or_raise(py)
    }

    /// Pool, instances and their status. The location of their memory is known only if `machine` is given.
    ///
    /// Raises KernelError if something cannot be read, ValidationError if it is inconsistent.
    #[pyo3(signature = (machine = None))]
    fn state(&self, py: Python<'_>, machine: Option<Bound<'_, Machine>>) -> PyResult<State> {
        let machine = machine.as_ref().map(|machine| &machine.get().0);
        let state = py.detach(|| self.0.state(machine)).or_raise(py)?;
        Ok(State(state))
    }

    /// Writes a baseline, which creates the pool, once. Checks it first, and reads the pool back.
    ///
    /// Raises ValidationError if it violates rules, KernelError if the kernel refuses it.
    #[pyo3(signature = (baseline, machine = None))]
    fn write_baseline(
        &self,
        py: Python<'_>,
        baseline: PyRef<'_, DeviceTree>,
        machine: Option<Bound<'_, Machine>>,
    ) -> PyResult<State> {
        let machine = machine.as_ref().map(|machine| &machine.get().0);
        let tree = &baseline.inner;
        let system = py.detach(|| self.0.write_baseline(tree, Context { machine }));
        Ok(State(libkerf::overlay::State::new(system.or_raise(py)?)))
    }

    /// Applies an overlay: computes its effect, writes it, rolls it back if an operation failed, and
    /// reads the result back. An overlay of more than 4096 bytes is applied in several transactions.
    ///
    /// Raises ValidationError if it violates rules, LockError if another process holds the lock,
    /// ApplyError if the kernel refuses it or the result differs.
    #[pyo3(signature = (overlay, machine = None))]
    fn apply(
        &self,
        py: Python<'_>,
        overlay: PyRef<'_, Overlay>,
        machine: Option<Bound<'_, Machine>>,
    ) -> PyResult<Applied> {
        let machine = machine.as_ref().map(|machine| &machine.get().0);
        let overlay = &overlay.0;
        let applied = py.detach(|| self.0.apply(overlay, machine)).or_raise(py)?;
        Ok(Applied {
            transaction: applied.transaction,
            earlier: applied.earlier,
            state: State(applied.state),
        })
    }

    /// The numbers of all existing transactions.
    ///
    /// Raises KernelError if they cannot be read.
    fn transactions(&self, py: Python<'_>) -> PyResult<BTreeSet<u64>> {
        py.detach(|| self.0.transactions()).or_raise(py)
    }

    /// Undoes a transaction. The kernel cannot undo the removal of an instance, nor the addition of memory to the pool.
    ///
    /// Raises KernelError if it is not undone.
    fn rollback(&self, py: Python<'_>, transaction: u64) -> PyResult<()> {
        py.detach(|| self.0.rollback(transaction)).or_raise(py)
    }

    /// Loads a kernel and records its origin, as `kerf load` does; returns the record. A bzImage is
    /// unpacked first.
    ///
    /// Raises BootError if it is not loaded, LoadError if a file cannot be read or it is not recorded.
    #[pyo3(signature = (name, kernel, *, initrd = None, cmdline = String::new(), records = None), text_signature = "($self, name, kernel, *, initrd=None, cmdline='', records=None)")]
    fn load<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        cmdline: String,
        records: Option<Bound<'py, Records>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let files = Files {
            kernel,
            initrd,
            cmdline,
        };
        let records = records_of(records);
        let load = || self.0.load_files(&SystemCalls, name, &files, &records);
        let record = py.detach(load).or_raise(py)?;
        to_python(py, &record)
    }

    /// Unloads an instance's kernel and removes its record.
    ///
    /// Raises BootError if it is not unloaded, LoadError if the record stays.
    #[pyo3(signature = (name, *, records = None))]
    fn unload(
        &self,
        py: Python<'_>,
        name: &str,
        records: Option<Bound<'_, Records>>,
    ) -> PyResult<()> {
        let records = records_of(records);
        py.detach(|| self.0.unload_recorded(&SystemCalls, name, &records))
            .or_raise(py)
    }

    /// Boots the loaded kernel. An active instance does not necessarily run.
    ///
    /// Raises BootError if it is not booted.
    fn boot(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        py.detach(|| self.0.boot(&SystemCalls, name)).or_raise(py)
    }

    /// Asks an instance's kernel to halt, and waits up to 30 s for it.
    ///
    /// Raises BootError if it has not halted.
    fn halt(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        py.detach(|| self.0.halt(&SystemCalls, name)).or_raise(py)
    }

    /// Stops an instance's CPUs, whatever its kernel is doing. Returns true if the kernel has confirmed
    /// their stop; otherwise memory that they could still write to must not be reused.
    ///
    /// Raises BootError if they were not stopped.
    fn halt_by_force(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        let parked = py.detach(|| self.0.halt_by_force(&SystemCalls, name));
        Ok(parked.or_raise(py)? == Parked::Confirmed)
    }

    /// Opens an instance's console and returns its file descriptor, which the caller must close.
    ///
    /// Raises BootError if the instance or the device does not exist.
    #[pyo3(signature = (name, device = PathBuf::from(CONSOLE)), text_signature = "($self, name, device='/dev/mktty')")]
    fn console(&self, py: Python<'_>, name: &str, device: PathBuf) -> PyResult<i32> {
        let console = py.detach(|| self.0.console(&device, name)).or_raise(py)?;
        Ok(console.into_raw_fd())
    }
}

fn records_of(records: Option<Bound<'_, Records>>) -> libkerf::record::Records {
    records
        .map(|records| records.get().0.clone())
        .unwrap_or_default()
}

/// The lock between kerf and processes with this library, held within a `with` statement.
#[pyclass(module = "libkerf")]
pub(crate) struct Lock {
    path: PathBuf,
    patience: Duration,
    held: Option<kernel::Lock>,
}

#[pymethods]
impl Lock {
    /// The lock at `path`, with a maximum wait of `patience` seconds.
    #[new]
    #[pyo3(signature = (path = PathBuf::from(KERF_LOCK), patience = PATIENCE_S), text_signature = "(path='/var/run/kerf.lock', patience=10.0)")]
    fn new(path: PathBuf, patience: f64) -> PyResult<Self> {
        Ok(Self {
            path,
            patience: seconds(patience)?,
            held: None,
        })
    }

    /// Whether this object holds the lock.
    #[getter]
    fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Acquires the lock.
    ///
    /// Raises LockError if another process holds it for too long, RuntimeError if this object holds it already.
    fn acquire(slf: &Bound<'_, Self>) -> PyResult<()> {
        let py = slf.py();
        let (path, patience) = {
            let lock = slf.borrow();
            if lock.held.is_some() {
                return Err(PyRuntimeError::new_err("this lock is held already"));
            }
            (lock.path.clone(), lock.patience)
        };
        // Not borrowed during the wait: other threads may ask whether the lock is held.
        let taken = py.detach(|| kernel::Lock::take(&path, patience));
        slf.borrow_mut().held = Some(taken.or_raise(py)?);
        Ok(())
    }

    /// Releases the lock; does nothing if it is not held.
    fn release(&mut self) {
        self.held = None;
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        Self::acquire(&slf)?;
        Ok(slf)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&mut self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.release();
    }
}
