use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kmorph_control_api::address::{path, query};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use serde::Deserialize;

use crate::control::{ControlError, Events, Line, SLICE};
use crate::convert::loads;
use crate::daemon::Daemon;
use crate::errors::{OrRaise, Raise};
use crate::kernel::seconds;

/// Follows the events of one instance. An iterator over events: it waits for the next one, and ends
/// when kmorphd ends or when it is closed. Each event is a dict, in the format of the control API.
#[pyclass(frozen, module = "libkerf")]
pub(crate) struct Monitor {
    daemon: Daemon,
    name: String,
    events: Mutex<Events>,
    /// The same connection, to close it while another thread waits for an event.
    handle: UnixStream,
    closed: AtomicBool,
}

impl Monitor {
    /// Follows an instance from now on.
    pub(crate) fn open(py: Python<'_>, daemon: Daemon, name: String) -> PyResult<Self> {
        let path = path(&["events"]) + &query(&[("instance", Some(name.clone()))]);
        let events = py.detach(|| daemon.control.events(&path)).or_raise(py)?;
        let handle = events.handle()?;
        Ok(Self {
            daemon,
            name,
            events: Mutex::new(events),
            handle,
            closed: AtomicBool::new(false),
        })
    }

    /// The text of the next event. Without a limit, only an event, the end or a signal ends the wait.
    fn wait(&self, py: Python<'_>, limit: Option<Duration>) -> PyResult<Line> {
        let start = Instant::now();
        loop {
            let left = limit.map(|limit| limit.saturating_sub(start.elapsed()));
            let slice = left.unwrap_or(SLICE).min(SLICE);
            let next = || match self.events.lock() {
                Ok(mut events) => events.next(Instant::now() + slice),
                Err(_) => Ok(Line::End),
            };
            let line = match py.detach(next) {
                Err(_) | Ok(_) if self.closed.load(Ordering::Acquire) => Line::End,
                line => line.or_raise(py)?,
            };
            py.check_signals()?;
            match line {
                Line::NotYet if left.is_none_or(|left| left > slice) => {}
                line => return Ok(line),
            }
        }
    }
}

#[pymethods]
impl Monitor {
    /// The instance.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    /// All details of the instance, at this time.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.request(py, "")
    }

    /// The state of its heartbeats, at this time.
    fn heartbeat<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.request(py, "/heartbeat")
    }

    /// Its health, with the figures that its agent reports.
    fn health<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.request(py, "/health")
    }

    /// The next event; None if none arrives within `timeout` seconds, or after the end.
    ///
    /// Raises UnreachableError if the connection breaks.
    #[pyo3(signature = (timeout = None))]
    fn next_event<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.wait(py, timeout.map(seconds).transpose()?)? {
            Line::Text(event) => loads(py, &event).map(Some),
            Line::NotYet | Line::End => Ok(None),
        }
    }

    /// Waits until the instance is in this state: "running", "unresponsive", "failed", … Then returns all
    /// details of it. Events during the wait are not returned again.
    ///
    /// Raises SilentError if it is not within `timeout` seconds, DaemonError if the instance does not
    /// exist.
    #[pyo3(signature = (state, timeout = None))]
    fn wait_for<'py>(
        &self,
        py: Python<'py>,
        state: &str,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        #[derive(Deserialize)]
        struct Status {
            state: String,
        }
        let limit = timeout.map(seconds).transpose()?;
        let start = Instant::now();
        let path = path(&["instances", &self.name]);
        let control = &self.daemon.control;
        loop {
            let answer = py
                .detach(|| control.request("GET", &path, None, Duration::ZERO))
                .or_raise(py)?;
            let status: Result<Status, _> = serde_json::from_str(&answer);
            let status = status
                .map_err(|error| control.not_understood(error.to_string()))
                .or_raise(py)?;
            if status.state == state {
                return loads(py, &answer);
            }
            let left = limit.map(|limit| limit.saturating_sub(start.elapsed()));
            if let (Some(limit), Some(Duration::ZERO)) = (limit, left) {
                let what = format!("have {} {state}; it is {}", self.name, status.state);
                return Err(control.silent(&what, limit).raise(py));
            }
            if let Line::End = self.wait(py, left)? {
                if self.closed.load(Ordering::Acquire) {
                    return Err(PyRuntimeError::new_err("this monitor is closed"));
                }
                let error = ControlError::Broken {
                    socket: control.socket().to_owned(),
                    why: "the events ended".to_owned(),
                };
                return Err(error.raise(py));
            }
        }
    }

    /// Closes the monitor. A thread that waits for an event sees the end.
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // The call fails if the daemon has ended the stream already.
        let _ = self.handle.shutdown(Shutdown::Both);
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.close();
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.next_event(py, None)
    }

    fn __repr__(&self) -> String {
        format!("<Monitor of {}>", self.name)
    }
}

impl Monitor {
    fn request<'py>(&self, py: Python<'py>, what: &str) -> PyResult<Bound<'py, PyAny>> {
        let path = path(&["instances", &self.name]) + what;
        let control = &self.daemon.control;
        let answer = py
            .detach(|| control.request("GET", &path, None, Duration::ZERO))
            .or_raise(py)?;
        loads(py, &answer)
    }
}
