//! The doorbell server, as seen by QEMU.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::io::{IoSliceMut, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use kmorph_kerf_ring::{Class, Geometry, Link, LinkEvent, Mapped, PeerState, Region};
use kmp_transport::kerf::{DoorbellServer, HOST};
use nix::sys::eventfd::EventFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::fstat;

const PATIENCE: Duration = Duration::from_secs(20);

/// The client side of the protocol, like QEMU's device.
struct Client {
    stream: UnixStream,
    number: u32,
    region: Region<Mapped>,
    bells: BTreeMap<u32, Vec<EventFd>>,
}

fn message(stream: &UnixStream) -> (i64, Option<OwnedFd>) {
    let mut bytes = [0; 8];
    let mut room = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_WAITALL;
    let got = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut room), flags).unwrap();
    assert_eq!(got.bytes, 8);
    let fd = got.cmsgs().unwrap().find_map(|c| match c {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the descriptor was just received, and this process owns it.
    let fd = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    (i64::from_le_bytes(bytes), fd)
}

impl Client {
    fn connect(path: &Path, expected: &[(u32, usize)]) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(matches!(message(&stream), (0, None)));
        let (number, none) = message(&stream);
        assert!(none.is_none());
        let (minus_one, memory) = message(&stream);
        assert_eq!(minus_one, -1);
        let memory = memory.unwrap();
        let size = usize::try_from(fstat(&memory).unwrap().st_size).unwrap();
        assert!(size.is_power_of_two());
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let length = NonZeroUsize::new(size).unwrap();
        // SAFETY: a new mapping, which lasts until the test's process ends.
        let mapped = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &memory, 0) };
        // SAFETY: the mapping lasts until the test's process ends.
        let mapped = unsafe { Mapped::new(mapped.unwrap().as_ptr().cast(), size as u64) };
        let mut client = Self {
            stream,
            number: number.try_into().unwrap(),
            region: Region::open(mapped).unwrap(),
            bells: BTreeMap::new(),
        };
        for (peer, bells) in expected {
            client.hear(*peer, *bells);
        }
        client
    }

    /// Receives the next announcement: a peer with its bells.
    fn hear(&mut self, peer: u32, bells: usize) {
        for _ in 0..bells {
            let (number, bell) = message(&self.stream);
            assert_eq!(number, peer.into());
            // SAFETY: the protocol sends eventfds here.
            let bell = unsafe { EventFd::from_owned_fd(bell.unwrap()) };
            self.bells.entry(peer).or_default().push(bell);
        }
    }

    /// Returns the vector of the first own bell that was rung, or `None` after [`PATIENCE`].
    fn rung(&self) -> Option<usize> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let own = &self.bells[&self.number];
            if let Some(vector) = own.iter().position(|bell| bell.read().is_ok()) {
                return Some(vector);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }
}

fn server() -> (tokio::runtime::Runtime, DoorbellServer, tempfile::TempDir) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let geometry = Geometry::new(4, 32, 64 * 1024).unwrap();
    let server = DoorbellServer::new(geometry).unwrap();
    (runtime, server, tempfile::tempdir().unwrap())
}

#[test]
fn guests_get_the_memory_and_everybodys_doorbells() {
    let (runtime, server, directory) = server();
    let _inside = runtime.enter();
    assert_eq!(server.vectors(), 4);
    let (one, two) = (directory.path().join("1"), directory.path().join("2"));
    let _listening = [
        server.listen(1, &one).unwrap(),
        server.listen(2, &two).unwrap(),
    ];
    let mut first = Client::connect(&one, &[(HOST, 1), (1, 4)]);
    let second = Client::connect(&two, &[(HOST, 1), (1, 4), (2, 4)]);
    assert_eq!((first.number, second.number), (1, 2));
    first.hear(2, 4);

    // The host and the guests share one memory.
    let host = server.region();
    let mut a = Link::new(HOST, 1, host.attach(HOST, 1));
    let mut b = Link::new(1, HOST, first.region.attach(1, 4));
    let now = Duration::ZERO;
    a.poll(host, now);
    assert_eq!(b.poll(&first.region, now), LinkEvent::CameUp);
    assert_eq!(a.poll(host, now), LinkEvent::CameUp);
    b.put(&first.region, &[b"hello"], Class::Data).unwrap();
    let mut got = Vec::new();
    assert_eq!(a.take(host, &mut got).unwrap(), Some(5));

    // Any peer can ring any other, and the vector identifies the sender.
    server.ring(1, HOST);
    assert_eq!(first.rung(), Some(0));
    second.bells[&1][2].write(1).unwrap();
    assert_eq!(first.rung(), Some(2));
    let bell = server.bell().unwrap();
    assert!(bell.read().is_err(), "not rung yet");
    second.bells[&HOST][0].write(1).unwrap();
    assert_eq!(bell.read().unwrap(), 1);
}

