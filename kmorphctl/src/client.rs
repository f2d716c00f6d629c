//! Sends requests to the daemon: HTTP and JSON over its Unix socket, one connection per request.
//!
//! All waits and reads are bounded. Every error becomes a [`Failure`] that names the socket.

use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kmorph_control_api::{ApiError, REQUEST_BODY_MAX_BYTES};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::exit::Exit;
use crate::failure::Failure;

/// Maximum time to connect to the socket.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of an answer, bytes: 10,000 instances need about 6 MiB.
const ANSWER_MAX_BYTES: usize = 64 << 20;
/// Maximum length of the excerpt from an invalid answer, characters.
const EXCERPT_MAX_CHARS: usize = 200;

/// An answer: the original JSON, and its parsed value. JSON output shows the original, so that
/// fields of a newer daemon are not lost.
#[derive(Clone, Debug)]
pub(crate) struct Answer<T> {
    /// The original JSON.
    pub(crate) raw: Value,
    /// The parsed value.
    pub(crate) value: T,
}

/// The connection settings: the daemon's socket and the time limit.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    timeout: Duration,
    own_only: bool,
}

impl Client {
    /// Creates a client for the daemon at `socket`, with `timeout` for each answer. With `own_only`, the client refuses
    /// a daemon that belongs neither to this user nor to root: under `/tmp`, another user can create the socket first.
    pub(crate) fn new(socket: PathBuf, timeout: Duration, own_only: bool) -> Self {
        Self {
            socket,
            timeout,
            own_only,
        }
    }

