//! A daemon that says what a test tells it to say, and the program that asks it.

#![allow(clippy::unwrap_used, clippy::panic)]
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Request {
    /// Method and path with query: `GET /v1/instances`.
    pub line: String,
    /// The body; null when there was none.
    pub body: Value,
}

/// What the daemon does with it.
pub enum Reply {
    /// A whole answer.
    Json(u16, Value),
    /// These bytes, then the connection ends.
    Raw(Vec<u8>),
    /// Nothing until the other side gives up.
    Silence,
}

impl Reply {
    pub fn ok(value: Value) -> Self {
        Self::Json(200, value)
    }

    pub fn refusal(status: u16, code: &str, message: &str) -> Self {
        let hint = "do something else";
        Self::Json(
            status,
            json!({ "code": code, "message": message, "next_step": hint }),
        )
    }
}

/// A fake daemon on a socket of its own.
pub struct FakeDaemon {
    pub dir: tempfile::TempDir,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl FakeDaemon {
    /// Serves `answer` until the test ends.
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("kmorphd.sock")).unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (answer, seen) = (Arc::new(answer), requests.clone());
        // Ends with the test's process; the listener has no other end.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answer, seen) = (answer.clone(), seen.clone());
                std::thread::spawn(move || serve(stream, &*answer, &seen));
            }
        });
        Self { dir, requests }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("kmorphd.sock")
    }

    /// The method and path of each request so far.
    pub fn lines(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        requests
            .iter()
            .map(|request| request.line.clone())
            .collect()
    }

    /// The body of the first request whose line starts so.
    pub fn body(&self, line: &str) -> Value {
        let requests = self.requests.lock().unwrap();
        let found = requests
            .iter()
            .find(|request| request.line.starts_with(line));
        found.unwrap_or_else(|| panic!("no {line}")).body.clone()
    }

    /// Runs kmorphctl with these words.
    pub fn ctl(&self, words: &str) -> Ended {
        ctl(
            &self.socket(),
            &words.split_whitespace().collect::<Vec<_>>(),
        )
    }
}

fn serve(stream: UnixStream, answer: &dyn Fn(&Request) -> Reply, seen: &Mutex<Vec<Request>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        head.push(line);
    }
    let length = head.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>().ok())?
    });
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    let request = Request {
        line: head[0].trim_end_matches(" HTTP/1.1").to_owned(),
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    };
    seen.lock().unwrap().push(request.clone());
    let mut stream = stream;
    // The client may be gone already; that is its right.
    let _ = match answer(&request) {
        Reply::Json(status, value) => {
            let body = value.to_string();
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\n\r\n{body}"
            )
        }
        Reply::Raw(bytes) => stream.write_all(&bytes),
        Reply::Silence => {
            let _ = stream.read(&mut [0; 1]);
            Ok(())
        }
    };
}

/// How the program ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout.clone()).unwrap(),
            stderr: String::from_utf8(output.stderr.clone()).unwrap(),
        }
    }

    /// Its standard output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// The program, with nothing of this process's environment that would change what it does.
pub fn command(program: &Path, socket: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_remove("NO_COLOR")
        .env("KMORPH_SOCKET", socket)
        .env("TZ", "UTC")
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .stdin(Stdio::null());
    command
}

pub fn ctl(socket: &Path, words: &[&str]) -> Ended {
    let program = Path::new(env!("CARGO_BIN_EXE_kmorphctl"));
    Ended::of(&command(program, socket).args(words).output().unwrap())
}

/// An operation as the daemon describes it.
pub fn operation(kind: &str, state: &str, revision: u64) -> Value {
    json!({
        "id": "op-7", "kind": kind, "instance": "web", "state": state, "revision": revision,
        "progress": { "step": "starting", "done": 0, "total": 0, "unit": "" },
        "requested_by": 0, "started_at": "2026-01-31T08:00:00.000Z", "ended_at": null,
        "error": null, "result": null,
    })
}

/// An instance's line in `list`.
pub fn summary(name: &str, state: &str) -> Value {
    json!({
        "name": name, "state": state, "generation": 2, "kernel_release": "6.9.0",
        "backend": "embedded", "cpus": [0, 1, 2, 5], "memory_bytes": 268_435_456u64,
        "last_heartbeat_ms": 62_300, "uptime_s": 7_440, "recoveries": 1, "morphs": 3,
        "published": [{ "listen": "127.0.0.1:6379", "port": 6379, "state": "open" }],
    })
}

/// Everything about an instance.
pub fn status(name: &str, state: &str) -> Value {
    let mut status = summary(name, state);
    let more = json!({
        "reason": "no heartbeat for 62 s", "kernel_path": "/boot/vmlinuz-6.9.0",
        "kernel_sha256": "ab".repeat(32), "kernel_cmdline": "quiet", "cid": 3,
        "processes": { "agent": 42 }, "workload": null, "workload_state": "none",
        "policy": { "heartbeat_timeout_s": 60.0, "auto_heal": true, "morph_timeout_s": 60.0 },
        "created_at": "2026-01-31T08:00:00.000Z", "operation": null, "run_dir": "/run/x",
    });
    let more = more.as_object().unwrap().clone();
    status.as_object_mut().unwrap().extend(more);
    status
}

/// What the daemon says of itself.
pub fn daemon(pid: u32) -> Value {
    json!({
        "version": "0.1.0", "pid": pid, "started_at": "2026-01-31T08:00:00.000Z", "uptime_s": 5,
        "backend": "embedded", "backend_detail": "agent", "config_path": null,
        "state_dir": "/s", "run_dir": "/r", "instances": 1, "operations_running": 0,
        "pool": { "cpus": [0, 1], "cpus_free": [1], "cpus_shared": false,
                  "memory_bytes": 1024, "memory_free_bytes": 512 },
        "journal_ok": true, "journal_error": null, "actor_restarts": 0, "self_lag_ms": 0,
        "stopping": false,
    })
}
