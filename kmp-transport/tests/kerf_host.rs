//! The host's end of connections, against a guest that this test simulates packet by packet.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kmorph_kerf_ring::{Class, Geometry, Link, Memory};
use kmp_transport::kerf::{DoorbellServer, HOST, Host, HostStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PATIENCE: Duration = Duration::from_secs(20);
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A packet as on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    src_port: u32,
    dst_port: u32,
    op: u16,
    flags: u32,
    buffer: u32,
    read: u32,
    payload: Vec<u8>,
}

/// The guest: peer 1, CID 3.
struct Guest {
    server: DoorbellServer,
    link: Link,
    started: Instant,
}

impl Guest {
    fn start(server: &DoorbellServer) -> Self {
        let generation = server.region().attach(1, 1);
        server.ring(HOST, 1);
        Self {
            server: server.clone(),
            link: Link::new(1, HOST, generation),
            started: Instant::now(),
        }
    }

    async fn up(&mut self, host: &Host) {
        let start = Instant::now();
        while !(self.link.is_up() && host.is_linked(1)) {
            assert!(start.elapsed() < PATIENCE);
            self.link.poll(self.server.region(), self.started.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn raw(&mut self, src_cid: u64, packet: &Packet) {
        let mut bytes = Vec::new();
        bytes.extend(src_cid.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        let len = u32::try_from(packet.payload.len()).unwrap();
        for word in [packet.src_port, packet.dst_port, len] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(packet.op.to_le_bytes());
        for word in [packet.flags, packet.buffer, packet.read] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&packet.payload);
        let region = self.server.region();
        self.link.put(region, &[&bytes], Class::Control).unwrap();
        self.server.ring(HOST, 1);
    }

    fn send(&mut self, packet: &Packet) {
        self.raw(3, packet);
    }

    /// Sends `op` on the connection of the packet `of`.
    fn answer(&mut self, of: &Packet, op: u16, flags: u32, payload: &[u8]) {
        self.send(&Packet {
            src_port: of.dst_port,
            dst_port: of.src_port,
            op,
            flags,
            buffer: 1000,
            read: 0,
            payload: payload.to_vec(),
        });
    }

    async fn next(&mut self) -> Packet {
        let start = Instant::now();
        let mut bytes = Vec::new();
        while self
            .link
            .take(self.server.region(), &mut bytes)
            .unwrap()
            .is_none()
        {
            assert!(start.elapsed() < PATIENCE, "no packet");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(8)), (2, 3), "addresses");
        assert_eq!(word(24) as usize, bytes.len() - 44);
        Packet {
            src_port: word(16),
            dst_port: word(20),
            op: u16::from_le_bytes([bytes[30], bytes[31]]),
            flags: word(32),
            buffer: word(36),
            read: word(40),
            payload: bytes[44..].to_vec(),
        }
    }

    /// Returns true if no packet arrives within 150 ms.
    async fn silent(&mut self) -> bool {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let mut bytes = Vec::new();
        self.link
            .take(self.server.region(), &mut bytes)
            .unwrap()
            .is_none()
    }
}

fn server() -> DoorbellServer {
    DoorbellServer::new(Geometry::new(2, 32, 64 * 1024).unwrap()).unwrap()
}

async fn start() -> (Host, Guest) {
    let server = server();
    let host = Host::new(server.clone()).unwrap();
    let mut guest = Guest::start(&server);
    guest.up(&host).await;
    (host, guest)
}

/// Connects, and makes the guest accept.
async fn connected(host: &Host, guest: &mut Guest) -> (HostStream, Packet) {
    let accept = async {
        let request = guest.next().await;
        assert_eq!((request.op, request.dst_port), (REQUEST, 9000));
        guest.answer(&request, RESPONSE, 0, b"");
        request
    };
    let (stream, request) = tokio::join!(host.connect(1, 9000), accept);
    (stream.unwrap(), request)
}

#[tokio::test]
async fn bytes_go_both_ways() {
    let (host, mut guest) = start().await;
    let (mut stream, request) = connected(&host, &mut guest).await;
    assert!(request.buffer >= 64 * 1024);
    stream.write_all(b"ping").await.unwrap();
    let data = guest.next().await;
    assert_eq!((data.op, &data.payload[..]), (DATA, &b"ping"[..]));
    guest.answer(&data, DATA, 0, b"pong!");
    let mut back = [0; 5];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"pong!");
    guest.answer(&data, CREDIT_REQUEST, 0, b"");
    let told = guest.next().await;
    assert_eq!((told.op, told.read), (CREDIT_UPDATE, 5));
    // After a half-close, the other direction continues.
    stream.shutdown().await.unwrap();
    let shut = guest.next().await;
    assert_eq!((shut.op, shut.flags), (SHUTDOWN, 2));
    guest.answer(&data, DATA, 0, b"more");
    stream.read_exact(&mut back[..4]).await.unwrap();
    guest.answer(&data, SHUTDOWN, 3, b"");
    assert_eq!(stream.read(&mut back).await.unwrap(), 0);
    assert_eq!(guest.next().await.op, RESET);
}

/// Packets arrive together: bulk on two connections, then a small message on a third. The reader of the small message
/// runs first.
#[tokio::test]
async fn a_small_message_is_handed_on_before_bulk() {
    let (host, mut guest) = start().await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let (mut requests, mut readers) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (mut stream, request) = connected(&host, &mut guest).await;
        requests.push(request);
        let order = order.clone();
        readers.push(tokio::spawn(async move {
            let len = stream.read(&mut vec![0; 65536]).await.unwrap();
            order.lock().unwrap().push(len);
            stream
        }));
    }
    // Each reader waits before the guest sends.
    tokio::time::sleep(Duration::from_millis(10)).await;
    for (request, len) in requests.iter().zip([20_000, 10_000, 80]) {
        guest.answer(request, DATA, 0, &vec![1; len]);
    }
    for reader in readers {
        tokio::time::timeout(PATIENCE, reader)
            .await
            .unwrap()
            .unwrap();
    }
    assert_eq!(*order.lock().unwrap(), [80, 10_000, 20_000]);
}

