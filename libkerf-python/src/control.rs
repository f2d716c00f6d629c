//! Sends requests to kmorphd: HTTP and JSON over its Unix socket, one connection per request. It uses HTTP 1.0, so
//! that an answer ends with its connection and is not chunked.

use std::io::{self, Read, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kmorph_control_api::ApiError;
use kmorph_control_api::paths::{CONFIG_MAX_BYTES, ConfiguredPaths, DefaultPaths, SOCKET_ENV};
use pyo3::prelude::*;
use serde::Deserialize;
use thiserror::Error;

/// Maximum time for an answer that the daemon does not hold back on purpose.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum length of one wait. Python handles signals such as Ctrl-C between two waits: a signal
/// right before a wait does not end it.
pub(crate) const SLICE: Duration = Duration::from_millis(200);
/// Maximum size of an answer, in bytes: 10,000 instances need about 6 MiB.
const ANSWER_MAX_BYTES: usize = 64 << 20;
/// Maximum size of an answer's head, and of a line of an event stream, in bytes.
const LINE_MAX_BYTES: usize = 1 << 20;
/// Number of bytes per read.
const CHUNK_BYTES: usize = 16 << 10;

/// Why a request to the daemon failed.
#[derive(Debug, Error)]
pub(crate) enum ControlError {
    /// No process answers at the socket.
    #[error("no kmorphd answers at {}: {source}; start it with `kmorphctl daemon start`, or name its socket", socket.display())]
    Unreachable { socket: PathBuf, source: io::Error },
    /// The connection broke.
    #[error("kmorphd at {} ended the connection: {why}", socket.display())]
    Broken { socket: PathBuf, why: String },
    /// The request timed out.
    #[error("kmorphd at {} did not {what} within {} s", socket.display(), limit.as_secs_f64())]
    Silent {
        socket: PathBuf,
        what: String,
        limit: Duration,
    },
    /// The answer is not understood.
    #[error("the answer of kmorphd at {} is not understood: {why}", socket.display())]
    NotUnderstood { socket: PathBuf, why: String },
    /// The daemon refused.
    #[error("{message}")]
    Refused {
        /// The code of the control API.
        code: String,
        message: String,
        next_step: Option<String>,
    },
    /// A signal such as Ctrl-C arrived, and its handler raised this exception.
    #[error("{0}")]
    Signal(PyErr),
}

impl From<ApiError> for ControlError {
    fn from(error: ApiError) -> Self {
        let code = serde_json::to_value(error.code).ok();
        ControlError::Refused {
            code: code
                .and_then(|code| code.as_str().map(str::to_owned))
                .unwrap_or_default(),
            message: error.message,
            next_step: error.next_step,
        }
    }
}

/// The location of the daemon.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    socket: PathBuf,
}

