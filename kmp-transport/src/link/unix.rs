//! The Unix-socket form of vsock: `CONNECT <port>\n`, answered `OK <port>\n`.
//!
//! vhost-device-vsock and Firecracker expose a guest's vsock ports on the host this way; the agent of the embedded
//! backend implements it itself.

use std::io;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};

use super::{Accepted, BoxedLink};

/// Longest line of the exchange, in bytes: `CONNECT 4294967295\n`.
const LINE_MAX_BYTES: usize = 32;
/// Exchanges of one process that may wait for their answer; further ones wait for a place.
const EXCHANGES_MAX: usize = 4096;

static EXCHANGES: Semaphore = Semaphore::const_new(EXCHANGES_MAX);

/// Connects to the socket at `path` and asks for `port`. `ConnectionReset` when the other side reads the line and
/// hangs up instead of answering: the instance's kernel runs and has no listener there. `ConnectionAborted` when the
/// other side closes the connection and never reads the line: that is the device's doing, and says nothing about the
/// kernel. vhost-device-vsock 0.3 does so until the guest's driver has started the device.
///
/// Once asked, the answer is waited for, also when the caller has given up: vhost-device-vsock 0.3, unless
/// built by `scripts/fetch-vhost-vsock`, never serves a new connection again after one was closed while its
/// guest had not answered yet.
/// An attempt that outlives its caller ends with the answer, or with the device.
pub(super) async fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let permit = EXCHANGES.acquire().await.map_err(io::Error::other)?;
    let (answered, answer) = oneshot::channel();
    let path = path.to_owned();
    tokio::spawn(async move {
        let exchanged = exchange(&path, port).await;
        drop(permit);
        let _ = answered.send(exchanged);
    });
    answer.await.map_err(io::Error::other)?
}

async fn exchange(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .map_err(closed)?;
    let answer = read_line(&mut stream).await.map_err(closed)?;
    if answer.starts_with("OK ") {
        return Ok(stream);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("answered {answer:?}, not OK"),
    ))
}

/// Tells a refusal by the instance's kernel from a connection that nobody read. Linux reports `ECONNRESET` (or
/// `EPIPE` to the writer) where a Unix socket was closed with data left to read, and a plain end of file where all of
/// it had been read; and the device reads the line only to pass it on.
fn closed(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::ErrorKind::ConnectionReset.into(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => io::Error::new(
            io::ErrorKind::ConnectionAborted,
            "the vsock device closed the connection: no driver in the guest has started the device",
        ),
        _ => error,
    }
}

/// Reads a line byte by byte: whatever follows it belongs to the stream.
pub(crate) async fn read_line<S: tokio::io::AsyncRead + Unpin>(
    stream: &mut S,
) -> io::Result<String> {
    let mut line = Vec::with_capacity(LINE_MAX_BYTES);
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte if line.len() < LINE_MAX_BYTES => line.push(byte),
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the line is too long",
                ));
            }
        }
    }
    String::from_utf8(line).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Listens on a Unix socket for one vsock port.
pub struct UnixVsockListener {
    listener: UnixListener,
    port: u32,
}

impl UnixVsockListener {
    /// Creates the socket at `path`; one left over from an earlier process is replaced.
    ///
    /// # Errors
    /// The system's.
    pub fn bind(path: &Path, port: u32) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self {
            listener: UnixListener::bind(path)?,
            port,
        })
    }

    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        let (stream, _) = self.listener.accept().await?;
        let stranger = match stream.peer_cred() {
            Ok(peer) => stranger(peer.uid(), nix::unistd::geteuid().as_raw()),
            Err(error) => Some(format!("cannot determine the user of the peer: {error}")),
        };
        Ok(Accepted {
            link: Box::new(stream),
            port: Some(self.port),
            stranger,
        })
    }
}

/// The objection to a peer of the user `uid`, if any: only root and the user `own`, of this
/// process, may connect.
fn stranger(uid: u32, own: u32) -> Option<String> {
    (uid != 0 && uid != own).then(|| format!("the connection comes from uid {uid}"))
}

/// Reads the CONNECT line and answers it.
pub(super) async fn answer_connect(link: &mut BoxedLink, port: u32) -> io::Result<()> {
    let line = read_line(link).await?;
    if line != format!("CONNECT {port}") {
        let text = format!("the peer requested {line:?}, but only port {port} is served");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    link.write_all(format!("OK {port}\n").as_bytes()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    use std::time::Duration;

    #[test]
    fn of_users_only_root_and_our_own_may_connect() {
        assert_eq!(stranger(0, 1000), None);
        assert_eq!(stranger(1000, 1000), None);
        assert!(stranger(1001, 1000).is_some());
        assert!(stranger(1000, 0).is_some());
    }

    #[tokio::test]
    async fn a_connection_that_was_given_up_is_held_until_it_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let given_up = tokio::time::timeout(Duration::from_millis(20), connect(&path, 9000));
        assert!(given_up.await.is_err());
        let (mut device, _) = listener.accept().await.unwrap();
        assert_eq!(read_line(&mut device).await.unwrap(), "CONNECT 9000");
        // Held: nothing more to read, and no end either.
        let error = device.try_read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        device.write_all(b"OK 9000\n").await.unwrap();
        // Answered, it is closed.
        let mut rest = Vec::new();
        device.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
    }

    /// A device closes the connection like this if its guest has not booted.
    #[tokio::test]
    async fn a_connection_that_is_closed_unread_is_no_refusal_by_a_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let device = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            drop(stream);
            let (stream, _) = listener.accept().unwrap();
            let mut wanted = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            poll(&mut wanted, PollTimeout::NONE).unwrap();
        });
        for _ in 0..2 {
            let error = connect(&path, 9000).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
        }
        device.join().unwrap();
    }
}
