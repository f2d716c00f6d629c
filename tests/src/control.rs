//! A client of the control API, small enough to show that any language can be one.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kmorph_control_api::{ApiError, InstanceStatus, Operation, OperationState};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::DEADLINE;

/// Where the daemon answers.
#[derive(Clone, Debug)]
pub struct Control {
    socket: PathBuf,
}

/// What it answered.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Reply {
    /// The body, when the request was done.
    pub fn ok<T: DeserializeOwned>(&self) -> T {
        assert!(self.status < 300, "refused: {} {}", self.status, self.body);
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The refusal, when it was not.
    pub fn refusal(&self) -> ApiError {
        assert!(self.status >= 400, "not refused: {}", self.body);
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

impl Control {
    /// A client of the daemon at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    pub(crate) fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// One request; `None` when the daemon cannot be reached or hangs up.
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

    /// One request.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        let body = body.map(Value::to_string);
        self.try_request(method, path, body.as_deref())
            .unwrap_or_else(|| panic!("the daemon does not answer {method} {path}"))
    }

    /// What `path` shows.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        self.request("GET", path, None).ok()
    }

    /// Starts an operation; `None` when the daemon cannot be reached or dies. An instance that a busy machine keeps from
    /// answering for two heartbeat intervals is UNRESPONSIVE and takes no work until its next answer: then this waits
    /// for the answer, and starts the operation.
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

    /// As [`Control::try_begin`], and the daemon takes the request.
    pub fn begin(&self, method: &str, path: &str, body: Option<&Value>) -> Operation {
        self.try_begin(method, path, body)
            .unwrap_or_else(|| panic!("the daemon does not answer {method} {path}"))
            .ok()
    }

    /// Starts an operation as [`Control::begin`] does, and waits for its end.
    pub fn operate(&self, method: &str, path: &str, body: Option<&Value>) -> Operation {
        let begun = self.begin(method, path, body);
        self.finished(&begun.id)
    }

    /// The operation `id`, when it has ended.
    pub fn finished(&self, id: &str) -> Operation {
        self.wait(&format!("{id} to end"), || {
            let now: Operation = self.get(&format!("/v1/operations/{id}"));
            (now.state != OperationState::Running).then_some(now)
        })
    }

    /// As [`Control::operate`], and it must succeed.
    pub fn succeed(&self, method: &str, path: &str, body: Option<&Value>) -> Operation {
        let ended = self.operate(method, path, body);
        assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
        ended
    }

    /// The instance `name`.
    pub fn instance(&self, name: &str) -> InstanceStatus {
        self.get(&format!("/v1/instances/{name}"))
    }

    /// Changes the policy of `name`.
    pub fn set_policy(&self, name: &str, patch: &Value) {
        let path = format!("/v1/instances/{name}/policy");
        let _: Value = self.request("PATCH", &path, Some(patch)).ok();
    }

    /// A whole morph of `name` to `kernel`. By force: how long it takes on a busy machine is for benchmarks.
    pub fn morph(&self, name: &str, kernel: &std::path::Path) -> Operation {
        let body =
            json!({ "kernel": kernel, "auto_validate": true, "auto_commit": true, "force": true });
        self.operate("POST", &format!("/v1/instances/{name}/morph"), Some(&body))
    }

    /// Looks until there is an answer. A panic after [`DEADLINE`].
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