impl Control {
    /// The daemon at this socket. Default: the socket in the environment, then in the daemon's configuration, then that
    /// of this user.
    pub(crate) fn find(socket: Option<PathBuf>) -> Self {
        let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let named = socket.or_else(|| var(SOCKET_ENV).map(PathBuf::from));
        let socket = named.unwrap_or_else(|| {
            let defaults = DefaultPaths::of(nix::unistd::geteuid().as_raw(), var);
            configured(&defaults.config).unwrap_or_else(|| defaults.socket())
        });
        Self { socket }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends one request. Returns the JSON text of its answer, which the daemon may hold back for `wait`.
    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&str>,
        wait: Duration,
    ) -> Result<String, ControlError> {
        let limit = ANSWER_TIMEOUT.saturating_add(wait);
        let deadline = Instant::now() + limit;
        let mut stream = self.send(method, path, body)?;
        let mut answer = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match read_some(&mut stream, &mut answer, left.min(SLICE)) {
                Ok(0) => break,
                Ok(_) if answer.len() > ANSWER_MAX_BYTES => {
                    let why = format!("it has more than {ANSWER_MAX_BYTES} bytes");
                    return Err(self.not_understood(why));
                }
                Ok(_) => {}
                Err(error) if is_timeout(&error) && left.is_zero() => {
                    return Err(self.silent("answer", limit));
                }
                Err(error) if is_timeout(&error) || is_interrupted(&error) => {
                    Python::attach(|py| py.check_signals()).map_err(ControlError::Signal)?;
                }
                Err(error) => return Err(self.broken(error.to_string())),
            }
        }
        let (status, body) = self.parse(&answer)?;
        match status {
            200..300 => Ok(body),
            _ => Err(self.refusal(status, &body)),
        }
    }

    /// Opens the stream of events.
    pub(crate) fn events(&self, path: &str) -> Result<Events, ControlError> {
        let mut events = Events {
            control: self.clone(),
            stream: self.send("GET", path, None)?,
            pending: Vec::new(),
        };
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let line = |line: Line| match line {
            Line::Text(text) => Ok(text),
            Line::NotYet => Err(self.silent("answer", ANSWER_TIMEOUT)),
            Line::End => Err(self.broken("before it answered".to_owned())),
        };
        let first = line(events.line(deadline)?)?;
        let status = self.status(&first)?;
        while !line(events.line(deadline)?)?.is_empty() {}
        if status == 200 {
            return Ok(events);
        }
        let mut body = String::new();
        while let Line::Text(text) = events.line(deadline)? {
            body.push_str(&text);
        }
        // A last line without a line end.
        body.push_str(&String::from_utf8_lossy(&events.pending));
        Err(self.refusal(status, &body))
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<&str>,
    ) -> Result<UnixStream, ControlError> {
        let mut stream =
            UnixStream::connect(&self.socket).map_err(|source| ControlError::Unreachable {
                socket: self.socket.clone(),
                source,
            })?;
        let body = body.unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: kmorphd\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let sent = stream
            .set_write_timeout(Some(ANSWER_TIMEOUT))
            .and_then(|()| stream.write_all(request.as_bytes()));
        match sent {
            Ok(()) => Ok(stream),
            Err(error) if is_timeout(&error) => Err(self.silent("read", ANSWER_TIMEOUT)),
            Err(error) => Err(self.broken(error.to_string())),
        }
    }

    fn parse(&self, answer: &[u8]) -> Result<(u16, String), ControlError> {
        let text = std::str::from_utf8(answer)
            .map_err(|_| self.not_understood("it is not text".to_owned()))?;
        if text.is_empty() {
            return Err(self.broken("without an answer".to_owned()));
        }
        let (head, body) = text
            .split_once("\r\n\r\n")
            .ok_or_else(|| self.not_understood("it has no head".to_owned()))?;
        Ok((self.status(head)?, body.to_owned()))
    }

    fn status(&self, head: &str) -> Result<u16, ControlError> {
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
        status.ok_or_else(|| self.not_understood("it is not HTTP".to_owned()))
    }

    /// A refusal. If a newer daemon sends an unknown code, the message is kept.
    fn refusal(&self, status: u16, body: &str) -> ControlError {
        #[derive(Deserialize)]
        struct Said {
            #[serde(default)]
            code: String,
            message: String,
            next_step: Option<String>,
        }
        match serde_json::from_str::<Said>(body) {
            Ok(said) => ControlError::Refused {
                code: said.code,
                message: said.message,
                next_step: said.next_step,
            },
            Err(_) => self.not_understood(format!("it has status {status} and no reason")),
        }
    }

    pub(crate) fn silent(&self, what: &str, limit: Duration) -> ControlError {
        ControlError::Silent {
            socket: self.socket.clone(),
            what: what.to_owned(),
            limit,
        }
    }

    pub(crate) fn not_understood(&self, why: String) -> ControlError {
        ControlError::NotUnderstood {
            socket: self.socket.clone(),
            why,
        }
    }

    fn broken(&self, why: String) -> ControlError {
        ControlError::Broken {
            socket: self.socket.clone(),
            why,
        }
    }
}

/// The result of a read from a stream.
#[derive(Debug)]
pub(crate) enum Line<T = String> {
    /// A line.
    Text(T),
    /// No line within the time.
    NotYet,
    /// The daemon has ended the stream.
    End,
}

/// The stream of events.
#[derive(Debug)]
pub(crate) struct Events {
    control: Control,
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Events {
    /// Waits for the JSON text of the next event, until the deadline.
    pub(crate) fn next(&mut self, deadline: Instant) -> Result<Line, ControlError> {
        loop {
            match self.line(deadline)? {
                Line::Text(line) => {
                    if let Some(event) = line.strip_prefix("data:") {
                        return Ok(Line::Text(event.trim_start().to_owned()));
                    }
                }
                other => return Ok(other),
            }
        }
    }

    /// A handle to end the stream; a thread that waits for an event then sees the end.
    pub(crate) fn handle(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    fn line(&mut self, deadline: Instant) -> Result<Line, ControlError> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                return Ok(Line::Text(line.trim_end_matches(['\r', '\n']).to_owned()));
            }
            if self.pending.len() > LINE_MAX_BYTES {
                let why = format!("a line has more than {LINE_MAX_BYTES} bytes");
                return Err(self.control.not_understood(why));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match read_some(&mut self.stream, &mut self.pending, left) {
                Ok(0) => return Ok(Line::End),
                Ok(_) => {}
                // The waiting thread handles signals between two waits.
                Err(error) if is_timeout(&error) || is_interrupted(&error) => {
                    return Ok(Line::NotYet);
                }
                Err(error) => return Err(self.control.broken(error.to_string())),
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // The call fails if the daemon has ended the stream already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Reads the available data; waits at most `wait` for it.
fn read_some(stream: &mut UnixStream, into: &mut Vec<u8>, wait: Duration) -> io::Result<usize> {
    if wait.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    stream.set_read_timeout(Some(wait))?;
    let mut chunk = [0; CHUNK_BYTES];
    let count = stream.read(&mut chunk)?;
    into.extend_from_slice(&chunk[..count]);
    Ok(count)
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}

fn is_interrupted(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted
}

/// The socket in a configuration file. The daemon itself checks the file.
fn configured(path: &Path) -> Option<PathBuf> {
    // Only read regular files: another file may never end.
    let meta = std::fs::metadata(path).ok()?;
    if !meta.is_file() || meta.len() > CONFIG_MAX_BYTES {
        return None;
    }
    ConfiguredPaths::parse(&std::fs::read_to_string(path).ok()?).socket()
}
