use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kmorph_control_api::address::path;
use kmorph_control_api::{
    Operation, OperationState, PolicyPatch, PublishRequest, SpawnRequest, WorkloadRequest,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde::Serialize;

use crate::control::{Control, ControlError};
use crate::convert::{dumps, loads};
use crate::errors::{OrRaise, Raise};
use crate::kernel::seconds;
use crate::monitor::Monitor;

/// Maximum time for which the daemon holds back an answer. Signals are handled between two requests.
const HOLD: Duration = Duration::from_secs(10);

/// A request to start an instance.
pub(crate) struct Spawn {
    pub(crate) name: String,
    pub(crate) kernel: PathBuf,
    pub(crate) cmdline: String,
    pub(crate) initramfs: Option<PathBuf>,
    pub(crate) cpus: u16,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) workload: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) env_file: Option<PathBuf>,
    pub(crate) publish: Vec<(String, u16, u16)>,
    pub(crate) monitor: bool,
    pub(crate) heartbeat_timeout: Option<f64>,
}

/// An absolute path: the daemon has another working directory.
fn absolute(path: &Path) -> PyResult<String> {
    let absolute = std::path::absolute(path)?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|path| PyValueError::new_err(format!("{} is not UTF-8", path.display())))
}

impl Spawn {
    fn request(self) -> PyResult<SpawnRequest> {
        let mut words = self.workload.into_iter();
        let workload = match words.next() {
            // The daemon resolves a bare name.
            Some(program) => Some(WorkloadRequest {
                program: match program.contains('/') {
                    true => absolute(Path::new(&program))?,
                    false => program,
                },
                args: words.collect(),
                env: self.env,
                env_file: self.env_file.as_deref().map(absolute).transpose()?,
            }),
            None => None,
        };
        let publish = self.publish.into_iter();
        Ok(SpawnRequest {
            name: self.name,
            kernel: absolute(&self.kernel)?,
            kernel_cmdline: self.cmdline,
            initramfs: self.initramfs.as_deref().map(absolute).transpose()?,
            cpus: self.cpus,
            memory_bytes: self.memory_bytes,
            workload,
            publish: publish
                .map(|(address, host_port, port)| PublishRequest {
                    address,
                    host_port,
                    port,
                })
                .collect(),
            monitor: self.monitor,
            heartbeat_timeout_s: self.heartbeat_timeout,
        })
    }
}

/// kmorphd, over its control socket. Answers have the format of the control API, as dicts and lists.
#[pyclass(frozen, module = "libkerf")]
#[derive(Clone)]
pub(crate) struct Daemon {
    pub(crate) control: Control,
}

impl Daemon {
    /// The daemon at this socket, or at its default location.
    pub(crate) fn at(socket: Option<PathBuf>) -> Self {
        Self {
            control: Control::find(socket),
        }
    }

    /// Sends a request. Returns the JSON text of its answer.
    fn ask(
        &self,
        py: Python<'_>,
        method: &str,
        path: &str,
        body: Option<&str>,
    ) -> PyResult<String> {
        py.detach(|| self.control.request(method, path, body, Duration::ZERO))
            .or_raise(py)
    }

    fn get<'py>(&self, py: Python<'py>, segments: &[&str]) -> PyResult<Bound<'py, PyAny>> {
        loads(py, &self.ask(py, "GET", &path(segments), None)?)
    }

    /// Starts an instance, and returns its status once it is healthy.
    pub(crate) fn start<'py>(
        &self,
        py: Python<'py>,
        spawn: Spawn,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let name = spawn.name.clone();
        let body = encode(&spawn.request()?)?;
        self.operate(py, "POST", &path(&["instances"]), Some(&body), timeout)?;
        self.get(py, &["instances", &name])
    }

    /// Begins an operation and waits until it has succeeded.
    fn operate(
        &self,
        py: Python<'_>,
        method: &str,
        path: &str,
        body: Option<&str>,
        timeout: Option<f64>,
    ) -> PyResult<Operation> {
        let limit = timeout.map(seconds).transpose()?;
        let answer = self.ask(py, method, path, body)?;
        let begun = self.understood(&answer).or_raise(py)?;
        self.follow(py, begun, limit)
    }

    fn understood(&self, answer: &str) -> Result<Operation, ControlError> {
        serde_json::from_str(answer).map_err(|error| self.control.not_understood(error.to_string()))
    }

    /// Waits until an operation is over; Python may interrupt the wait.
    fn follow(
        &self,
        py: Python<'_>,
        begun: Operation,
        limit: Option<Duration>,
    ) -> PyResult<Operation> {
        let start = Instant::now();
        let mut now = begun;
        while !now.is_over() {
            let left = limit.map(|limit| limit.saturating_sub(start.elapsed()));
            if let (Some(limit), Some(Duration::ZERO)) = (limit, left) {
                let what = format!("finish operation {}, which goes on,", now.id);
                return Err(self.control.silent(&what, limit).raise(py));
            }
            let wait = left.unwrap_or(HOLD).min(HOLD);
            let query = format!("?wait_ms={}&seen={}", wait.as_millis().max(1), now.revision);
            let path = path(&["operations", &now.id]) + &query;
            let answer = py
                .detach(|| self.control.request("GET", &path, None, wait))
                .or_raise(py)?;
            py.check_signals()?;
            now = self.understood(&answer).or_raise(py)?;
        }
        match (now.state, now.error.clone()) {
            (OperationState::Succeeded, _) => Ok(now),
            (_, Some(error)) => Err(ControlError::from(error).raise(py)),
            (state, None) => {
                let error = ControlError::Refused {
                    code: String::new(),
                    message: format!("operation {} ended as {state:?}", now.id).to_lowercase(),
                    next_step: None,
                };
                Err(error.raise(py))
            }
        }
    }

    /// Has an instance watched with this timeout, and follows its events.
    pub(crate) fn monitor(
        &self,
        py: Python<'_>,
        name: String,
        heartbeat_timeout: Option<f64>,
    ) -> PyResult<Monitor> {
        // Open the event stream first, so that no event is missed.
        let monitor = Monitor::open(py, self.clone(), name.clone())?;
        match heartbeat_timeout {
            Some(timeout) => {
                self.set_policy(py, &name, Some(timeout), None, None)?;
            }
            // Report an unknown instance at once.
            None => drop(self.instance(py, &name)?),
        }
        Ok(monitor)
    }
}

