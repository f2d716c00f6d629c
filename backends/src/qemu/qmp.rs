//! QMP, QEMU's control protocol: JSON lines on a Unix socket.
//!
//! ```text
//! QEMU ▸ {"QMP": …}     ◂ {"execute": "qmp_capabilities"}     ▸ {"return": {}}     then commands, events
//! ```
//!
//! A socket serves one client at a time; another one waits in its queue until the first hangs up. So there are two
//! sockets: one for the watcher, which stays connected, and one for commands, each of which opens a new connection.
//! The queue is short (QEMU listens with a backlog of 1): a client that finds it full retries.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Maximum length of a line from QEMU, in bytes.
const LINE_MAX_BYTES: u64 = 256 * 1024;
/// Maximum number of events that arrive while an answer is awaited.
const EVENTS_MAX: usize = 256;
/// Maximum time for QEMU to answer a command.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause before a client that found the socket's queue full retries.
const PLACE_PAUSE: Duration = Duration::from_millis(5);

/// An event from QEMU.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Event {
    pub(super) name: String,
    pub(super) data: Value,
}

/// A connection after its greeting.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Event>,
}

/// A line from QEMU; exactly one of these fields is set.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    data: Option<Value>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Connects to the socket at `path` as soon as its queue has space; the caller sets a timeout.
    pub(super) async fn connect(path: &Path) -> io::Result<Self> {
        let stream = loop {
            match UnixStream::connect(path).await {
                // The queue is full (unix(7): EAGAIN). QEMU empties it later.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(PLACE_PAUSE).await;
                }
                connected => break BufReader::new(connected?),
            }
        };
        let mut qmp = Self {
            stream,
            events: VecDeque::new(),
        };
        if qmp.line().await?.greeting.is_none() {
            return Err(invalid("QEMU sent no greeting".to_owned()));
        }
        qmp.execute("qmp_capabilities", None).await?;
        Ok(qmp)
    }

    /// Executes a command and returns its answer.
    pub(super) async fn execute(
        &mut self,
        command: &str,
        arguments: Option<Value>,
    ) -> io::Result<Value> {
        let mut request = json!({ "execute": command });
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        let mut text = request.to_string();
        text.push('\n');
        self.stream.get_mut().write_all(text.as_bytes()).await?;
        loop {
            let line = self.line().await?;
            if let Some(refusal) = line.error {
                return Err(io::Error::other(format!("{command}: {}", refusal.desc)));
            }
            if let Some(answer) = line.answer {
                return Ok(answer);
            }
            self.keep(line)?;
        }
    }

    /// Returns the next event. The future is cancel-safe only between lines, so a caller that
    /// selects over it must not call it again after a cancellation.
    pub(super) async fn event(&mut self) -> io::Result<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let line = self.line().await?;
            self.keep(line)?;
        }
    }

    /// Returns QEMU's status of the guest: `running`, `paused`, `guest-panicked`, `shutdown` …
    pub(super) async fn status(&mut self) -> io::Result<String> {
        let answer = self.execute("query-status", None).await?;
        let status = answer["status"].as_str().map(str::to_owned);
        status.ok_or_else(|| invalid("the answer to query-status has no status".to_owned()))
    }

    fn keep(&mut self, line: Line) -> io::Result<()> {
        let Some(name) = line.event else {
            return Ok(());
        };
        if self.events.len() == EVENTS_MAX {
            return Err(invalid(format!("more than {EVENTS_MAX} events at once")));
        }
        let data = line.data.unwrap_or(Value::Null);
        self.events.push_back(Event { name, data });
        Ok(())
    }

    async fn line(&mut self) -> io::Result<Line> {
        let mut text = Vec::new();
        let mut bounded = (&mut self.stream).take(LINE_MAX_BYTES);
        bounded.read_until(b'\n', &mut text).await?;
        if text.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_slice(&text).map_err(|error| invalid(format!("QEMU sent: {error}")))
    }
}

/// Connects, executes one command and hangs up, all within [`ANSWER_TIMEOUT`].
pub(super) async fn command(
    path: &Path,
    command: &str,
    arguments: Option<Value>,
) -> io::Result<Value> {
    command_within(ANSWER_TIMEOUT, path, command, arguments).await
}

/// As [`command`], within `timeout`.
pub(super) async fn command_within(
    timeout: Duration,
    path: &Path,
    command: &str,
    arguments: Option<Value>,
) -> io::Result<Value> {
    let work = async { Qmp::connect(path).await?.execute(command, arguments).await };
    bounded(timeout, work).await
}

/// Returns the guest's status, within [`ANSWER_TIMEOUT`].
pub(super) async fn status(path: &Path) -> io::Result<String> {
    let work = async { Qmp::connect(path).await?.status().await };
    bounded(ANSWER_TIMEOUT, work).await
}

async fn bounded<T>(timeout: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("QEMU did not answer within {timeout:?}"),
        )),
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// Answers each received line with the next one of `answers`, after the first, which is the greeting.
    async fn serve(listener: UnixListener, answers: &[&str]) {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        for (at, answer) in answers.iter().enumerate() {
            if at > 0 {
                stream.read_line(&mut String::new()).await.unwrap();
            }
            stream.get_mut().write_all(answer.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn events_between_command_and_answer_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let answers = [
            "{\"QMP\": {}}\n",
            "{\"return\": {}}\n",
            "{\"event\": \"GUEST_PANICKED\", \"data\": {\"action\": \"pause\"}}\n\
             {\"return\": {\"status\": \"guest-panicked\"}}\n",
        ];
        let client = async {
            let mut qmp = Qmp::connect(&path).await.unwrap();
            assert_eq!(qmp.status().await.unwrap(), "guest-panicked");
            assert_eq!(qmp.event().await.unwrap().name, "GUEST_PANICKED");
        };
        tokio::join!(client, serve(listener, &answers));
    }

    /// Like QEMU on a busy machine: the server listens with a backlog of 1 and is slow to accept.
    #[tokio::test]
    async fn clients_for_whom_the_queue_has_no_place_are_served_later() {
        use rustix::net::{
            AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
        };

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let made = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        bind(&made, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&made, 1).unwrap();
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..6 {
            let path = path.clone();
            clients.spawn(async move {
                let minute = Duration::from_secs(60);
                command_within(minute, &path, "query-status", None).await
            });
        }
        // The queue is full now: clients without a place have received the error.
        tokio::time::sleep(PLACE_PAUSE * 4).await;
        let listener = UnixListener::from_std(made.into()).unwrap();
        for _ in 0..6 {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            for answer in [r#""QMP": {}"#, r#""return": {}"#, r#""return": 7"#] {
                let line = format!("{{{answer}}}\n");
                stream.get_mut().write_all(line.as_bytes()).await.unwrap();
                stream.read_line(&mut String::new()).await.unwrap();
            }
        }
        while let Some(client) = clients.join_next().await {
            assert_eq!(client.unwrap().unwrap(), 7);
        }
    }

    #[tokio::test]
    async fn a_refusal_garbage_and_the_end_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        for (n, last, expected) in [
            (
                0,
                "{\"error\": {\"desc\": \"no such command\"}}\n",
                "no such command",
            ),
            (1, "nonsense\n", "QEMU sent"),
            (2, "", "end of file"),
        ] {
            let path = dir.path().join(format!("{n}.sock"));
            let listener = UnixListener::bind(&path).unwrap();
            let answers = ["{\"QMP\": {}}\n", "{\"return\": {}}\n", last];
            let (result, ()) =
                tokio::join!(command(&path, "stop", None), serve(listener, &answers));
            let error = result.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
