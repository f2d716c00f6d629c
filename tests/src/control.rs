//! A client of the control API, small enough to show that any language can be used for a client.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kmorph_control_api::{ApiError, InstanceStatus, Operation, OperationState};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::DEADLINE;

/// A client of the daemon at a socket.
#[derive(Clone, Debug)]
pub struct Control {
    socket: PathBuf,
}

/// The reply of the daemon.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Reply {
    /// Returns the body of a successful request.
    pub fn ok<T: DeserializeOwned>(&self) -> T {
        assert!(self.status < 300, "refused: {} {}", self.status, self.body);
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// Returns the error of a refused request.
    pub fn refusal(&self) -> ApiError {
        assert!(self.status >= 400, "not refused: {}", self.body);
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

impl Control {
    /// Creates a client of the daemon at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    pub(crate) fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// Sends one request; returns `None` if the daemon is unreachable or hangs up.
    pub fn try_request(&self, method: &str, path: &str, body: Option<&str>) -> Option<Reply> {
        let mut stream = UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).ok()?;
        let body = body.unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: kmorph\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(body.as_bytes()).ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok()?;
        let text = String::from_utf8(answer).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        Some(Reply {
            status: head.split(' ').nth(1)?.parse().ok()?,
            body: body.to_owned(),
        })
    }

    /// Sends one request.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        let body = body.map(Value::to_string);
        self.try_request(method, path, body.as_deref())
            .unwrap_or_else(|| panic!("the daemon does not answer {method} {path}"))
    }

    /// Returns the resource at `path`.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        self.request("GET", path, None).ok()
    }

    /// Starts an operation; returns `None` if the daemon is unreachable or dies. On a busy machine, an instance that
    /// misses two heartbeat intervals is UNRESPONSIVE and accepts no operation until its next answer; in that case,
    /// this method waits for the answer and then starts the operation.
    pub fn try_begin(&self, method: &str, path: &str, body: Option<&Value>) -> Option<Reply> {
        let body = body.map(Value::to_string);
        self.wait("the instance to answer", || {
            let Some(reply) = self.try_request(method, path, body.as_deref()) else {
                return Some(None);
            };
            let unresponsive = reply.status == 409 && reply.body.contains("it is unresponsive");
            (!unresponsive).then_some(Some(reply))
        })
    }

    /// Like [`Control::try_begin`], but the daemon must accept the request.
    pub fn begin(&self, method: &str, path: &str, body: Option<&Value>) -> Operation {
        self.try_begin(method, path, body)
            .unwrap_or_else(|| panic!("the daemon does not answer {method} {path}"))
            .ok()
    }

    /// Starts an operation like [`Control::begin`], and waits for its end.
    pub fn operate(&self, method: &str, path: &str, body: Option<&Value>) -> Operation {
        let begun = self.begin(method, path, body);
        self.finished(&begun.id)
    }

    /// Waits for the end of the operation `id`.
    pub fn finished(&self, id: &str) -> Operation {
        self.wait(&format!("{id} to end"), || {
            let now: Operation = self.get(&format!("/v1/operations/{id}"));
            (now.state != OperationState::Running).then_some(now)
        })
    }

    /// Like [`Control::operate`], but the operation must succeed.
    pub fn succeed(&self, method: &str, path: &str, body: Option<&Value>) -> Operation {
        let ended = self.operate(method, path, body);
        assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
        ended
    }

    /// Returns the instance `name`.
    pub fn instance(&self, name: &str) -> InstanceStatus {
        self.get(&format!("/v1/instances/{name}"))
    }

    /// Changes the policy of `name`.
    pub fn set_policy(&self, name: &str, patch: &Value) {
        let path = format!("/v1/instances/{name}/policy");
        let _: Value = self.request("PATCH", &path, Some(patch)).ok();
    }

    /// Runs a whole morph of `name` to `kernel`, by force: its duration on a busy machine is a subject for benchmarks.
    pub fn morph(&self, name: &str, kernel: &std::path::Path) -> Operation {
        let body =
            json!({ "kernel": kernel, "auto_validate": true, "auto_commit": true, "force": true });
        self.operate("POST", &format!("/v1/instances/{name}/morph"), Some(&body))
    }

    /// Calls `look` repeatedly until it returns a value. Panics after [`DEADLINE`].
    pub fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(begun.elapsed() < DEADLINE, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
