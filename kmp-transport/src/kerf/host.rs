//! The host as a peer: connections from this process to ports of guests, over the rings.
//!
//! ```text
//!  HostStream ─┐                        ┌─ doorbell, or 100 ms
//!  HostStream ─┼─ State (one mutex) ────┤
//!  connect() ──┘   links, connections   └─ the pump: receives packets, wakes streams, sends queued data
//! ```
//!
//! Streams write to the ring themselves; only the pump reads from it. The host listens on no port: a guest that
//! connects is refused.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use kmorph_kerf_ring::layout::PACKET_MAX;
use kmorph_kerf_ring::{Class, Link, LinkEvent, Mapped, PutError, Region};
use nix::sys::eventfd::EventFd;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::task::JoinHandle;

use super::connection::{Connection, Ending, Stage};
use super::doorbell::{DoorbellServer, HOST};
use super::packet::{HEADER_BYTES, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Interrupts with which guests can ring this side.
const VECTORS: u32 = 1;
/// The CID of peer 0; the others follow.
const CID_BASE: u32 = 2;
/// How often guests are looked at without a doorbell.
const SCAN: Duration = Duration::from_millis(100);
/// Packets that one round takes from one guest before others get their turn.
const BUDGET_PACKETS: usize = 64;
/// Control packets that wait for room in one guest's ring. More are of a guest that takes none of its
/// answers: they are dropped.
const WAITING_MAX: usize = 1024;
/// Connections at once, to all guests.
const CONNECTIONS_MAX: usize = 4096;
/// The first port of this side.
const FIRST_PORT: u32 = 0x4000_0000;
/// Longest payload of a packet.
const PAYLOAD_MAX: usize = PACKET_MAX as usize - HEADER_BYTES;

/// A peer and the port of this side: what tells connections apart.
type Key = (u32, u32);

/// This process as a peer of the guests.
#[derive(Debug)]
pub struct Host {
    shared: Arc<Shared>,
    pump: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    server: DoorbellServer,
    /// This side's own, as peer [`HOST`].
    generation: u32,
    /// Start of the links' time.
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    guests: BTreeMap<u32, Guest>,
    connections: BTreeMap<Key, Connection>,
    /// Connections for which packets have come in this round: at most [`BUDGET_PACKETS`].
    touched: Vec<Key>,
    next_port: u32,
    /// This side has left.
    ended: bool,
}

#[derive(Debug)]
struct Guest {
    link: Link,
    waiting: VecDeque<Header>,
    /// A sender found the ring corrupt: the pump is to judge.
    suspect: bool,
}

/// The result of a round of the pump.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    Idle,
    More,
}

