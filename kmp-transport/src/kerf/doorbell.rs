//! QEMU's ivshmem doorbell protocol, version 0, server side.
//!
//! A message is an 8-byte little-endian number, with or without a descriptor. When a guest's QEMU connects, the
//! server sends: 0, the version; the guest's number; −1 with the memory; then for each peer, including itself, the
//! peer's number with an eventfd, once per vector. Later it sends the same for each new peer. QEMU itself
//! sends nothing.
//!
//! The protocol also has a message for a peer that leaves, the number alone. This server never sends one: QEMU (10.0, and
//! its main branch in 2025) then frees its data of that peer, writes to the freed memory when the peer comes back, and
//! frees the memory again when the peer leaves again. So a returning peer would kill the QEMU of every other guest.
//! Instead, a number keeps its eventfds for the lifetime of the server: a guest that has them rings the next guest with
//! that number. Ringing an unused number does nothing.
//!
//! Each guest has its own socket, so that its number is known before it starts. When its connection ends, the guest
//! is dead: the server marks it as dead and rings the others, because a dead guest does not ring.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kmorph_kerf_ring::{Geometry, Mapped, Region};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::memory::SharedMemory;

/// The peer that this process is: the host.
pub const HOST: u32 = 0;
/// Vectors of a guest: more than one only tells it who rings.
const VECTORS_MAX: u32 = 32;
/// News that one guest's QEMU has not read yet. One that reads nothing for so long is given up.
const NEWS_MAX: usize = 1024;
/// How long a guest waits for the end of the one that had its number, and how often it looks.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(2);
const PREDECESSOR_POLL: Duration = Duration::from_millis(5);
/// The version of the protocol.
const VERSION: i64 = 0;
/// In place of a peer's number: the memory follows.
const MEMORY: i64 = -1;

type Bells = Arc<[EventFd]>;

/// Serves one memory and its doorbells to guests.
#[derive(Clone, Debug)]
pub struct DoorbellServer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    memory: SharedMemory,
    vectors: u32,
    known: Mutex<BTreeMap<u32, Known>>,
}

/// A peer that is or was there.
#[derive(Debug)]
struct Known {
    bells: Bells,
    present: bool,
    /// `None` for this process, and for a guest that is not there.
    news: Option<mpsc::Sender<News>>,
}

/// The news of a new peer, for every guest.
#[derive(Clone, Debug)]
struct News(u32, Bells);

/// A guest's socket. Dropping it closes the socket and removes its file; a connected guest stays connected.
#[derive(Debug)]
pub struct Listening {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl DoorbellServer {
    /// A new memory, with this process as its peer [`HOST`].
    ///
    /// # Errors
    /// If the system refuses memory or descriptors.
    pub fn new(geometry: Geometry) -> io::Result<Self> {
        let memory = SharedMemory::new(geometry)?;
        let bells = bells(1)?;
        let host = Known {
            bells,
            present: true,
            news: None,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                memory,
                vectors: geometry.peers().min(VECTORS_MAX),
                known: Mutex::new(BTreeMap::from([(HOST, host)])),
            }),
        })
    }

    /// The region.
    pub fn region(&self) -> &Region<Mapped> {
        self.shared.memory.region()
    }

    /// The `vectors` of a guest's `ivshmem-doorbell` device.
    pub fn vectors(&self) -> u32 {
        self.shared.vectors
    }

    /// This process's own doorbell, with a descriptor of its own.
    ///
    /// # Errors
    /// If the system has no descriptor left.
    pub fn bell(&self) -> io::Result<EventFd> {
        let known = self.shared.known();
        let bell = known.get(&HOST).and_then(|host| host.bells.first());
        let bell = bell.ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: a duplicate of an eventfd is one.
        Ok(unsafe { EventFd::from_owned_fd(bell.as_fd().try_clone_to_owned()?) })
    }

    /// Rings `peer` on behalf of `from`. One that is not there is not rung.
    pub fn ring(&self, peer: u32, from: u32) {
        let known = self.shared.known();
        if let Some(there) = known.get(&peer).filter(|peer| peer.present) {
            let vector = self.region().vector(peer, from) as usize;
            if let Some(bell) = there.bells.get(vector) {
                // A counter that is full rings anyway.
                let _ = bell.write(1);
            }
        }
    }

    /// Waits on `path` for the QEMU of the guest `peer`, and for the next one when that has ended. Inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// If the number is not a guest's, or the socket cannot be bound.
    pub fn listen(&self, peer: u32, path: &Path) -> io::Result<Listening> {
        if peer == HOST || peer >= self.region().geometry().peers() {
            let text = format!("{peer} is not the number of a guest in this region");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let listener = UnixListener::bind(path)?;
        let shared = self.shared.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(shared.clone(), peer, stream));
            }
        });
        Ok(Listening {
            path: path.to_owned(),
            task,
        })
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, BTreeMap<u32, Known>> {
        // The state is consistent at every moment.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a guest, unless its number is taken; returns all that its QEMU must know of, itself last.
    fn enter(&self, peer: u32, news: &mpsc::Sender<News>) -> io::Result<Option<Vec<(u32, Bells)>>> {
        let mut known = self.known();
        if let Some(predecessor) = known.get_mut(&peer) {
            if predecessor.present {
                return Ok(None);
            }
            // Drop the predecessor's rings.
            for bell in predecessor.bells.iter() {
                let _ = bell.read();
            }
            predecessor.present = true;
            predecessor.news = Some(news.clone());
        } else {
            let bells = bells(self.vectors)?;
            tell(&mut known, &News(peer, bells.clone()));
            let newcomer = Known {
                bells,
                present: true,
                news: Some(news.clone()),
            };
            known.insert(peer, newcomer);
        }
        let (own, others): (Vec<_>, Vec<_>) = known
            .iter()
            .map(|(number, known)| (*number, known.bells.clone()))
            .partition(|(number, _)| *number == peer);
        Ok(Some(others.into_iter().chain(own).collect()))
    }

    /// The guest is dead: its QEMU is gone.
    fn leave(&self, peer: u32) {
        self.memory.region().bury(peer);
        let mut known = self.known();
        if let Some(dead) = known.get_mut(&peer) {
            dead.present = false;
            dead.news = None;
        }
        for there in known.values().filter(|peer| peer.present) {
            for bell in there.bells.iter() {
                let _ = bell.write(1);
            }
        }
    }
}

