//! Byte streams between kernels.

mod fault;
mod unix;
pub mod vsock;

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

pub use fault::{FaultPlan, FaultyLink};
use tokio::io::{AsyncRead, AsyncWrite};
pub use unix::UnixVsockListener;
pub(crate) use unix::read_line;

/// Port on which an instance listens for its daemon.
pub const KMP_PORT: u32 = 9000;
/// Longest time for a connection to come about.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes that an in-memory link holds in each direction.
pub const MEMORY_LINK_BYTES: usize = 64 * 1024;

/// A byte stream.
pub trait Link: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Link for T {}

/// Any link.
pub type BoxedLink = Box<dyn Link>;

/// The address of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket that takes `CONNECT <port>\n` and answers `OK <port>\n`.
    Unix(PathBuf),
    /// An AF_VSOCK context id.
    Vsock(u32),
    /// An address of a transport that each socket must select: see [`vsock`].
    ChosenVsock {
        /// The context id.
        cid: u32,
        /// The option that chooses.
        option: i32,
    },
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "the socket {path:?},"),
            Self::Vsock(cid) | Self::ChosenVsock { cid, .. } => write!(f, "vsock CID {cid}"),
        }
    }
}

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The other kernel reset it: a live kernel without a listener on that port.
    #[error("connecting to {address} port {port}: refused by its kernel")]
    KernelRefused {
        /// The address.
        address: Address,
        /// Which port.
        port: u32,
    },
    /// Nothing is there.
    #[error("connecting to {address} port {port}: {source}")]
    Unreachable {
        /// The address.
        address: Address,
        /// Which port.
        port: u32,
        /// The system's reason.
        source: io::Error,
    },
    /// No answer within [`CONNECT_TIMEOUT`].
    #[error("connecting to {address} port {port}: no answer within {CONNECT_TIMEOUT:?}")]
    TimedOut {
        /// The address.
        address: Address,
        /// Which port.
        port: u32,
    },
}

/// A link under way.
pub type Connecting = Pin<Box<dyn Future<Output = Result<BoxedLink, ConnectError>> + Send>>;

/// How instances are reached.
pub trait Network: Send + Sync {
    /// As [`connect`].
    fn connect(&self, address: Address, port: u32) -> Connecting;
}

/// By the system's sockets.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemNetwork;

impl Network for SystemNetwork {
    fn connect(&self, address: Address, port: u32) -> Connecting {
        Box::pin(async move { connect(&address, port).await })
    }
}

/// Connects to a port of an instance.
///
/// # Errors
/// See [`ConnectError`]: who refused is evidence for the failure detector.
pub async fn connect(address: &Address, port: u32) -> Result<BoxedLink, ConnectError> {
    let attempt = async {
        match address {
            Address::Unix(path) => unix::connect(path, port)
                .await
                .map(|s| Box::new(s) as BoxedLink),
            Address::Vsock(cid) => {
                let to = tokio_vsock::VsockAddr::new(*cid, port);
                tokio_vsock::VsockStream::connect(to)
                    .await
                    .map(|s| Box::new(s) as BoxedLink)
            }
            Address::ChosenVsock { cid, option } => vsock::dial(*cid, port, Some(*option))
                .await
                .map(|s| Box::new(s) as BoxedLink),
        }
    };
    let address = || address.clone();
    match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
        Ok(Ok(link)) => Ok(link),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
            Err(ConnectError::KernelRefused {
                address: address(),
                port,
            })
        }
        Ok(Err(source)) => Err(ConnectError::Unreachable {
            address: address(),
            port,
            source,
        }),
        Err(_) => Err(ConnectError::TimedOut {
            address: address(),
            port,
        }),
    }
}

/// Two ends of a link in memory.
pub fn memory() -> (BoxedLink, BoxedLink) {
    let (a, b) = tokio::io::duplex(MEMORY_LINK_BYTES);
    (Box::new(a), Box::new(b))
}

/// The listener of an instance.
pub enum Listener {
    /// See [`UnixVsockListener`].
    Unix(UnixVsockListener),
    /// AF_VSOCK.
    Vsock(tokio_vsock::VsockListener),
}

impl Listener {
    /// Listens on AF_VSOCK `port`, any context id; `option` chooses the transport, where it has to be.
    ///
    /// # Errors
    /// The system's.
    pub fn vsock(port: u32, option: Option<i32>) -> io::Result<Self> {
        if option.is_some() {
            return vsock::listener(port, option).map(Self::Vsock);
        }
        let any = tokio_vsock::VsockAddr::new(tokio_vsock::VMADDR_CID_ANY, port);
        tokio_vsock::VsockListener::bind(any).map(Self::Vsock)
    }

    /// The next connection. For the Unix form its CONNECT line is still to be read, with
    /// [`accept_line`]: that waits for the peer and must not hold up the next accept.
    ///
    /// # Errors
    /// The system's.
    pub async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Unix(listener) => listener.accept().await,
            Self::Vsock(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok(Accepted {
                    link: Box::new(stream),
                    port: None,
                    stranger: vsock::stranger(peer.cid()),
                })
            }
        }
    }
}

/// A connection that came in.
pub struct Accepted {
    pub(crate) link: BoxedLink,
    pub(crate) port: Option<u32>,
    /// The reason why the connection is not accepted.
    pub(crate) stranger: Option<String>,
}

/// Completes the accept: reads and answers the CONNECT line where there is one.
///
/// # Errors
/// `PermissionDenied` when it comes from elsewhere than the host, or from another user; `InvalidData` when the
/// line is another, or asks for another port.
pub async fn accept_line(accepted: Accepted) -> io::Result<BoxedLink> {
    if let Some(stranger) = accepted.stranger {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, stranger));
    }
    let mut link = accepted.link;
    if let Some(port) = accepted.port {
        unix::answer_connect(&mut link, port).await?;
    }
    Ok(link)
}