fn encode(value: &impl Serialize) -> PyResult<String> {
    serde_json::to_string(value).map_err(|error| PyValueError::new_err(error.to_string()))
}

#[pymethods]
impl Daemon {
    /// The daemon at `socket`. Default: KMORPH_SOCKET, or the socket in its configuration. Each request
    /// opens a new connection.
    #[new]
    #[pyo3(signature = (socket = None))]
    fn new(socket: Option<PathBuf>) -> Self {
        Self::at(socket)
    }

    /// Its socket.
    #[getter]
    fn socket(&self) -> PathBuf {
        self.control.socket().to_owned()
    }

    /// The daemon's status.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.get(py, &["daemon"])
    }

    /// All instances.
    fn instances<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.get(py, &["instances"])
    }

    /// All details of one instance.
    fn instance<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.get(py, &["instances", name])
    }

    /// The state of an instance's heartbeats.
    fn heartbeat<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.get(py, &["instances", name, "heartbeat"])
    }

    /// An instance's health, with the figures that its agent reports.
    fn health<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.get(py, &["instances", name, "health"])
    }

    /// Changes an instance's policy: absent values stay. Returns the new policy.
    ///
    /// Raises DaemonError if it refuses.
    #[pyo3(signature = (name, *, heartbeat_timeout = None, auto_heal = None, morph_timeout = None))]
    fn set_policy<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        heartbeat_timeout: Option<f64>,
        auto_heal: Option<bool>,
        morph_timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let patch = encode(&PolicyPatch {
            heartbeat_timeout_s: heartbeat_timeout,
            auto_heal,
            morph_timeout_s: morph_timeout,
            ..PolicyPatch::default()
        })?;
        let path = path(&["instances", name, "policy"]);
        loads(py, &self.ask(py, "PATCH", &path, Some(&patch))?)
    }

    /// Terminates an instance, and waits until it has ended.
    ///
    /// Raises DaemonError if it refuses, SilentError if it takes longer than `timeout` seconds.
    #[pyo3(signature = (name, *, force = false, timeout = None))]
    fn terminate(
        &self,
        py: Python<'_>,
        name: &str,
        force: bool,
        timeout: Option<f64>,
    ) -> PyResult<()> {
        let path = path(&["instances", name]) + &format!("?force={force}");
        self.operate(py, "DELETE", &path, None, timeout)?;
        Ok(())
    }

    /// Sends any request of the control API: `body` is sent as JSON, and the answer is parsed from JSON.
    ///
    /// Raises UnreachableError, DaemonError or SilentError if it fails.
    #[pyo3(signature = (method, path, body = None))]
    fn request<'py>(
        &self,
        py: Python<'py>,
        method: &str,
        path: &str,
        body: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_plain(method) || !is_plain(path) {
            return Err(PyValueError::new_err(
                "method and path may have no spaces and nothing but ASCII",
            ));
        }
        let body = body.as_ref().map(dumps).transpose()?;
        let answer = self.ask(py, method, path, body.as_deref())?;
        match answer.is_empty() {
            true => Ok(py.None().into_bound(py)),
            false => loads(py, &answer),
        }
    }

    /// Waits until the operation with this id has succeeded.
    ///
    /// Raises DaemonError if it has failed, SilentError if it takes longer than `timeout` seconds.
    #[pyo3(signature = (id, timeout = None))]
    fn wait(&self, py: Python<'_>, id: &str, timeout: Option<f64>) -> PyResult<()> {
        let path = path(&["operations", id]);
        self.operate(py, "GET", &path, None, timeout)?;
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!("<Daemon at {}>", self.control.socket().display())
    }
}
