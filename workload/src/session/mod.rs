//! The workload's end of the handover socket: tracks the phases and calls the provider.
//!
//! ```text
//!   Role::Serve:    Serving ⇄ Exporting ── Freeze ──▶ Frozen ── Retire ──▶ Retired
//!                      ▲─────────── Resume ─────────────┘
//!   Role::Standby:  Standby ── Activate ──▶ Activated ── Serve ──▶ Serving
//! ```
//!
//! Invariants:
//! - a request that the phase does not permit changes nothing and gets `WrongPhase`;
//! - when the agent's end closes, the process exits: an instance without its agent is dead, and a workload that kept
//!   answering would be a second owner;
//! - a `Fenced` reply is the last one.

mod import;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use crate::handover::message::{
    FailureCode, Item, Mode, PROTOCOL_VERSION, PeerMessage, Phase, Reply, Request, Role, Status,
};
use crate::handover::{
    AGENT_FD_ENV, HandoverError, Incoming, MAX_CHUNK_BYTES, MAX_CONNECTIONS, MAX_FDS_PER_PACKET,
    PacketSocket, table,
};
use crate::provider::{OutgoingItem, Provider, ProviderError};
use import::Import;

/// Maximum time for the agent's answer to the registration.
const REGISTER_TIMEOUT_MS: u16 = 10_000;
/// Maximum wait for a full socket before its reader counts as dead.
const SEND_TIMEOUT_MS: u16 = 2_000;
/// Maximum number of packets per call, so that clients get their turn.
const PACKETS_PER_TURN: usize = 16;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The descriptor named in the environment is unusable.
    #[error("{AGENT_FD_ENV} is {value:?}: {reason}")]
    Environment {
        /// The variable's value.
        value: String,
        /// The reason.
        reason: String,
    },
    /// The agent has another protocol version, or its answer was not `Registered`.
    #[error("the agent did not accept the registration: {0}")]
    Registration(String),
    /// The socket failed or closed: the agent is gone.
    #[error("the agent is gone: {0}")]
    Agent(#[from] HandoverError),
    /// The state now belongs to another process.
    #[error("fenced: {0}")]
    Fenced(String),
}

/// The consequence for the workload's loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Continue.
    Continue,
    /// Exit with status 0 without touching shared state.
    Exit,
}

/// The agent's information about this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// The role of the process.
    pub role: Role,
    /// Name of the instance.
    pub instance: String,
    /// Generation of the instance.
    pub generation: u64,
    /// Release of the instance's kernel.
    pub kernel_release: String,
}

/// The workload's end of the handover socket.
#[derive(Debug)]
pub struct Session {
    agent: PacketSocket,
    peer: Option<PacketSocket>,
    phase: Phase,
    mode: Mode,
    import: Import,
}

