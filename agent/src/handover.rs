//! Serves the handover socket; [`kmorph_launch::handover`] describes its protocol.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use kmorph_launch::handover::{Answer, Request, receive, send};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
};
use slog::{Logger, warn};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;

use crate::morph::Morphs;

/// Connections served at a time; others wait in the backlog.
const CONNECTIONS_MAX: usize = 8;
/// Longest wait for a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;
/// Pause after accept failed for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The descriptors to hand over.
#[derive(Debug)]
pub struct Handover {
    /// For TakeOver.
    pub morphs: Morphs,
    /// For Listeners: the published sockets with their names.
    pub listeners: Vec<(String, OwnedFd)>,
}

/// Creates the socket at `path`. Its directory is private to the user that runs the instance.
///
/// # Errors
/// The system's.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    listen(&fd, Backlog::new(BACKLOG).map_err(io::Error::from)?)?;
    Ok(fd)
}

/// Serves until the agent exits.
///
/// # Errors
/// If the socket cannot be watched.
pub fn serve(socket: OwnedFd, handover: Handover, log: Logger) -> io::Result<()> {
    // SAFETY: an OwnedFd is never replaced here and closed only when dropped, which AsyncFd does
    // after taking it off the reactor.
    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
    let handover = std::sync::Arc::new(handover);
    let slots = std::sync::Arc::new(Semaphore::new(CONNECTIONS_MAX));
    tokio::spawn(async move {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            let accepted = socket.async_io(Interest::READABLE, accept).await;
            let connection = match accepted {
                Ok(connection) => connection,
                Err(error) => {
                    warn!(log, "handover socket"; "error" => %error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (handover, log) = (handover.clone(), log.clone());
            tokio::spawn(async move {
                if let Err(error) = attend(connection, &handover).await {
                    warn!(log, "handover request failed"; "error" => %error);
                }
                drop(slot);
            });
        }
    });
    Ok(())
}

fn accept(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let raw = accept4(socket.as_raw_fd(), flags)?;
    // SAFETY: accept4 has just made this descriptor and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

async fn attend(connection: OwnedFd, handover: &Handover) -> io::Result<()> {
    // SAFETY: as for the listening socket.
    let connection = unsafe { AsyncFd::register(connection) }?;
    let request = connection.async_io(Interest::READABLE, |fd| receive::<Request>(fd.as_fd()));
    let (request, _) = tokio::time::timeout(REQUEST_TIMEOUT, request)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no request in time"))??;
    let (answer, fds) = match request {
        Request::TakeOver { session } => match handover.morphs.hand_over(session).await {
            Ok(channel) => (Answer::Channel, vec![channel]),
            Err(refusal) => {
                let reason = refusal.text;
                (Answer::Refused { reason }, Vec::new())
            }
        },
        Request::Listeners => {
            let (names, fds) = duplicates(&handover.listeners)?;
            (Answer::Listeners { names }, fds)
        }
    };
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    send(connection.get_ref().as_fd(), &answer, &borrowed)
}

fn duplicates(listeners: &[(String, OwnedFd)]) -> io::Result<(Vec<String>, Vec<OwnedFd>)> {
    let mut names = Vec::with_capacity(listeners.len());
    let mut fds = Vec::with_capacity(listeners.len());
    for (name, socket) in listeners {
        names.push(name.clone());
        fds.push(socket.try_clone()?);
    }
    Ok((names, fds))
}
