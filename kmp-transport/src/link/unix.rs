//! The Unix-socket form of vsock: `CONNECT <port>\n`, answered `OK <port>\n`.
//!
//! vhost-device-vsock and Firecracker show a guest's vsock ports on the host this way; the agent of
//! the embedded backend serves it itself.

use std::io;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::{Accepted, BoxedLink};

/// Longest line of the exchange, in bytes: `CONNECT 4294967295\n`.
const LINE_MAX_BYTES: usize = 32;

/// Connects to the socket at `path` and asks for `port`. `ConnectionReset` when the other side hangs
/// up instead of answering: its kernel lives and has no listener there.
pub(super) async fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let answer = read_line(&mut stream)
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::ErrorKind::ConnectionReset.into(),
            _ => error,
        })?;
    if answer.starts_with("OK ") {
        return Ok(stream);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("answered {answer:?}, not OK"),
    ))
}

/// Reads a line byte by byte: whatever follows it belongs to the stream.
async fn read_line<S: tokio::io::AsyncRead + Unpin>(stream: &mut S) -> io::Result<String> {
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
        Ok(Accepted {
            link: Box::new(stream),
            port: Some(self.port),
        })
    }
}

/// Reads the CONNECT line and answers it.
pub(super) async fn answer_connect(link: &mut BoxedLink, port: u32) -> io::Result<()> {
    let line = read_line(link).await?;
    if line != format!("CONNECT {port}") {
        let text = format!("asked {line:?}, only port {port} is answered");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    link.write_all(format!("OK {port}\n").as_bytes()).await
}