impl Session {
    /// Returns the session of a process that an agent has started; `None` without an agent.
    ///
    /// # Safety
    /// Call this at most once, before any other code takes the descriptor by its number.
    ///
    /// # Errors
    /// [`SessionError::Environment`].
    pub unsafe fn from_env() -> Result<Option<Self>, SessionError> {
        let Some(value) = std::env::var_os(AGENT_FD_ENV) else {
            return Ok(None);
        };
        let value = value.to_string_lossy().into_owned();
        let bad = |reason: &str| SessionError::Environment {
            value: value.clone(),
            reason: reason.to_owned(),
        };
        let number: RawFd = value.parse().map_err(|_| bad("not a descriptor"))?;
        if number < 3 {
            return Err(bad("a standard stream"));
        }
        // SAFETY: only borrowed to check whether it is open; `fcntl` returns EBADF if it is not.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        let cloexec = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
        nix::fcntl::fcntl(borrowed, cloexec).map_err(|errno| bad(errno.desc()))?;
        // SAFETY: it is open, as just checked, and the caller guarantees that no other code owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        Ok(Some(
            Self::new(fd).map_err(|error| bad(&error.to_string()))?,
        ))
    }

    /// Creates a session over a connected socket.
    ///
    /// # Errors
    /// The system's error.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            agent: PacketSocket::new(fd)?,
            peer: None,
            phase: Phase::Standby,
            mode: Mode::ByReference,
            import: Import::default(),
        })
    }

    /// Registers the workload and waits for the answer.
    ///
    /// # Errors
    /// [`SessionError::Registration`], [`SessionError::Agent`].
    pub fn register(&mut self, provider: &impl Provider) -> Result<Registration, SessionError> {
        let about = provider.describe();
        let register = Reply::Register {
            protocol: PROTOCOL_VERSION,
            name: about.name,
            version: about.version,
            pid: std::process::id(),
            state_kinds: about.state_kinds,
            modes: about.modes,
        };
        self.reply(0, &register, &[])?;
        if !wait(self.agent.as_fd(), PollFlags::POLLIN, REGISTER_TIMEOUT_MS) {
            let text = format!("no answer within {REGISTER_TIMEOUT_MS} ms");
            return Err(SessionError::Registration(text));
        }
        match self.agent.receive::<Request>()?.message {
            Request::Registered {
                protocol: PROTOCOL_VERSION,
                role,
                instance,
                generation,
                kernel_release,
            } => {
                self.phase = match role {
                    Role::Serve => Phase::Serving,
                    Role::Standby => Phase::Standby,
                };
                Ok(Registration {
                    role,
                    instance,
                    generation,
                    kernel_release,
                })
            }
            other => Err(SessionError::Registration(format!("{other:?}"))),
        }
    }

    /// Returns the socket to the agent: call [`Session::on_agent`] when it is readable.
    #[must_use]
    pub fn agent_fd(&self) -> BorrowedFd<'_> {
        self.agent.as_fd()
    }

    /// Returns the peer channel, if there is one: call [`Session::on_peer`] when it is readable.
    /// [`Session::on_agent`] and [`Session::on_peer`] may open and close it.
    #[must_use]
    pub fn peer_fd(&self) -> Option<BorrowedFd<'_>> {
        self.peer.as_ref().map(AsFd::as_fd)
    }

    /// Returns the current phase of the workload.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Returns whether clients may be answered now.
    #[must_use]
    pub fn may_serve(&self) -> bool {
        matches!(self.phase, Phase::Serving | Phase::Exporting)
    }

    /// Handles the available messages of the agent. Does not wait for more.
    ///
    /// # Errors
    /// The process must exit on each error: see [`SessionError`].
    pub fn on_agent(&mut self, provider: &mut impl Provider) -> Result<Outcome, SessionError> {
        for _ in 0..PACKETS_PER_TURN {
            let incoming = match self.agent.receive::<Request>() {
                Ok(incoming) => incoming,
                Err(error) if error.would_block() => break,
                Err(error) => return Err(error.into()),
            };
            if self.answer(incoming, provider)? == Outcome::Exit {
                return Ok(Outcome::Exit);
            }
        }
        Ok(Outcome::Continue)
    }

    fn answer(
        &mut self,
        incoming: Incoming<Request>,
        provider: &mut impl Provider,
    ) -> Result<Outcome, SessionError> {
        let id = incoming.id;
        let begin = Instant::now();
        match self.perform(incoming, provider, begin) {
            Ok(Some(reply)) => {
                self.reply(id, &reply, &[])?;
                let retired = self.phase == Phase::Retired;
                Ok(if retired {
                    Outcome::Exit
                } else {
                    Outcome::Continue
                })
            }
            Ok(None) => Ok(Outcome::Continue),
            Err(ProviderError { code, text }) => {
                let fenced = (code == FailureCode::Fenced).then(|| text.clone());
                self.reply(id, &Reply::Failed { code, text }, &[])?;
                fenced.map_or(Ok(Outcome::Continue), |text| {
                    Err(SessionError::Fenced(text))
                })
            }
        }
    }

    /// Carries out a request. `None`: the reply was already sent, or follows later.
    fn perform(
        &mut self,
        incoming: Incoming<Request>,
        provider: &mut impl Provider,
        begin: Instant,
    ) -> Result<Option<Reply>, ProviderError> {
        let Incoming {
            id,
            message,
            data,
            fds,
        } = incoming;
        Ok(Some(match message {
            Request::Registered { .. } => return Err(self.wrong_phase("Registered")),
            Request::Query => Reply::Status(self.status(provider)),
            Request::PrepareExport { mode } => self.prepare_export(mode, fds, provider)?,
            Request::ReadDirty { max_bytes } => {
                return self.read_dirty(id, max_bytes, provider).map(|()| None);
            }
            Request::Freeze => self.freeze(provider, begin)?,
            Request::Resume => self.resume(provider)?,
            Request::Retire => {
                self.phase = Phase::Retired;
                Reply::Retired
            }
            Request::PrepareImport { mode, total_len } => {
                self.allow(&[Phase::Standby], "PrepareImport")?;
                self.mode = mode;
                self.import = Import::default();
                self.peer = peer_channel(mode, fds)?;
                provider.prepare_import(mode, total_len)?;
                if mode == Mode::Rounds {
                    Reply::ImportReady {
                        prefaulted_bytes: 0,
                    }
                } else {
                    self.import.waiting = Some(id);
                    return Ok(None);
                }
            }
            Request::Apply { section, offset } => {
                self.allow(&[Phase::Standby], "Apply")?;
                provider.apply(section, offset, &data)?;
                Reply::Applied
            }
            Request::Validate { budget_us } => {
                self.allow(&[Phase::Standby, Phase::Activated], "Validate")?;
                let frozen = self.import.frozen.is_some();
                let checks = provider.validate(frozen, micros(budget_us));
                let passed = checks.iter().all(|check| check.passed);
                Reply::Validated { passed, checks }
            }
            Request::Activate { nonce, budget_us } => {
                self.allow(&[Phase::Standby], "Activate")?;
                self.await_frozen(provider)?;
                let state = provider.activate(self.import.frozen, micros(budget_us))?;
                self.phase = Phase::Activated;
                Reply::Activated {
                    nonce,
                    state,
                    connections: provider.figures().connections,
                }
            }
            Request::Serve => {
                self.allow(&[Phase::Activated], "Serve")?;
                provider.serve()?;
                self.phase = Phase::Serving;
                self.peer = None;
                let elapsed_us = elapsed_us(begin);
                Reply::Serving { elapsed_us }
            }
        }))
    }

    fn prepare_export(
        &mut self,
        mode: Mode,
        fds: Vec<OwnedFd>,
        provider: &mut impl Provider,
    ) -> Result<Reply, ProviderError> {
        self.allow(&[Phase::Serving, Phase::Exporting], "PrepareExport")?;
        let peer = peer_channel(mode, fds)?;
        let size = provider.prepare_export(mode)?;
        self.mode = mode;
        self.peer = peer;
        self.phase = Phase::Exporting;
        if let Some(peer) = &self.peer {
            let items: Vec<(Item, BorrowedFd<'_>)> = provider
                .items()
                .into_iter()
                .map(|item| match item {
                    OutgoingItem::Memory { name, len, fd } => (Item::Memory { name, len }, fd),
                    OutgoingItem::File { name, fd } => (Item::File { name }, fd),
                    OutgoingItem::Listener { name, fd } => (Item::Listener { name }, fd),
                })
                .collect();
            send_items(peer, &items)?;
            send_peer(peer, &PeerMessage::EndOfEarly, &[])?;
        }
        Ok(Reply::Prepared {
            total_len: size.total_len,
            dirty_bytes: size.dirty_bytes,
        })
    }

    fn read_dirty(
        &mut self,
        id: u32,
        max_bytes: u32,
        provider: &mut impl Provider,
    ) -> Result<(), ProviderError> {
        self.allow(&[Phase::Exporting, Phase::Frozen], "ReadDirty")?;
        let max = usize::try_from(max_bytes).unwrap_or(MAX_CHUNK_BYTES);
        // The chunk borrows the provider, so ask first for the number of bytes that will be left.
        let before = provider.dirty_bytes();
        let chunk = provider.read_dirty(max.min(MAX_CHUNK_BYTES))?;
        let (section, offset, bytes) = match &chunk {
            Some(chunk) => (chunk.section, chunk.offset, chunk.bytes),
            None => (0, 0, &[][..]),
        };
        let reply = Reply::Chunk {
            section,
            offset,
            dirty_bytes: before.saturating_sub(bytes.len() as u64),
        };
        send(&self.agent, id, &reply, bytes, &[])
            .map_err(|error| ProviderError::new(FailureCode::System, error.to_string()))
    }

    fn freeze(
        &mut self,
        provider: &mut impl Provider,
        begin: Instant,
    ) -> Result<Reply, ProviderError> {
        self.allow(&[Phase::Exporting], "Freeze")?;
        if self.mode == Mode::ByReference && self.peer.is_none() {
            let text = "the peer channel is closed: prepare the export again";
            return Err(ProviderError::new(FailureCode::Peer, text));
        }
        let state = provider.freeze()?;
        self.phase = Phase::Frozen;
        let sent = match &self.peer {
            None => Ok(0),
            Some(peer) => send_connections(peer, provider).and_then(|connections| {
                let frozen = PeerMessage::Frozen { state, connections };
                send_peer(peer, &frozen, &[]).map(|()| connections)
            }),
        };
        match sent {
            Ok(connections) => Ok(Reply::Frozen {
                state,
                dirty_bytes: provider.dirty_bytes(),
                connections,
                elapsed_us: elapsed_us(begin),
            }),
            Err(error) => {
                self.resume(provider)?;
                Err(error)
            }
        }
    }

    fn resume(&mut self, provider: &mut impl Provider) -> Result<Reply, ProviderError> {
        let allowed = [Phase::Serving, Phase::Exporting, Phase::Frozen];
        self.allow(&allowed, "Resume")?;
        if self.phase != Phase::Serving {
            provider.resume()?;
        }
        self.phase = Phase::Serving;
        if let Some(peer) = self.peer.take() {
            // The peer may be dead, which may be the reason for this resume; then no process receives the message.
            let _ = send_peer(&peer, &PeerMessage::Resumed, &[]);
        }
        Ok(Reply::Resumed)
    }

    fn status(&self, provider: &impl Provider) -> Status {
        let figures = provider.figures();
        let about = provider.describe();
        Status {
            phase: self.phase,
            state_bytes: figures.state_bytes,
            used_bytes: figures.used_bytes,
            dirty_bytes_per_s: figures.dirty_bytes_per_s,
            connections: figures.connections,
            items: figures.items,
            requests: figures.requests,
            state_kinds: about.state_kinds,
            modes: about.modes,
        }
    }

    fn allow(&self, phases: &[Phase], request: &str) -> Result<(), ProviderError> {
        if phases.contains(&self.phase) {
            Ok(())
        } else {
            Err(self.wrong_phase(request))
        }
    }

    fn wrong_phase(&self, request: &str) -> ProviderError {
        let text = format!("{request} is not allowed while {:?}", self.phase);
        ProviderError::new(FailureCode::WrongPhase, text)
    }

    fn reply(&self, id: u32, reply: &Reply, data: &[u8]) -> Result<(), HandoverError> {
        send(&self.agent, id, reply, data, &[])
    }
}