impl Host {
    /// Attaches to the server's memory as peer [`HOST`]. Inside a tokio runtime. Once for each server.
    ///
    /// # Errors
    /// If the system has no descriptor for the doorbell.
    pub fn new(server: DoorbellServer) -> io::Result<Self> {
        // SAFETY: the eventfd owns its descriptor, and is neither replaced nor closed while it is watched.
        let bell = unsafe { AsyncFd::register_with_interest(server.bell()?, Interest::READABLE) }?;
        let generation = server.region().attach(HOST, VECTORS);
        let peers = 1..server.region().geometry().peers();
        let guest = |peer| Guest {
            link: Link::new(HOST, peer, generation),
            waiting: VecDeque::new(),
            suspect: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                guests: peers.clone().map(|peer| (peer, guest(peer))).collect(),
                connections: BTreeMap::new(),
                touched: Vec::with_capacity(BUDGET_PACKETS),
                next_port: FIRST_PORT,
                ended: false,
            }),
            generation,
            started: Instant::now(),
            server,
        });
        for peer in peers {
            shared.server.ring(peer, HOST);
        }
        let pump = tokio::spawn(pump(shared.clone(), bell));
        Ok(Self { shared, pump })
    }

    /// Whether the kernel of the guest `peer` is linked: a connection to it can be tried.
    pub fn is_linked(&self, peer: u32) -> bool {
        let state = self.shared.state();
        state.guests.get(&peer).is_some_and(|g| g.link.is_up())
    }

    /// Connects to `port` of the guest `peer`. Waits for its kernel's answer, without a deadline of its
    /// own.
    ///
    /// # Errors
    /// `NotConnected`: the guest's kernel is not linked (yet). `ConnectionReset`: its kernel refused.
    /// `ConnectionAborted`: it went away meanwhile. `QuotaExceeded`: too many connections.
    pub async fn connect(&self, peer: u32, port: u32) -> io::Result<HostStream> {
        let stream = self.shared.begin(peer, port)?;
        std::future::poll_fn(|context| {
            let mut state = self.shared.state();
            let connection = state.connection(stream.key)?;
            match connection.stage {
                Stage::Open => Poll::Ready(Ok(())),
                Stage::Over(ending) => Poll::Ready(Err(ending.error())),
                Stage::Connecting => {
                    connection.reader = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await?;
        Ok(stream)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.pump.abort();
        let mut state = self.shared.state();
        for peer in state.guests.keys().copied().collect::<Vec<_>>() {
            state.lose(peer);
        }
        state.ended = true;
        self.shared.region().detach(HOST);
        for peer in state.guests.keys() {
            self.shared.server.ring(*peer, HOST);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is consistent at every moment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn region(&self) -> &Region<Mapped> {
        self.server.region()
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// States again that this side is there, where a guest has written over it.
    fn restate(&self) {
        // The pump may still be in a round when this side leaves.
        if !self.state().ended {
            self.region().restate(HOST, self.generation, VECTORS);
        }
    }

    fn begin(self: &Arc<Self>, peer: u32, port: u32) -> io::Result<HostStream> {
        let mut state = self.state();
        let up = state.guests.get(&peer).is_some_and(|g| g.link.is_up());
        if !up {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if state.connections.len() >= CONNECTIONS_MAX {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let key = state.free_key(peer);
        state.connections.insert(key, Connection::new(port));
        self.control(&mut state, key, Op::Request, 0);
        drop(state);
        Ok(HostStream {
            shared: self.clone(),
            key,
        })
    }

    /// Sends a packet without payload, for a connection that is there.
    fn control(&self, state: &mut State, key: Key, op: Op, flags: u32) {
        if let Some(header) = state.header(key, op, flags, 0) {
            self.send(state, key.0, header);
        }
    }

    /// Sends a control packet, or keeps it until there is room.
    fn send(&self, state: &mut State, peer: u32, header: Header) {
        let Some(guest) = state.guests.get_mut(&peer) else {
            return;
        };
        if guest.waiting.len() < WAITING_MAX {
            guest.waiting.push_back(header);
        }
        self.flush(guest);
    }

    /// Sends what waits.
    fn flush(&self, guest: &mut Guest) {
        let memory = self.region().memory();
        let Some((tx, _)) = guest.link.rings() else {
            return;
        };
        let mut sent = false;
        while let Some(header) = guest.waiting.front() {
            let bytes = header.encode();
            let mut put = tx.put(memory, &[&bytes], Class::Control);
            if put == Err(PutError::Full) {
                tx.want_room(memory);
                put = tx.put(memory, &[&bytes], Class::Control);
            }
            if let Err(error) = put {
                guest.suspect |= matches!(error, PutError::Corrupt(_));
                break;
            }
            sent = true;
            guest.waiting.pop_front();
        }
        if sent && tx.must_ring(memory) {
            self.server.ring(guest.link.peer(), HOST);
        }
    }

    /// One look at one guest.
    fn round(&self, peer: u32, buffer: &mut Vec<u8>) -> Round {
        let mut state = self.state();
        let Some(guest) = state.guests.get_mut(&peer) else {
            return Round::Idle;
        };
        let event = guest.link.poll(self.region(), self.now());
        if guest.link.must_tell() {
            self.server.ring(peer, HOST);
        }
        match event {
            LinkEvent::Down => return Round::Idle,
            LinkEvent::Lost => {
                state.lose(peer);
                return Round::More;
            }
            LinkEvent::Up | LinkEvent::CameUp => {}
        }
        let memory = self.region().memory();
        if let Some((tx, rx)) = guest.link.rings() {
            rx.awake(memory);
            tx.has_room(memory);
        }
        self.flush(guest);
        if std::mem::take(&mut guest.suspect) {
            guest.link.corrupt(self.region(), self.now());
            state.lose(peer);
            return Round::More;
        }
        let taken = self.take(&mut state, peer, buffer);
        state.wake_touched();
        // There may be room again for who waited.
        state.wake(peer);
        taken
    }

    fn take(&self, state: &mut State, peer: u32, buffer: &mut Vec<u8>) -> Round {
        let memory = self.region().memory();
        for budget in (0..BUDGET_PACKETS).rev() {
            let Some(guest) = state.guests.get_mut(&peer) else {
                return Round::Idle;
            };
            let Some((_, rx)) = guest.link.rings() else {
                return Round::Idle;
            };
            buffer.clear();
            let mut taken = rx.take(memory, buffer);
            if taken == Ok(None) {
                rx.sleep(memory);
                taken = rx.take(memory, buffer);
            }
            match taken {
                Ok(None) => return Round::Idle,
                Ok(Some(_)) => {
                    if rx.must_ring(memory) {
                        self.server.ring(peer, HOST);
                    }
                    self.receive(state, peer, buffer);
                }
                Err(_) => {
                    guest.link.corrupt(self.region(), self.now());
                    state.lose(peer);
                    return Round::More;
                }
            }
            if budget == 0 {
                return Round::More;
            }
        }
        Round::More
    }

    fn receive(&self, state: &mut State, peer: u32, packet: &[u8]) {
        let Some((header, payload)) = Header::decode(packet) else {
            return;
        };
        let expected = (u64::from(CID_BASE + peer), u64::from(CID_BASE));
        if (header.src_cid, header.dst_cid) != expected {
            return;
        }
        let key = (peer, header.dst_port);
        let known = state.connections.get_mut(&key);
        match known.filter(|c| c.peer_port == header.src_port) {
            Some(connection) => {
                let answer = connection.receive(&header, payload);
                state.touched.push(key);
                if let Some(answer) = answer {
                    self.control(state, key, answer, 0);
                }
            }
            None if header.op != Op::Reset => {
                let refusal = Header {
                    src_cid: header.dst_cid,
                    dst_cid: header.src_cid,
                    src_port: header.dst_port,
                    dst_port: header.src_port,
                    len: 0,
                    op: Op::Reset,
                    flags: 0,
                    buf_alloc: 0,
                    fwd_cnt: 0,
                };
                self.send(state, peer, refusal);
            }
            None => {}
        }
    }

    /// Writes what credit and ring have room for; `None` when that is nothing now.
    fn write(&self, state: &mut State, key: Key, bytes: &[u8]) -> io::Result<Option<usize>> {
        let credit = state.connection(key)?.credit()?;
        let len = bytes.len().min(credit).min(PAYLOAD_MAX);
        if len == 0 {
            return Ok(None);
        }
        let Some(header) = state.header(key, Op::Data, 0, len) else {
            return Ok(None);
        };
        let memory = self.region().memory();
        let guest = state.guests.get_mut(&key.0);
        let Some(guest) = guest.filter(|g| g.waiting.is_empty()) else {
            return Ok(None);
        };
        let Some((tx, _)) = guest.link.rings() else {
            return Ok(None);
        };
        let head = header.encode();
        let parts = [&head[..], &bytes[..len]];
        let mut put = tx.put(memory, &parts, Class::Data);
        if put == Err(PutError::Full) {
            tx.want_room(memory);
            put = tx.put(memory, &parts, Class::Data);
        }
        if let Err(error) = put {
            guest.suspect |= matches!(error, PutError::Corrupt(_));
            return Ok(None);
        }
        if tx.must_ring(memory) {
            self.server.ring(key.0, HOST);
        }
        state.connection(key)?.sent(len);
        Ok(Some(len))
    }
}

impl State {
    fn connection(&mut self, key: Key) -> io::Result<&mut Connection> {
        let found = self.connections.get_mut(&key);
        found.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// A port of this side that no connection to `peer` has. There are more ports than connections.
    fn free_key(&mut self, peer: u32) -> Key {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.contains_key(&(peer, port)) {
                return (peer, port);
            }
        }
    }

    fn header(&mut self, key: Key, op: Op, flags: u32, len: usize) -> Option<Header> {
        let connection = self.connections.get_mut(&key)?;
        let (buf_alloc, fwd_cnt) = connection.tell();
        Some(Header {
            src_cid: CID_BASE.into(),
            dst_cid: u64::from(CID_BASE + key.0),
            src_port: key.1,
            dst_port: connection.peer_port,
            len: u32::try_from(len).ok()?,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        })
    }

    /// The link is gone: every connection over it has ended.
    fn lose(&mut self, peer: u32) {
        if let Some(guest) = self.guests.get_mut(&peer) {
            guest.waiting.clear();
            guest.suspect = false;
        }
        for (_, connection) in self.connections.range_mut((peer, 0)..=(peer, u32::MAX)) {
            connection.end(Ending::Lost);
        }
    }

    /// Wakes those for whom packets have come, those with the least to read first: a small message does not wait
    /// until the bulk of other connections has been moved on.
    fn wake_touched(&mut self) {
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        touched.sort_by_key(|key| self.connections.get(key).map_or(0, Connection::unread));
        for key in touched.drain(..) {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.wake();
            }
        }
        self.touched = touched;
    }

    fn wake(&mut self, peer: u32) {
        for (_, connection) in self.connections.range_mut((peer, 0)..=(peer, u32::MAX)) {
            if let Some(writer) = connection.writer.take() {
                writer.wake();
            }
        }
    }
}

async fn pump(shared: Arc<Shared>, bell: AsyncFd<EventFd>) {
    let peers = 1..shared.region().geometry().peers();
    let mut buffer = Vec::with_capacity(PACKET_MAX as usize);
    loop {
        let mut round = Round::Idle;
        shared.restate();
        for peer in peers.clone() {
            if shared.round(peer, &mut buffer) == Round::More {
                round = Round::More;
            }
        }
        if round == Round::More {
            tokio::task::yield_now().await;
            continue;
        }
        // Late, or never: the next scan makes up for it.
        let _ = tokio::time::timeout(SCAN, rung(&bell)).await;
    }
}

async fn rung(bell: &AsyncFd<EventFd>) {
    if let Ok(mut ready) = bell.readable().await {
        let _ = ready.try_io(|bell| bell.get_ref().read().map_err(io::Error::from));
    }
}

/// A connection to a port of a guest. Dropping it closes both directions.
#[derive(Debug)]
pub struct HostStream {
    shared: Arc<Shared>,
    key: Key,
}

impl AsyncRead for HostStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.shared.state();
        let connection = state.connection(self.key)?;
        let Some(len) = connection.read(buffer.initialize_unfilled())? else {
            connection.reader = Some(context.waker().clone());
            return Poll::Pending;
        };
        if connection.should_update() {
            self.shared
                .control(&mut state, self.key, Op::CreditUpdate, 0);
        }
        buffer.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HostStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let mut state = self.shared.state();
        match self.shared.write(&mut state, self.key, bytes)? {
            Some(len) => Poll::Ready(Ok(len)),
            None => {
                state.connection(self.key)?.writer = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.state();
        let connection = state.connection(self.key)?;
        if connection.stage == Stage::Open && !connection.closed_for_writing {
            connection.closed_for_writing = true;
            self.shared
                .control(&mut state, self.key, Op::Shutdown, SHUTDOWN_SEND);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for HostStream {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let stage = state.connections.get(&self.key).map(|c| c.stage);
        match stage {
            Some(Stage::Open) => {
                let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
                self.shared
                    .control(&mut state, self.key, Op::Shutdown, both);
            }
            Some(Stage::Connecting) => self.shared.control(&mut state, self.key, Op::Reset, 0),
            _ => {}
        }
        state.connections.remove(&self.key);
    }
}