#[tokio::test]
async fn a_writer_waits_for_credit() {
    let (host, mut guest) = start().await;
    let (mut stream, request) = connected(&host, &mut guest).await;
    let writing = tokio::spawn(async move {
        stream.write_all(&[7; 1500]).await.unwrap();
        stream
    });
    let first = guest.next().await;
    assert_eq!(first.payload.len(), 1000, "what the guest has room for");
    assert!(guest.silent().await);
    assert!(!writing.is_finished());
    guest.send(&Packet {
        src_port: 9000,
        dst_port: request.src_port,
        op: CREDIT_UPDATE,
        flags: 0,
        buffer: 1000,
        read: 600,
        payload: Vec::new(),
    });
    assert_eq!(guest.next().await.payload.len(), 500);
    // A dropped stream sends a shutdown.
    drop(writing.await.unwrap());
    let shut = guest.next().await;
    assert_eq!((shut.op, shut.flags), (SHUTDOWN, 3));
}

#[tokio::test]
async fn who_refuses_and_who_is_not_there_are_told_apart() {
    let (host, mut guest) = start().await;
    let refuse = async {
        let request = guest.next().await;
        guest.answer(&request, RESET, 0, b"");
    };
    let (refused, ()) = tokio::join!(host.connect(1, 1), refuse);
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let nobody = host.connect(7, 1).await.unwrap_err();
    assert_eq!(nobody.kind(), io::ErrorKind::NotConnected);
}

#[tokio::test]
async fn a_guest_that_dies_ends_its_connections() {
    let (host, mut guest) = start().await;
    let (mut stream, _) = connected(&host, &mut guest).await;
    let reading = tokio::spawn(async move { stream.read(&mut [0; 8]).await });
    guest.server.region().bury(1);
    guest.server.ring(HOST, 1);
    let ended = tokio::time::timeout(PATIENCE, reading).await.unwrap();
    let error = ended.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    let gone = host.connect(1, 9000).await.unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::NotConnected);
}