fn peer_channel(mode: Mode, fds: Vec<OwnedFd>) -> Result<Option<PacketSocket>, ProviderError> {
    let bad = |text: &str| ProviderError::new(FailureCode::BadRequest, text);
    match (mode, <[OwnedFd; 1]>::try_from(fds)) {
        (Mode::Rounds, Err(fds)) if fds.is_empty() => Ok(None),
        (Mode::Rounds, _) => Err(bad("rounds take no peer channel")),
        (Mode::ByReference, Ok([fd])) => PacketSocket::new(fd)
            .map(Some)
            .map_err(|error| bad(&error.to_string())),
        (Mode::ByReference, Err(_)) => {
            Err(bad("by_reference takes one descriptor: the peer channel"))
        }
    }
}

fn send_connections(peer: &PacketSocket, provider: &impl Provider) -> Result<u32, ProviderError> {
    let connections = provider.connections();
    let system = |error: io::Error| ProviderError::new(FailureCode::System, error.to_string());
    if connections.len() > MAX_CONNECTIONS {
        let text = format!(
            "{} connections, at most {MAX_CONNECTIONS} move",
            connections.len()
        );
        return Err(ProviderError::new(FailureCode::Unsupported, text));
    }
    let count = u32::try_from(connections.len()).unwrap_or(u32::MAX);
    let entries = connections
        .iter()
        .map(|connection| (&connection.state[..], connection.input, connection.output));
    let (fd, len) = table::write(entries).map_err(system)?;
    let first = (Item::ConnectionTable { count, len }, fd.as_fd());
    let rest = (0..count)
        .zip(&connections)
        .map(|(index, connection)| (Item::Connection { index }, connection.fd));
    let items: Vec<_> = std::iter::once(first).chain(rest).collect();
    send_items(peer, &items)?;
    Ok(count)
}

