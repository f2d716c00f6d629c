//! The agent's end of the handover socket, for tokio.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::message::{FailureCode, PROTOCOL_VERSION, Reply, Request, Role};
use super::{HandoverError, Incoming, PacketSocket};

/// Why a request to a workload failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentEndError {
    /// The socket failed: the workload is gone or does not speak this protocol.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The workload refused.
    #[error("the workload refused ({code:?}): {text}")]
    Refused {
        /// The cause.
        code: FailureCode,
        /// The workload's message.
        text: String,
    },
    /// The workload did not answer in time.
    #[error("the workload did not answer {request} within {after:?}")]
    Timeout {
        /// The request.
        request: String,
        /// The deadline.
        after: Duration,
    },
    /// The workload has another protocol version, or its first message was not `Register`.
    #[error("the workload did not register: it sent {0}")]
    NotRegistered(String),
}

/// The agent's end: sends requests and receives replies.
#[derive(Debug)]
pub struct AgentEnd {
    socket: AsyncFd<PacketSocket>,
    next_id: u32,
}

impl AgentEnd {
    /// Takes the descriptor that [`super::attach`] returned. Needs a tokio runtime.
    ///
    /// # Errors
    /// The system's error.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = PacketSocket::new(fd)?;
        // SAFETY: the socket owns its descriptor, never replaces it, and closes it only when it is
        // dropped, which `AsyncFd` does after it has deregistered the descriptor.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        Ok(Self { socket, next_id: 1 })
    }

    /// Waits for the workload to register, and answers it. Returns its `Register`.
    ///
    /// # Errors
    /// [`AgentEndError::NotRegistered`], [`AgentEndError::Timeout`], or the socket's error.
    pub async fn register(
        &mut self,
        role: Role,
        instance: &str,
        generation: u64,
        kernel_release: &str,
        within: Duration,
    ) -> Result<Reply, AgentEndError> {
        let timeout = || AgentEndError::Timeout {
            request: "its start by registering".to_owned(),
            after: within,
        };
        let first = tokio::time::timeout(within, self.receive())
            .await
            .map_err(|_| timeout())??;
        match &first.message {
            Reply::Register { protocol, .. } if *protocol == PROTOCOL_VERSION => {}
            other => return Err(AgentEndError::NotRegistered(format!("{other:?}"))),
        }
        let answer = Request::Registered {
            protocol: PROTOCOL_VERSION,
            role,
            instance: instance.to_owned(),
            generation,
            kernel_release: kernel_release.to_owned(),
        };
        self.send(&answer, &[], &[]).await?;
        Ok(first.message)
    }

    /// Sends a request and returns its id. Waits while the socket is full.
    ///
    /// # Errors
    /// The socket's error.
    pub async fn send(
        &mut self,
        request: &Request,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<u32, AgentEndError> {
        let id = self.next_id;
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                into_io(socket.send(id, request, data, fds))
            })
            .await
            .map_err(from_io)?;
        Ok(id)
    }

    /// Receives the next reply, to any request. Cancel-safe.
    ///
    /// # Errors
    /// The socket's error; [`HandoverError::Closed`] if the workload is gone.
    pub async fn receive(&mut self) -> Result<Incoming<Reply>, AgentEndError> {
        self.socket
            .async_io_mut(Interest::READABLE, |socket| into_io(socket.receive()))
            .await
            .map_err(from_io)
    }

    /// Sends a request and waits for its reply. Drops replies to requests that were given up earlier.
    ///
    /// # Errors
    /// [`AgentEndError::Refused`] for a `Failed` reply, [`AgentEndError::Timeout`], or the socket's error.
    pub async fn request(
        &mut self,
        request: &Request,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<Incoming<Reply>, AgentEndError> {
        let exchange = async {
            let id = self.send(request, data, fds).await?;
            loop {
                let incoming = self.receive().await?;
                if incoming.id == id {
                    return Ok::<_, AgentEndError>(incoming);
                }
            }
        };
        let incoming = tokio::time::timeout(within, exchange).await.map_err(|_| {
            AgentEndError::Timeout {
                request: format!("{request:?}"),
                after: within,
            }
        })??;
        match incoming.message {
            Reply::Failed { code, text } => Err(AgentEndError::Refused { code, text }),
            _ => Ok(incoming),
        }
    }
}

fn into_io<T>(result: Result<T, HandoverError>) -> io::Result<T> {
    result.map_err(|error| match error {
        HandoverError::System { ref source, .. } if source.kind() == io::ErrorKind::WouldBlock => {
            io::ErrorKind::WouldBlock.into()
        }
        other => io::Error::other(other),
    })
}

fn from_io(error: io::Error) -> AgentEndError {
    match error.downcast::<HandoverError>() {
        Ok(error) => error.into(),
        Err(source) => HandoverError::System {
            what: "waiting",
            source,
        }
        .into(),
    }
}
