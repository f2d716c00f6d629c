//! The server: listening sockets, clients, the store, and the loop that serves them.
//!
//! Everything runs on one thread. There are two epoll sets: `all` while the server may serve, and `control` (only the
//! agent and the other workload) while it may not, so that data from clients stays in their sockets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use kmorph_workload::arena::ArenaError;
use kmorph_workload::session::{Outcome, Session, SessionError};
use kmorph_workload::store::{Store, UnixMillis};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{SockFlag, accept4, setsockopt, sockopt};
use slab::Slab;

use crate::connection::{Connection, Fate};
use crate::info::Facts;

/// Interval between removals of expired keys, in milliseconds.
const TICK_MS: u16 = 100;
/// Maximum time for removing expired keys in one tick.
const EXPIRY_BUDGET: Duration = Duration::from_micros(500);
/// Number of buckets between two checks of the clock.
const EXPIRY_BUCKETS: u64 = 64;
/// Maximum number of connections accepted before clients get their turn.
const ACCEPTS_PER_TURN: usize = 64;
/// Maximum number of events per system call.
const EVENTS_PER_WAIT: usize = 256;
/// Maximum number of bytes per read from a client.
const READ_BYTES: usize = 64 << 10;

/// Maximum size of the buffers of all clients together, in bytes. A client that exceeds it is
/// disconnected; so the buffered data also fits into one connection table.
const MAX_BUFFERED_BYTES: usize = 512 << 20;

const AGENT: u64 = u64::MAX;
const PEER: u64 = u64::MAX - 1;
/// Listener `n` has this token plus `n`; connections have lower tokens.
const LISTENERS: u64 = 1 << 32;

