//! The handover socket: passes file descriptors between an agent, its successor and the daemon.
//!
//! In the embedded backend every agent serves one Unix SEQPACKET socket (mode 0600, in the instance's run directory).
//! A request is one packet; its answer is one packet with the descriptors attached (SCM_RIGHTS):
//!
//! ```text
//! target agent ── TakeOver{session} ──▶ source agent     answer: Channel + 1 fd
//! daemon    ── Listeners ──────────▶ agent         answer: Listeners{names} + 1 fd per name
//! ```
//!
//! On `TakeOver`, the source agent creates a socket pair: one end goes to its workload, the other to the caller,
//! which passes it to its own workload. From then on the two workloads talk directly, without their agents.
//! `Listeners` returns duplicates of the published listening sockets, so that a restarted daemon holds them again:
//! connections made while an instance is being replaced wait in the socket's backlog instead of being refused.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

/// Largest packet on the handover socket, in bytes.
pub const PACKET_MAX_BYTES: usize = 16 * 1024;
/// Longest path of a Unix socket such as this one, in bytes, with the NUL at its end (unix(7)).
pub const SOCKET_PATH_MAX_BYTES: usize = 108;
/// Most descriptors in one packet; the kernel's own limit is 253 (SCM_MAX_FD).
pub const PACKET_MAX_FDS: usize = 64;

/// A request to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum Request {
    /// A channel to the workload for the morph `session`, which the agent must know already from
    /// the daemon's MORPH_PREPARE.
    TakeOver {
        /// The morph's session.
        session: u64,
    },
    /// Duplicates of the published listening sockets.
    Listeners,
}

/// An answer of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Answer {
    /// One descriptor: the channel to the other workload.
    Channel,
    /// One descriptor per name, in this order.
    Listeners {
        /// Names as in [`crate::PublishedPort::name`].
        names: Vec<String>,
    },
    /// The request was refused.
    Refused {
        /// Why, for the log.
        reason: String,
    },
}

/// Sends `message` as one packet with `fds` attached.
///
/// # Errors
/// The system's; `InvalidInput` when the packet or the number of descriptors is over its limit.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > PACKET_MAX_BYTES || fds.len() > PACKET_MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "handover packet over its limit",
        ));
    }
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(PACKET_MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        // There is space for as many as are allowed.
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let iov = [IoSlice::new(&bytes)];
    sendmsg(socket, &iov, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one packet and its descriptors. Blocks as the socket does.
///
/// # Errors
/// The system's; `UnexpectedEof` when the peer is gone; `InvalidData` for a packet that is too
/// large, cut short or not the message expected. Descriptors of a refused packet are closed.
pub fn receive<T: for<'a> Deserialize<'a>>(
    socket: BorrowedFd<'_>,
) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut bytes = vec![0; PACKET_MAX_BYTES];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(PACKET_MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let length = got.bytes;
    let truncated = got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if truncated {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "truncated handover packet",
        ));
    }
    Ok((serde_json::from_slice(&bytes[..length])?, fds))
}

/// Longest wait for an agent's answer.
pub const ANSWER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(2);

/// Asks the agent at `path` one thing. Blocks for at most [`ANSWER_TIMEOUT`].
///
/// # Errors
/// If it cannot be reached, does not answer in time, or refuses.
pub fn ask(path: &std::path::Path, request: &Request) -> io::Result<(Answer, Vec<OwnedFd>)> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    };
    use std::os::fd::AsFd;

    let kind = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let socket = socket_with(AddressFamily::UNIX, kind.0, kind.1, None)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    send(socket.as_fd(), request, &[])?;
    match receive::<Answer>(socket.as_fd())? {
        (Answer::Refused { reason }, _) => Err(io::Error::other(format!("refused: {reason}"))),
        answered => Ok(answered),
    }
}

/// Asks the agent at `path` for duplicates of its published listening sockets, in their order.
///
/// # Errors
/// As [`ask`].
pub fn ask_listeners(path: &std::path::Path) -> io::Result<Vec<OwnedFd>> {
    match ask(path, &Request::Listeners)? {
        (Answer::Listeners { names }, fds) if names.len() == fds.len() => Ok(fds),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "unexpected reply instead of listeners",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        let kind = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        socketpair(AddressFamily::UNIX, kind.0, kind.1, None).unwrap()
    }

    #[test]
    fn descriptors_arrive_with_their_message_and_still_work() {
        let (ours, theirs) = pair();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let answer = Answer::Listeners {
            names: vec!["p1".into()],
        };
        send(ours.as_fd(), &answer, &[writer.as_fd()]).unwrap();
        drop(writer);
        let (got, fds) = receive::<Answer>(theirs.as_fd()).unwrap();
        assert_eq!(got, answer);
        let mut moved = std::fs::File::from(fds.into_iter().next().unwrap());
        moved.write_all(b"x").unwrap();
        drop(moved);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn garbage_and_a_closed_peer_are_errors_not_panics() {
        let (ours, theirs) = pair();
        rustix::io::write(&ours, b"\xff\x00nonsense").unwrap();
        let error = receive::<Request>(theirs.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(ours);
        let error = receive::<Request>(theirs.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