/// Tells every guest. One whose queue is full gets no news any more: its connection ends.
fn tell(known: &mut BTreeMap<u32, Known>, news: &News) {
    for there in known.values_mut() {
        if let Some(queue) = &there.news
            && queue.try_send(news.clone()).is_err()
        {
            there.news = None;
        }
    }
}

async fn serve(shared: Arc<Shared>, peer: u32, stream: UnixStream) {
    let (sender, news) = mpsc::channel(NEWS_MAX);
    let enter = async {
        loop {
            match shared.enter(peer, &sender) {
                Ok(None) => tokio::time::sleep(PREDECESSOR_POLL).await,
                entered => return entered,
            }
        }
    };
    let entered = tokio::time::timeout(PREDECESSOR_TIMEOUT, enter).await;
    let Ok(Ok(Some(everybody))) = entered else {
        return;
    };
    drop(sender);
    // However it ends, the guest has lost its memory's other end.
    let _ = talk(&shared, peer, &stream, everybody, news).await;
    shared.leave(peer);
}

async fn talk(
    shared: &Shared,
    peer: u32,
    stream: &UnixStream,
    everybody: Vec<(u32, Bells)>,
    mut news: mpsc::Receiver<News>,
) -> io::Result<()> {
    send(stream, VERSION, None).await?;
    send(stream, peer.into(), None).await?;
    send(stream, MEMORY, Some(shared.memory.as_fd())).await?;
    for (number, bells) in everybody {
        introduce(stream, number, &bells).await?;
    }
    loop {
        tokio::select! {
            ended = ended(stream) => return ended,
            item = news.recv() => match item {
                Some(News(number, bells)) => introduce(stream, number, &bells).await?,
                None => return Err(io::ErrorKind::TimedOut.into()),
            },
        }
    }
}

async fn introduce(stream: &UnixStream, number: u32, bells: &Bells) -> io::Result<()> {
    for bell in bells.iter() {
        send(stream, number.into(), Some(bell.as_fd())).await?;
    }
    Ok(())
}

/// Waits for the other side to close. What it sends meanwhile is no part of the protocol and is dropped.
async fn ended(stream: &UnixStream) -> io::Result<()> {
    let mut buffer = [0; 64];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn send(stream: &UnixStream, number: i64, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = number.to_le_bytes();
    let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let with = if fds.is_empty() { &[][..] } else { &rights };
    let socket = stream.as_raw_fd();
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let parts = [IoSlice::new(&bytes)];
            sendmsg::<()>(socket, &parts, with, flags, None).map_err(io::Error::from)
        })
        .await?;
    // A stream socket takes so little whole or not at all.
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

fn bells(count: u32) -> io::Result<Bells> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let new = || EventFd::from_value_and_flags(0, flags).map_err(io::Error::from);
    (0..count).map(|_| new()).collect()
}
