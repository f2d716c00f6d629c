//! One packet: a length word, JSON, raw data, descriptors.
//!
//! ```text
//!   0        4                4+n             end of packet
//!   | n: u32 | JSON, n bytes  | data          |   + SCM_RIGHTS
//! ```
//!
//! SEQPACKET preserves packet boundaries, so the data needs no length of its own.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{MAX_CHUNK_BYTES, MAX_FDS_PER_PACKET, MAX_JSON_BYTES};

const LENGTH_WORD: usize = 4;
const MAX_PACKET_BYTES: usize = LENGTH_WORD + MAX_JSON_BYTES + MAX_CHUNK_BYTES;

/// Why a packet could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The other end is gone.
    #[error("the other end of the handover socket is closed")]
    Closed,
    /// The other end sent an invalid message.
    #[error("malformed packet on the handover socket: {0}")]
    Malformed(String),
    /// The packet exceeds the limits.
    #[error(
        "packet over the limit: {json} bytes of JSON (at most {MAX_JSON_BYTES}), {data} of data \
         (at most {MAX_CHUNK_BYTES}), {fds} descriptors (at most {MAX_FDS_PER_PACKET})"
    )]
    TooLarge {
        /// Size of the JSON, bytes.
        json: usize,
        /// Size of the data, bytes.
        data: usize,
        /// Number of descriptors.
        fds: usize,
    },
    /// A system call failed.
    #[error("{what} on the handover socket: {source}")]
    System {
        /// The attempted action.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

impl HandoverError {
    /// Returns whether the socket was only not ready: retry once it is.
    #[must_use]
    pub fn would_block(&self) -> bool {
        matches!(self, Self::System { source, .. } if source.kind() == io::ErrorKind::WouldBlock)
    }

    fn system(what: &'static str, errno: Errno) -> Self {
        match errno {
            Errno::EPIPE | Errno::ECONNRESET => Self::Closed,
            other => Self::System {
                what,
                source: other.into(),
            },
        }
    }
}

/// A message with its id: the JSON of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet<T> {
    /// Associates a reply with its request; 0 for other messages.
    pub id: u32,
    /// The message.
    #[serde(flatten)]
    pub message: T,
}

/// A received packet.
#[derive(Debug)]
pub struct Incoming<T> {
    /// Associates a reply with its request.
    pub id: u32,
    /// The message.
    pub message: T,
    /// The raw data after it.
    pub data: Vec<u8>,
    /// The attached descriptors.
    pub fds: Vec<OwnedFd>,
}

