//! Connections to the API: admission, deadlines, shutdown.
//!
//! A connection carries one request. It ends with the response or at its deadline, whatever the client sends or
//! does not read. Only an event stream lasts longer, and each user may have only a few of them.

use std::os::unix::net::UnixListener as StdListener;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use actix::Arbiter;
use actix_http::{HttpService, KeepAlive, Protocol};
use actix_service::{Service, ServiceFactory, map_config};
use actix_web::dev::{AppConfig, Extensions};
use kmorph_control_api::{ApiError, ErrorCode};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::access::{Access, Caller};
use super::seats::{Limits, Rank, Seat, Seats};
use super::{ANSWER_TIMEOUT, Api, CONNECTIONS_MAX, REQUEST_TIMEOUT};

/// Limits on connections, by rank of the caller.
const LIMITS: Limits = Limits {
    total: CONNECTIONS_MAX,
    reserved: 32,
    of_a_member: 64,
    of_lookers: 128,
    of_a_looker: 32,
};
/// Maximum time for a client to read its response.
const READ_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum life of a connection other than an event stream.
pub(super) const LIFE_MAX: Duration = Duration::from_secs(
    REQUEST_TIMEOUT.as_secs() + ANSWER_TIMEOUT.as_secs() + READ_TIMEOUT.as_secs(),
);
/// Maximum time for the requests under way when the daemon stops.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval between checks whether the requests are finished.
const SHUTDOWN_POLL: Duration = Duration::from_millis(5);
/// Pause after accept failed: the daemon may be out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Set by the handler of an event stream: exempts the connection from [`LIFE_MAX`].
#[derive(Clone, Debug, Default)]
pub(super) struct Streaming(Arc<AtomicBool>);

impl Streaming {
    pub(super) fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn has_begun(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Stops the API.
#[derive(Debug)]
pub struct Handle {
    stop: watch::Sender<bool>,
    arbiter: Arbiter,
    seats: Seats,
    streams: Seats,
}

impl Handle {
    /// Accepts no more connections, gives the requests under way a moment, and closes all others.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let answered = async {
            while self.seats.in_use() > self.streams.in_use() {
                tokio::time::sleep(SHUTDOWN_POLL).await;
            }
        };
        let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, answered).await;
        self.arbiter.stop();
        let _ = self.arbiter.join();
    }
}

/// Serves `api` to the clients of `listener`, on a separate thread.
///
/// # Errors
/// When the socket cannot be watched.
pub(super) fn serve(listener: StdListener, api: Api) -> std::io::Result<Handle> {
    listener.set_nonblocking(true)?;
    let (stop, stopped) = watch::channel(false);
    #[expect(
        clippy::disallowed_methods,
        reason = "the API socket's own thread; runs of a test have no API socket"
    )]
    let arbiter = Arbiter::new();
    let seats = Seats::new(LIMITS);
    let handle = Handle {
        stop,
        seats: seats.clone(),
        streams: api.streams.clone(),
        arbiter,
    };
    handle.arbiter.spawn_fn(move || {
        // The conversion fails only outside of a runtime.
        if let Ok(listener) = UnixListener::from_std(listener) {
            actix::spawn(run(listener, seats, api, stopped));
        }
    });
    Ok(handle)
}

async fn run(listener: UnixListener, seats: Seats, api: Api, mut stopped: watch::Receiver<bool>) {
    let access = Arc::clone(&api.access);
    let app = map_config(super::application(api), |()| AppConfig::default());
    let factory = HttpService::build()
        .keep_alive(KeepAlive::Disabled)
        .client_request_timeout(REQUEST_TIMEOUT)
        .on_connect_ext(|peer: &Peer, extensions: &mut Extensions| {
            extensions.insert(peer.caller);
            extensions.insert(peer.streaming.clone());
        })
        .finish(app);
    let Ok(service) = factory.new_service(()).await else {
        return;
    };
    let service = Rc::new(service);
    loop {
        let admitted = tokio::select! {
            admitted = admit(&listener, &seats, &access) => admitted,
            _ = stopped.changed() => return,
        };
        let Some((peer, seat)) = admitted else {
            continue;
        };
        let (service, streaming) = (Rc::clone(&service), peer.streaming.clone());
        // A request that panics ends this task and its connection, and no other.
        actix::spawn(async move {
            let _seat: Seat = seat;
            tokio::select! {
                _ = service.call((peer, Protocol::Http1, None)) => {}
                () = end_of_life(&streaming) => {}
            }
        });
    }
}

async fn end_of_life(streaming: &Streaming) {
    tokio::time::sleep(LIFE_MAX).await;
    if streaming.has_begun() {
        std::future::pending::<()>().await;
    }
}

/// Accepts the next connection. Returns `None` if accept failed or the connection was refused.
async fn admit(listener: &UnixListener, seats: &Seats, access: &Access) -> Option<(Peer, Seat)> {
    let Ok((stream, _)) = listener.accept().await else {
        tokio::time::sleep(ACCEPT_PAUSE).await;
        return None;
    };
    // No limit can be applied to a client without credentials.
    let credentials = stream.peer_cred().ok()?;
    let caller = Caller {
        uid: credentials.uid(),
        gid: credentials.gid(),
    };
    let seat = match access.is_owner(&caller) {
        // All seats are taken, most of them by owners: wait for the deadline of one of them.
        true => Some(seats.wait(caller.uid, Rank::Owner).await),
        // Look the group up only if it makes a difference, because the lookup can be slow.
        false => seats.take(caller.uid, Rank::Looker).or_else(|| {
            let member = access.is_member(&caller);
            member.then(|| seats.take(caller.uid, Rank::Member))?
        }),
    };
    let peer = Peer {
        stream,
        caller,
        streaming: Streaming::default(),
    };
    match seat {
        Some(seat) => Some((peer, seat)),
        None => {
            refuse(peer.stream, caller.uid).await;
            None
        }
    }
}

/// Tells the client why its connection is refused. The message fits into the buffer of a new connection, so the write
/// does not block.
async fn refuse(mut stream: UnixStream, uid: u32) {
    let text = format!("uid {uid} has too many connections open, or all users together have");
    let error = ApiError::new(ErrorCode::Busy, text).hint("close some, or try again in a moment");
    let body = serde_json::to_string(&error).unwrap_or_default();
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let answer = [head.as_bytes(), body.as_bytes()].concat();
    let _ = tokio::time::timeout(ACCEPT_PAUSE, stream.write_all(&answer)).await;
}

/// A connection and the identity of its client.
struct Peer {
    stream: UnixStream,
    caller: Caller,
    streaming: Streaming,
}

impl AsyncRead for Peer {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Peer {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