#[test]
fn a_dead_guest_is_buried_and_the_others_are_rung() {
    let (runtime, server, directory) = server();
    let _inside = runtime.enter();
    let (one, two) = (directory.path().join("1"), directory.path().join("2"));
    let _listening = [
        server.listen(1, &one).unwrap(),
        server.listen(2, &two).unwrap(),
    ];
    let mut first = Client::connect(&one, &[(HOST, 1), (1, 4)]);
    let mut second = Client::connect(&two, &[(HOST, 1), (1, 4), (2, 4)]);
    // Input that QEMU never sends does not make the server drop the client.
    first.stream.write_all(b"noise").unwrap();
    let generation = first.region.attach(1, 4);
    assert_eq!(server.region().peer(1).state, PeerState::Ready);
    drop(first);
    assert!(second.rung().is_some());
    let buried = server.region().peer(1);
    assert_eq!(
        (buried.state, buried.generation),
        (PeerState::Left, generation)
    );

    // The successor has the same number and socket.
    let again = Client::connect(&one, &[(HOST, 1), (2, 4), (1, 4)]);
    assert_eq!(again.region.attach(1, 4), generation + 1);
    // The bells that the second peer has are also the successor's, without any message in between: when QEMU learns
    // that a peer has gone, it frees the peer's data, and uses the freed data when the peer comes back.
    second.bells[&1][2].write(1).unwrap();
    assert_eq!(again.rung(), Some(2));
    let three = directory.path().join("3");
    let _listening = server.listen(3, &three).unwrap();
    let _third = Client::connect(&three, &[(HOST, 1), (1, 4), (2, 4), (3, 4)]);
    second.hear(3, 4);
}

/// QEMU learns of every number once, even of a number that is unused at the moment.
#[test]
fn a_guest_that_comes_while_another_is_dead_can_ring_its_successor() {
    let (runtime, server, directory) = server();
    let _inside = runtime.enter();
    let (one, two) = (directory.path().join("1"), directory.path().join("2"));
    let _listening = [
        server.listen(1, &one).unwrap(),
        server.listen(2, &two).unwrap(),
    ];
    drop(Client::connect(&one, &[(HOST, 1), (1, 4)]));
    let second = Client::connect(&two, &[(HOST, 1), (1, 4), (2, 4)]);
    // A ring while the number was unused must not reach the successor.
    second.bells[&1][3].write(1).unwrap();
    let again = Client::connect(&one, &[(HOST, 1), (2, 4), (1, 4)]);
    second.bells[&1][2].write(1).unwrap();
    assert_eq!(again.rung(), Some(2));
    assert!(again.bells[&1][3].read().is_err());
}

#[test]
fn a_successor_waits_for_the_end_of_its_predecessor() {
    let (runtime, server, directory) = server();
    let _inside = runtime.enter();
    let one = directory.path().join("1");
    let _listening = server.listen(1, &one).unwrap();
    let first = Client::connect(&one, &[(HOST, 1), (1, 4)]);
    let ending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(first);
    });
    let second = Client::connect(&one, &[(HOST, 1), (1, 4)]);
    assert_eq!(second.number, 1);
    ending.join().unwrap();
}

#[test]
fn numbers_that_are_no_guests_are_refused() {
    let (runtime, server, directory) = server();
    let _inside = runtime.enter();
    for number in [HOST, 4, u32::MAX] {
        let path = directory.path().join("x");
        assert!(server.listen(number, &path).is_err(), "{number}");
        assert!(!path.exists());
    }
    let path = directory.path().join("y");
    drop(server.listen(1, &path).unwrap());
    assert!(!path.exists(), "its file goes with it");
    server.ring(3, HOST);
}