/// One end of a handover socket or of a peer channel.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl PacketSocket {
    /// Takes a connected SEQPACKET socket and makes it non-blocking.
    ///
    /// # Errors
    /// The system's error, if `fd` is not open.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFL)?;
        let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        Ok(Self {
            fd,
            buffer: Vec::new(),
        })
    }

    /// Creates a connected pair of sockets, both close-on-exec.
    ///
    /// # Errors
    /// The system's error, if no descriptors are left.
    pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
        Ok(socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?)
    }

    /// Sends one packet. Never blocks: see [`HandoverError::would_block`].
    ///
    /// # Errors
    /// [`HandoverError::TooLarge`] before anything is sent; else the socket's error.
    pub fn send<T: Serialize>(
        &self,
        id: u32,
        message: &T,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), HandoverError> {
        let json = serde_json::to_vec(&Packet { id, message })
            .map_err(|error| HandoverError::Malformed(error.to_string()))?;
        if json.len() > MAX_JSON_BYTES
            || data.len() > MAX_CHUNK_BYTES
            || fds.len() > MAX_FDS_PER_PACKET
        {
            return Err(HandoverError::TooLarge {
                json: json.len(),
                data: data.len(),
                fds: fds.len(),
            });
        }
        let length = u32::try_from(json.len()).unwrap_or(u32::MAX).to_le_bytes();
        let iov = [
            IoSlice::new(&length),
            IoSlice::new(&json),
            IoSlice::new(data),
        ];
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            match sendmsg::<()>(self.fd.as_raw_fd(), &iov, control, flags, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(HandoverError::system("sending", errno)),
            }
        }
    }

    /// Receives one packet. Never blocks: see [`HandoverError::would_block`]. Closes the
    /// descriptors of a malformed packet.
    ///
    /// # Errors
    /// [`HandoverError::Closed`], [`HandoverError::Malformed`], or the socket's error.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Incoming<T>, HandoverError> {
        self.buffer.resize(MAX_PACKET_BYTES, 0);
        let (length, fds, cut) = receive_raw(self.fd.as_fd(), &mut self.buffer)?;
        if length == 0 {
            return Err(HandoverError::Closed);
        }
        let malformed = |text: &str| HandoverError::Malformed(text.to_owned());
        if cut {
            return Err(malformed("the packet is over the limit and was truncated"));
        }
        let packet = &self.buffer[..length];
        let (word, rest) = packet
            .split_first_chunk::<LENGTH_WORD>()
            .ok_or_else(|| malformed("shorter than its length word"))?;
        let json_len = u32::from_le_bytes(*word) as usize;
        let (json, data) = rest
            .split_at_checked(json_len)
            .ok_or_else(|| malformed("its JSON is longer than the packet"))?;
        let Packet { id, message } = serde_json::from_slice(json)
            .map_err(|error| HandoverError::Malformed(error.to_string()))?;
        Ok(Incoming {
            id,
            message,
            data: data.to_vec(),
            fds,
        })
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn receive_raw(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> Result<(usize, Vec<OwnedFd>, bool), HandoverError> {
    let mut control = cmsg_space!([RawFd; MAX_FDS_PER_PACKET]);
    let mut fds = Vec::new();
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    loop {
        let mut iov = [IoSliceMut::new(buffer)];
        let got = match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags) {
            Ok(got) => got,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(HandoverError::system("receiving", errno)),
        };
        let cut = got
            .flags
            .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        if let Ok(messages) = got.cmsgs() {
            for message in messages {
                if let ControlMessageOwned::ScmRights(raw) = message {
                    // SAFETY: the kernel has just installed these descriptors in this process, and
                    // no other code knows their numbers, so this is their only owner.
                    fds.extend(
                        raw.into_iter()
                            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                    );
                }
            }
        }
        return Ok((got.bytes, fds, cut));
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::{Item, PeerMessage, Reply, Request, StateDigest};
    use super::*;

    fn sockets() -> (PacketSocket, PacketSocket) {
        let (a, b) = PacketSocket::pair().unwrap();
        (PacketSocket::new(a).unwrap(), PacketSocket::new(b).unwrap())
    }

    #[test]
    fn a_packet_arrives_whole_with_data_and_descriptors() {
        let (left, mut right) = sockets();
        let (a, b) = PacketSocket::pair().unwrap();
        let part = PeerMessage::Part {
            items: vec![
                Item::Listener { name: "p1".into() },
                Item::Connection { index: 7 },
            ],
        };
        let data = vec![9; MAX_CHUNK_BYTES];
        left.send(3, &part, &data, &[a.as_fd(), b.as_fd()]).unwrap();
        let got = right.receive::<PeerMessage>().unwrap();
        assert_eq!((got.id, got.message), (3, part));
        assert_eq!(got.data, data);
        assert_eq!(got.fds.len(), 2);
    }

    #[test]
    fn every_message_survives_the_wire() {
        let (left, mut right) = sockets();
        let reply = Reply::Frozen {
            state: StateDigest {
                digest: u64::MAX,
                counter: 2,
                used_bytes: 3,
            },
            dirty_bytes: 0,
            connections: 5,
            elapsed_us: 1,
        };
        left.send(1, &reply, &[], &[]).unwrap();
        assert_eq!(right.receive::<Reply>().unwrap().message, reply);
        left.send(2, &Request::Serve, &[], &[]).unwrap();
        assert_eq!(right.receive::<Request>().unwrap().message, Request::Serve);
    }

    #[test]
    fn garbage_is_malformed_and_a_closed_end_is_closed() {
        let (left, mut right) = sockets();
        for garbage in [
            &b"\x01"[..],
            b"\xff\xff\xff\xff{}",
            b"\x02\x00\x00\x00{}",
            b"\x04\x00\x00\x00\xff\xfe\x00\x01",
        ] {
            nix::unistd::write(&left, garbage).unwrap();
            let error = right.receive::<Request>().unwrap_err();
            assert!(matches!(error, HandoverError::Malformed(_)), "{error}");
        }
        assert!(right.receive::<Request>().unwrap_err().would_block());
        drop(left);
        let error = right.receive::<Request>().unwrap_err();
        assert!(matches!(error, HandoverError::Closed));
    }

    #[test]
    fn a_packet_over_the_limits_is_refused_before_it_is_sent() {
        let (left, mut right) = sockets();
        let data = vec![0; MAX_CHUNK_BYTES + 1];
        let error = left.send(1, &Request::Query, &data, &[]).unwrap_err();
        assert!(matches!(error, HandoverError::TooLarge { .. }));
        let many = vec![left.as_fd(); MAX_FDS_PER_PACKET + 1];
        let error = left.send(1, &Request::Query, &[], &many).unwrap_err();
        assert!(matches!(error, HandoverError::TooLarge { .. }));
        assert!(right.receive::<Request>().unwrap_err().would_block());
    }
}