    /// Returns the daemon's socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Answer<T>, Failure> {
        self.ask(Method::GET, path, None, Duration::ZERO).await
    }

    /// Sends a request that the daemon may delay on purpose for up to `wait`.
    pub(crate) async fn get_waiting<T: DeserializeOwned>(
        &self,
        path: &str,
        wait: Duration,
    ) -> Result<Answer<T>, Failure> {
        self.ask(Method::GET, path, None, wait).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Answer<T>, Failure> {
        let body = self.encode(body)?;
        self.ask(Method::POST, path, Some(body), Duration::ZERO)
            .await
    }

    pub(crate) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Answer<T>, Failure> {
        let body = self.encode(body)?;
        self.ask(Method::PUT, path, Some(body), Duration::ZERO)
            .await
    }

    pub(crate) async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Answer<T>, Failure> {
        let body = self.encode(body)?;
        self.ask(Method::PATCH, path, Some(body), Duration::ZERO)
            .await
    }

    pub(crate) async fn delete<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<Answer<T>, Failure> {
        self.ask(Method::DELETE, path, None, Duration::ZERO).await
    }

    /// Opens a stream that ends when the daemon ends it; the timeout applies only to its beginning.
    pub(crate) async fn stream(&self, path: &str) -> Result<Incoming, Failure> {
        let begun = tokio::time::timeout(self.timeout, self.send(Method::GET, path, None));
        let response = begun.await.map_err(|_| self.silent(self.timeout))??;
        if response.status().is_success() {
            return Ok(response.into_body());
        }
        let (status, body) = self.collect(response).await?;
        Err(refusal(self.socket(), status, &body))
    }

    /// Returns the failure when the connection breaks during an answer.
    pub(crate) fn broken(&self, why: impl std::fmt::Display) -> Failure {
        let socket = self.socket.display();
        let text = format!("the daemon at {socket} closed the connection: {why}");
        Failure::new(Exit::Unreachable, text).hint("see `kmorphctl daemon status` and its log")
    }

    fn encode(&self, body: &impl Serialize) -> Result<Bytes, Failure> {
        let body = serde_json::to_vec(body)
            .map_err(|error| Failure::internal(format!("cannot encode the request: {error}")))?;
        if body.len() > REQUEST_BODY_MAX_BYTES {
            let text = format!(
                "the request has {} bytes; the daemon accepts at most {REQUEST_BODY_MAX_BYTES}",
                body.len()
            );
            return Err(Failure::invalid(text));
        }
        Ok(body.into())
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        wait: Duration,
    ) -> Result<Answer<T>, Failure> {
        let limit = self.timeout.saturating_add(wait);
        let exchange = async {
            let response = self.send(method, path, body).await?;
            self.collect(response).await
        };
        let answered = tokio::time::timeout(limit, exchange).await;
        let (status, body) = answered.map_err(|_| self.silent(limit))??;
        if !status.is_success() {
            return Err(refusal(self.socket(), status, &body));
        }
        let understood =
            serde_json::from_slice(&body).and_then(|raw: Value| Ok((T::deserialize(&raw)?, raw)));
        understood
            .map(|(value, raw)| Answer { raw, value })
            .map_err(|error| self.not_understood(path, &error, &body))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Response<Incoming>, Failure> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "kmorphd")
            .header(ACCEPT, "application/json, text/event-stream")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body.unwrap_or_default()))
            .map_err(|error| {
                Failure::invalid(format!("cannot build the request for {path}: {error}"))
            })?;
        let connecting = UnixStream::connect(&self.socket);
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| self.silent(CONNECT_TIMEOUT))?
            .map_err(|error| self.unreachable(&error))?;
        self.check_owner(&stream)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream))
                .await
                .map_err(|error| self.broken(error))?;
        // Ends with the exchange: the task holds only this connection. Its error reaches the
        // exchange too.
        tokio::spawn(connection);
        sender
            .send_request(request)
            .await
            .map_err(|error| self.broken(error))
    }

    fn check_owner(&self, stream: &UnixStream) -> Result<(), Failure> {
        if !self.own_only {
            return Ok(());
        }
        let peer = stream
            .peer_cred()
            .map_err(|error| self.broken(error))?
            .uid();
        if peer == 0 || peer == nix::unistd::geteuid().as_raw() {
            return Ok(());
        }
        let socket = self.socket.display();
        let text =
            format!("a process of uid {peer} answers at {socket}, where this user's daemon should");
        Err(Failure::new(Exit::Unreachable, text)
            .hint("remove the socket; to ask another user's daemon, name it with --socket"))
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<(StatusCode, Bytes), Failure> {
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX_BYTES);
        match body.collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => {
                let socket = self.socket.display();
                let text = format!(
                    "the daemon at {socket} sent an answer of more than {ANSWER_MAX_BYTES} bytes"
                );
                Err(Failure::internal(text))
            }
            Err(error) => Err(self.broken(error)),
        }
    }

    fn unreachable(&self, error: &std::io::Error) -> Failure {
        let socket = self.socket.display();
        match error.kind() {
            ErrorKind::NotFound => Failure::new(
                Exit::Unreachable,
                format!("no daemon answers at {socket}: there is no such socket"),
            )
            .hint("start it with `kmorphctl daemon start`, or name its socket with --socket"),
            ErrorKind::ConnectionRefused if !is_socket(&self.socket) => Failure::new(
                Exit::Unreachable,
                format!("no daemon answers at {socket}: not a socket"),
            )
            .hint("name the daemon's socket with --socket"),
            ErrorKind::ConnectionRefused => Failure::new(
                Exit::Unreachable,
                format!("no daemon answers at {socket}: the socket was left behind by an earlier daemon"),
            )
            .hint("start it with `kmorphctl daemon start`"),
            ErrorKind::PermissionDenied => Failure::new(
                Exit::Forbidden,
                format!("cannot open the daemon's socket {socket}: permission denied"),
            )
            .hint("run as root or as the daemon's user, or give yourself access to the socket's directory"),
            _ => Failure::new(
                Exit::Unreachable,
                format!("cannot reach the daemon at {socket}: {error}"),
            ),
        }
    }

    fn silent(&self, limit: Duration) -> Failure {
        let socket = self.socket.display();
        let text = format!(
            "the daemon at {socket} did not answer within {}s",
            limit.as_secs_f64()
        );
        Failure::new(Exit::TimedOut, text)
            .hint("try again with a longer --timeout; the daemon's log may say what is blocking it")
    }

    fn not_understood(&self, path: &str, error: &serde_json::Error, body: &[u8]) -> Failure {
        let socket = self.socket.display();
        let text = format!(
            "the answer of the daemon at {socket} to {path} cannot be parsed: {error}; it begins with \
             {:?}",
            excerpt(body)
        );
        Failure::internal(text)
            .hint("kmorphctl and kmorphd may differ in version: see `kmorphctl daemon status`")
    }
}

/// Returns a refusal. If a newer daemon sends an unknown code, the message is kept.
fn refusal(socket: &Path, status: StatusCode, body: &[u8]) -> Failure {
    #[derive(serde::Deserialize)]
    struct Said {
        message: String,
        next_step: Option<String>,
    }
    if let Ok(error) = serde_json::from_slice::<ApiError>(body) {
        return Failure::refused(error);
    }
    if let Ok(said) = serde_json::from_slice::<Said>(body) {
        let failure = Failure::internal(said.message);
        return match said.next_step {
            Some(next_step) => failure.hint(next_step),
            None => failure,
        };
    }
    let text = format!(
        "what listens at {} refused with HTTP {status} and gave no reason: {:?}",
        socket.display(),
        excerpt(body),
        status = status.as_u16()
    );
    Failure::internal(text).hint("check that the socket belongs to kmorphd")
}

/// Returns whether the path is a socket, or is not visible enough to be ruled out.
fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).map_or(true, |there| there.file_type().is_socket())
}

fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    text.chars().take(EXCERPT_MAX_CHARS).collect()
}