#[tokio::test]
async fn strangers_are_refused_and_forgeries_dropped() {
    let (host, mut guest) = start().await;
    let (mut stream, request) = connected(&host, &mut guest).await;
    let forged = Packet {
        src_port: 9000,
        dst_port: request.src_port,
        op: DATA,
        flags: 0,
        buffer: 1000,
        read: 0,
        payload: b"forged".to_vec(),
    };
    guest.raw(4, &forged);
    guest.send(&Packet {
        payload: b"real".to_vec(),
        ..forged.clone()
    });
    let mut back = [0; 16];
    assert_eq!(stream.read(&mut back).await.unwrap(), 4);
    assert_eq!(&back[..4], b"real");
    // No listener exists here, and these ports are not in use.
    for (op, payload) in [(REQUEST, &b""[..]), (DATA, b"stray")] {
        let stranger = Packet {
            src_port: 77,
            dst_port: 9000,
            op,
            payload: payload.to_vec(),
            ..forged.clone()
        };
        guest.send(&stranger);
        let refusal = guest.next().await;
        assert_eq!(
            (refusal.op, refusal.dst_port, refusal.src_port),
            (RESET, 77, 9000)
        );
    }
    // A reset is never answered.
    guest.send(&Packet {
        src_port: 77,
        op: RESET,
        payload: Vec::new(),
        ..forged
    });
    assert!(guest.silent().await);
}

#[tokio::test]
async fn a_guest_that_writes_garbage_loses_its_connections_and_may_come_back() {
    // Offsets of the ring from 1 to 0, and of the ring from 0 to 1: see the layout.
    const STRIDE: u64 = 77824;
    const FROM_GUEST: u64 = 8192 + 2 * STRIDE;
    const TO_GUEST: u64 = 8192 + STRIDE;
    for garbage in [FROM_GUEST, TO_GUEST + 128] {
        let (host, mut guest) = start().await;
        let (mut stream, _) = connected(&host, &mut guest).await;
        let memory = guest.server.region().memory();
        memory.store32(garbage, 0x7777, Relaxed);
        guest.server.ring(HOST, 1);
        // A sender finds one kind of garbage, the pump the other.
        let ended = async {
            loop {
                if let Err(error) = stream.write(b"x").await {
                    return error;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let error = tokio::time::timeout(PATIENCE, ended).await.unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        let mut guest = Guest::start(&guest.server);
        guest.up(&host).await;
        connected(&host, &mut guest).await;
    }
}

#[tokio::test]
async fn a_host_that_ends_says_so() {
    let (host, mut guest) = start().await;
    let (mut stream, _) = connected(&host, &mut guest).await;
    drop(host);
    assert!(stream.read(&mut [0; 1]).await.is_err());
    let event = guest
        .link
        .poll(guest.server.region(), guest.started.elapsed());
    assert_eq!(event, kmorph_kerf_ring::LinkEvent::Lost);
}

/// Another guest overwrites a word of the pair, or this side's entry. The connections end, and then host and guest link
/// up again with the same generations.
#[tokio::test]
async fn a_pair_that_another_guest_spoiled_recovers() {
    const STRIDE: u64 = 77824;
    const FROM_GUEST: u64 = 8192 + 2 * STRIDE;
    const ENTRY: u64 = 4096;
    for spoiled in [FROM_GUEST, ENTRY] {
        let (host, mut guest) = start().await;
        let (mut stream, _) = connected(&host, &mut guest).await;
        let region = guest.server.clone();
        let region = region.region();
        let generations = [0, 1].map(|peer| region.peer(peer).generation);
        region.memory().store32(spoiled, 0x7777, Relaxed);
        // This side may publish its entry again before the guest has looked.
        while spoiled == ENTRY && guest.link.is_up() {
            region.memory().store32(spoiled, 0x7777, Relaxed);
            guest.link.poll(region, guest.started.elapsed());
        }
        guest.server.ring(HOST, 1);
        let ended = tokio::time::timeout(PATIENCE, stream.read(&mut [0; 1])).await;
        let error = ended.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        drop(stream);
        // The guest sees the loss too, and both sides wait before they start again.
        let start = Instant::now();
        while guest.link.is_up() || host.is_linked(1) {
            assert!(start.elapsed() < PATIENCE);
            guest.link.poll(region, guest.started.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        guest.up(&host).await;
        connected(&host, &mut guest).await;
        let now = [0, 1].map(|peer| region.peer(peer).generation);
        assert_eq!(now, generations);
    }
}