/// Why the server ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// The store is damaged, or belongs to another process.
    #[error(transparent)]
    Store(#[from] ArenaError),
    /// The agent is gone or has fenced this process.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// An essential system call failed.
    #[error("{what}: {source}")]
    System {
        what: &'static str,
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(Errno) -> ServerError {
    move |errno| ServerError::System {
        what,
        source: errno.into(),
    }
}

#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) name: String,
    pub(crate) socket: OwnedFd,
}

/// The server without its session.
#[derive(Debug)]
pub(crate) struct Server {
    /// `None` in the target of a morph, until its state has arrived.
    pub(crate) store: Option<Store>,
    pub(crate) facts: Facts,
    pub(crate) connections: Slab<Connection>,
    pub(crate) listeners: Vec<Listener>,
    /// Connections to run without waiting for an event.
    pub(crate) ready: Vec<usize>,
    pub(crate) dirty_bytes_per_s: u64,
    /// Target: end of the memory that was populated before the freeze, in bytes.
    pub(crate) prefaulted: u64,
    next_client: u64,
    all: Epoll,
    control: Epoll,
    scratch: Vec<u8>,
    /// Number of bytes buffered for all clients.
    buffered: usize,
    /// Accepting is suspended until a connection closes.
    accept_paused: bool,
    last_tick: Instant,
    last_written: u64,
}

impl Server {
    pub(crate) fn new(facts: Facts) -> Result<Self, ServerError> {
        let epoll =
            || Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(system("creating an epoll set"));
        Ok(Self {
            store: None,
            facts,
            connections: Slab::new(),
            listeners: Vec::new(),
            ready: Vec::new(),
            dirty_bytes_per_s: 0,
            prefaulted: 0,
            next_client: 1,
            all: epoll()?,
            control: epoll()?,
            scratch: vec![0; READ_BYTES],
            buffered: 0,
            accept_paused: false,
            last_tick: Instant::now(),
            last_written: 0,
        })
    }

    /// Adds a listening socket of any family.
    pub(crate) fn add_listener(
        &mut self,
        name: String,
        socket: OwnedFd,
    ) -> Result<(), ServerError> {
        let flags =
            fcntl(&socket, FcntlArg::F_GETFL).map_err(system("asking a listener's flags"))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&socket, FcntlArg::F_SETFL(flags))
            .map_err(system("making a listener non-blocking"))?;
        let token = LISTENERS + self.listeners.len() as u64;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        self.all
            .add(&socket, event)
            .map_err(system("waiting on a listening socket"))?;
        self.listeners.push(Listener { name, socket });
        Ok(())
    }

    /// Adds a connection; its client's events are handled once the server serves.
    pub(crate) fn add_connection(&mut self, mut connection: Connection) -> Result<usize, Errno> {
        self.next_client = self.next_client.max(connection.client.id + 1);
        let entry = self.connections.vacant_entry();
        let key = entry.key();
        connection.interest = interest(&connection);
        let event = EpollEvent::new(connection.interest, key as u64);
        self.all.add(connection.socket(), event)?;
        self.buffered += connection.buffered();
        entry.insert(connection);
        self.facts.clients = self.connections.len();
        Ok(key)
    }

    pub(crate) fn close_all(&mut self) {
        self.connections.clear();
        self.buffered = 0;
        self.ready.clear();
        self.facts.clients = 0;
    }

    /// Serves until it is told to exit.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(crate) fn run(&mut self, mut session: Option<Session>) -> Result<(), ServerError> {
        if let Some(session) = &session {
            self.watch(session.agent_fd(), AGENT)?;
        }
        let mut events = [EpollEvent::empty(); EVENTS_PER_WAIT];
        loop {
            let serving = session.as_ref().is_none_or(Session::may_serve);
            let count = self.wait(&mut events, serving)?;
            let events = &events[..count];
            if let Some(session) = &mut session {
                if self.on_control(events, session)? == Outcome::Exit {
                    return Ok(());
                }
                if let Some(peer) = session.peer_fd() {
                    self.watch(peer, PEER)?;
                }
                if !session.may_serve() {
                    continue;
                }
            }
            if serving {
                self.on_clients(events)?;
            }
        }
    }

    fn wait(&self, events: &mut [EpollEvent], serving: bool) -> Result<usize, ServerError> {
        let result = if !serving {
            self.control.wait(events, EpollTimeout::NONE)
        } else if self.ready.is_empty() {
            self.all.wait(events, EpollTimeout::from(TICK_MS))
        } else {
            self.all.wait(events, EpollTimeout::ZERO)
        };
        match result {
            Err(Errno::EINTR) => Ok(0),
            other => other.map_err(system("waiting for events")),
        }
    }

    /// Adds a descriptor to both sets. A descriptor that is in a set already stays.
    fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), ServerError> {
        for set in [&self.all, &self.control] {
            match set.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(system("waiting on the agent")(errno)),
            }
        }
        Ok(())
    }

    fn on_control(
        &mut self,
        events: &[EpollEvent],
        session: &mut Session,
    ) -> Result<Outcome, ServerError> {
        for event in events {
            let outcome = match event.data() {
                AGENT => session.on_agent(self)?,
                PEER => session.on_peer(self)?,
                _ => Outcome::Continue,
            };
            if outcome == Outcome::Exit {
                return Ok(outcome);
            }
        }
        Ok(Outcome::Continue)
    }

    fn on_clients(&mut self, events: &[EpollEvent]) -> Result<(), ServerError> {
        let now = unix_millis();
        for key in std::mem::take(&mut self.ready) {
            self.run_connection(key, now)?;
        }
        for event in events {
            match event.data() {
                AGENT | PEER => {}
                token if token >= LISTENERS => self.accept(token - LISTENERS),
                token => self.on_connection(token, event.events(), now)?,
            }
        }
        self.tick(now)
    }

    fn on_connection(
        &mut self,
        token: u64,
        events: EpollFlags,
        now: UnixMillis,
    ) -> Result<(), ServerError> {
        // An event for a connection that was closed earlier in this turn finds no connection, or a
        // new one with the same key, for which the read then finds no data.
        let Ok(key) = usize::try_from(token) else {
            return Ok(());
        };
        let Some(connection) = self.connections.get_mut(key) else {
            return Ok(());
        };
        if connection.wants_read() {
            let before = connection.buffered();
            let broken = !connection.read(&mut self.scratch);
            self.buffered = self.buffered + connection.buffered() - before;
            if broken {
                self.close(key);
                return Ok(());
            }
        } else if events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
            && !connection.wants_write()
        {
            self.close(key);
            return Ok(());
        }
        self.run_connection(key, now)
    }

    fn run_connection(&mut self, key: usize, now: UnixMillis) -> Result<(), ServerError> {
        let Some(connection) = self.connections.get_mut(key) else {
            return Ok(());
        };
        let Some(store) = &mut self.store else {
            return Ok(());
        };
        let (before, held) = (connection.interest, connection.buffered());
        let fate = connection.run(store, &mut self.facts, now)?;
        self.buffered = self.buffered + connection.buffered() - held;
        let greedy = self.buffered > MAX_BUFFERED_BYTES && connection.buffered() > 0;
        if greedy {
            let id = connection.client.id;
            eprintln!(
                "kmorph-kv: client {id} closed: more than {MAX_BUFFERED_BYTES} bytes are waiting"
            );
        }
        if fate == Fate::Close || greedy {
            self.close(key);
            return Ok(());
        }
        let wanted = interest(connection);
        if wanted != before {
            connection.interest = wanted;
            let mut event = EpollEvent::new(wanted, key as u64);
            self.all
                .modify(connection.socket(), &mut event)
                .map_err(system("waiting on a client"))?;
        }
        if fate == Fate::More {
            self.ready.push(key);
        }
        Ok(())
    }

    fn close(&mut self, key: usize) {
        if let Some(connection) = self.connections.try_remove(key) {
            self.buffered -= connection.buffered();
        }
        self.facts.clients = self.connections.len();
        if self.accept_paused {
            self.accept_paused = false;
            self.set_listeners(EpollFlags::EPOLLIN);
        }
    }

    fn accept(&mut self, listener: u64) {
        for _ in 0..ACCEPTS_PER_TURN {
            let at = usize::try_from(listener).unwrap_or(usize::MAX);
            let Some(listener) = self.listeners.get(at) else {
                return;
            };
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let socket = match accept4(listener.socket.as_raw_fd(), flags) {
                // SAFETY: accept4 has just created this descriptor, and no other code knows its number.
                Ok(raw) => unsafe { OwnedFd::from_raw_fd(raw) },
                Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => {
                    // Until a client disconnects: waiting clients stay in the backlog.
                    self.accept_paused = true;
                    self.set_listeners(EpollFlags::empty());
                    return;
                }
                Err(_) => return,
            };
            self.welcome(socket);
        }
    }

    fn welcome(&mut self, socket: OwnedFd) {
        if self.connections.len() >= self.facts.max_clients {
            let _ = nix::unistd::write(&socket, b"-ERR max number of clients reached\r\n");
            return;
        }
        // AF_VSOCK and AF_UNIX refuse this option, which they do not need.
        let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
        self.facts.accepted += 1;
        let connection = Connection::new(socket, self.next_client);
        if let Err(errno) = self.add_connection(connection) {
            eprintln!("kmorph-kv: a client was rejected: waiting on its socket: {errno}");
        }
    }

    fn set_listeners(&self, flags: EpollFlags) {
        for (token, listener) in (LISTENERS..).zip(&self.listeners) {
            let mut event = EpollEvent::new(flags, token);
            if let Err(errno) = self.all.modify(&listener.socket, &mut event) {
                eprintln!("kmorph-kv: waiting on listener {}: {errno}", listener.name);
            }
        }
    }

    fn tick(&mut self, now: UnixMillis) -> Result<(), ServerError> {
        let elapsed = self.last_tick.elapsed();
        let Some(store) = &mut self.store else {
            return Ok(());
        };
        if elapsed < Duration::from_millis(TICK_MS.into()) {
            return Ok(());
        }
        let written = store.written_bytes();
        let millis = u64::try_from(elapsed.as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        let rate = written.wrapping_sub(self.last_written).saturating_mul(1000) / millis;
        self.dirty_bytes_per_s = self.dirty_bytes_per_s / 8 * 7 + rate / 8;
        self.last_written = written;
        let begin = Instant::now();
        let mut looked = 0;
        // One pass over all buckets is enough, even if time remains.
        while begin.elapsed() < EXPIRY_BUDGET && looked < store.keys()?.max(EXPIRY_BUCKETS) {
            store.expire_some(EXPIRY_BUCKETS, now)?;
            looked += EXPIRY_BUCKETS;
        }
        self.last_tick = Instant::now();
        Ok(())
    }
}

fn interest(connection: &Connection) -> EpollFlags {
    let mut flags = EpollFlags::empty();
    flags.set(EpollFlags::EPOLLIN, connection.wants_read());
    flags.set(EpollFlags::EPOLLOUT, connection.wants_write());
    flags
}

/// Returns milliseconds since the Unix epoch.
pub(crate) fn unix_millis() -> UnixMillis {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}