fn send_items(peer: &PacketSocket, items: &[(Item, BorrowedFd<'_>)]) -> Result<(), ProviderError> {
    for batch in items.chunks(MAX_FDS_PER_PACKET) {
        let (items, fds): (Vec<Item>, Vec<BorrowedFd<'_>>) = batch.iter().cloned().unzip();
        send_peer(peer, &PeerMessage::Part { items }, &fds)?;
    }
    Ok(())
}

fn send_peer(
    peer: &PacketSocket,
    message: &PeerMessage,
    fds: &[BorrowedFd<'_>],
) -> Result<(), ProviderError> {
    send(peer, 0, message, &[], fds).map_err(|error| {
        let text = format!("sending state to the other workload: {error}");
        ProviderError::new(FailureCode::Peer, text)
    })
}

/// Sends a packet; waits for a full socket for at most [`SEND_TIMEOUT_MS`].
fn send<T: Serialize>(
    socket: &PacketSocket,
    id: u32,
    message: &T,
    data: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), HandoverError> {
    loop {
        match socket.send(id, message, data, fds) {
            Err(error)
                if error.would_block()
                    && wait(socket.as_fd(), PollFlags::POLLOUT, SEND_TIMEOUT_MS) => {}
            other => return other,
        }
    }
}

/// Waits until the socket is ready. Returns `false` after the timeout.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags, timeout_ms: u16) -> bool {
    let deadline = Instant::now() + Duration::from_millis(timeout_ms.into());
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(fd, flags)], left) {
            Err(nix::errno::Errno::EINTR) => {}
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}

fn micros(us: u32) -> Duration {
    Duration::from_micros(us.into())
}

fn elapsed_us(begin: Instant) -> u32 {
    u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX)
}
