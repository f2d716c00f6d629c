//! Reading memory that was lent, over a channel, as a daemon asks for it. The device is a directory that looks like it.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use kmorph_agent::capture;
use kmorph_agent::figures::{Sampler, Scope};
use kmorph_agent::morph::Morphs;
use kmorph_agent::priority::Scheduling;
use kmorph_agent::pulse::Pulses;
use kmorph_agent::server::{self, Said, Served};
use kmorph_agent::workload::Workload;
use kmp_proto::message::{
    CaptureStatus, Channel, Hello, HelloFixed, MemoryRange, MemoryWindow, Message, MorphTransfer,
    MorphTransferFixed, PeerRole, StateProvider, TransferMode, TransferOp, VmcoreComplete,
    VmcoreStart, VmcoreStartFixed, features,
};
use kmp_proto::wire::{ErrorCode, VERSION};
use kmp_transport::connection::{Connection, ConnectionError, greet, welcome};
use kmp_transport::link;
use tokio::task::JoinHandle;

const CAPTURE: u64 = 5;
const PORT: &str = "0000:00:1e.0";
const PAGE: u32 = 4096;
const PAGE_BYTES: usize = 4096;
/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_secs(60);
/// Where the memory of the tests begins in the fenced kernel, and in what was lent.
const START: u64 = 0x10_0000;
const OFFSET: u64 = 0x2000;

fn hello(role: PeerRole) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role,
            channel: Channel::Bulk,
            flags: 0,
            generation: 1,
            boot_id: [7; 16],
            features: features::READS_LENT_MEMORY | features::MORPHS,
            session: CAPTURE,
            incarnation: 0,
        },
        instance: "db".to_owned(),
        kernel_release: "6.12.0".to_owned(),
        agent_version: "test".to_owned(),
        nonce: None,
        proof: None,
    }
}

/// A survivor, its daemon's end of the channel, and the memory that it was lent.
struct Survivor {
    daemon: Connection,
    serving: JoinHandle<Result<(), ConnectionError>>,
    sysfs: tempfile::TempDir,
    memory: Vec<u8>,
}

impl Survivor {
    /// The first request says what the channel is for, so it is a part of its beginning.
    async fn asked(first: VmcoreStart) -> Self {
        let sysfs = tempfile::tempdir().unwrap();
        // Pages of their own number; the third is of zeros.
        let memory: Vec<u8> = (0..8_u8)
            .flat_map(|page| [if page == 2 { 0 } else { page + 1 }; PAGE_BYTES])
            .collect();
        let device = device(sysfs.path());
        std::fs::create_dir_all(&device).unwrap();
        for (name, content) in [
            ("vendor", "0x1af4\n"),
            ("device", "0x1110\n"),
            ("enable", "0\n"),
        ] {
            std::fs::write(device.join(name), content).unwrap();
        }
        let before = vec![0xee; usize::try_from(OFFSET).unwrap()];
        std::fs::write(device.join("resource2"), [before, memory.clone()].concat()).unwrap();
        let (near, far) = link::memory();
        let identity = hello(PeerRole::Instance);
        let (daemon, agent) = tokio::join!(
            greet(near, hello(PeerRole::Daemon)),
            welcome(far, &identity)
        );
        let (mut daemon, mut agent) = (daemon.unwrap(), agent.unwrap());
        let first = Message::VmcoreStart(first);
        daemon.writer.send(&first).await.unwrap();
        let frame = agent.reader.next().await.unwrap();
        let serving = tokio::spawn(capture::serve(
            agent,
            frame,
            sysfs.path().to_owned(),
            Scheduling::default(),
        ));
        Self {
            daemon,
            serving,
            sysfs,
            memory,
        }
    }

    async fn ask(&mut self, message: Message) {
        self.daemon.writer.send(&message).await.unwrap();
    }

    async fn next(&mut self) -> Message {
        let next = tokio::time::timeout(DEADLINE, self.daemon.reader.next());
        next.await.expect("an answer in time").unwrap().message
    }

    /// What comes after a request: the bytes that the survivor means to send, chunks by address, and the end.
    async fn read(&mut self) -> (u64, Vec<(u64, Vec<u8>)>, VmcoreComplete) {
        let begun = match self.next().await {
            Message::VmcoreStartReply(reply) => reply.bytes,
            other => panic!("{other:?}"),
        };
        let mut chunks = Vec::new();
        loop {
            match self.next().await {
                Message::VmcoreData(data) => {
                    let length = usize::try_from(data.fixed.length).unwrap();
                    let mut chunk = vec![1; length];
                    assert!(data.decode(&mut chunk));
                    chunks.push((data.fixed.address, chunk));
                }
                Message::VmcoreComplete(done) => return (begun, chunks, done),
                other => panic!("{other:?}"),
            }
        }
    }

    /// These pages of the memory.
    fn bytes(&self, from: usize, upto: usize) -> Vec<u8> {
        self.memory[from * PAGE_BYTES..upto * PAGE_BYTES].to_vec()
    }
}

fn device(sysfs: &Path) -> PathBuf {
    let port = sysfs.join("bus/pci/devices").join(PORT);
    port.join("0000:01:00.0")
}

/// Whether this process has the memory open.
fn holds(sysfs: &Path) -> bool {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let memory = device(sysfs).join("resource2");
    open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .any(|path| path == memory)
}

fn window(start: u64, pages: u64, offset: u64) -> MemoryWindow {
    MemoryWindow {
        start,
        length: pages * u64::from(PAGE),
        offset,
    }
}

/// A request for these pages of the memory: first, count.
fn pages(pages: &[(u64, u64)]) -> VmcoreStart {
    let range = |&(first, count): &(u64, u64)| MemoryRange {
        start: START + first * u64::from(PAGE),
        length: count * u64::from(PAGE),
    };
    VmcoreStart {
        fixed: VmcoreStartFixed {
            capture: CAPTURE,
            generation: 3,
            chunk_bytes: 2 * PAGE,
        },
        pci_port: Some(PORT.to_owned()),
        windows: vec![window(START, 8, OFFSET)],
        ranges: pages.iter().map(range).collect(),
    }
}

#[tokio::test]
async fn what_is_asked_for_is_sent_in_chunks_and_let_go_at_the_end() {
    let mut survivor = Survivor::asked(pages(&[(0, 3), (5, 1)])).await;
    let (begun, chunks, done) = survivor.read().await;
    assert_eq!((begun, done.bytes), (4 * 4096, 4 * 4096));
    assert_eq!(done.status, CaptureStatus::Complete);
    let at = |page: u64| START + page * 4096;
    let expected = [
        (at(0), survivor.bytes(0, 2)),
        (at(2), survivor.bytes(2, 3)),
        (at(5), survivor.bytes(5, 6)),
    ];
    assert!(chunks == expected);
    survivor.ask(Message::VmcoreStart(pages(&[(7, 1)]))).await;
    let (_, chunks, _) = survivor.read().await;
    assert!(chunks == [(at(7), survivor.bytes(7, 8))]);
    assert!(holds(survivor.sysfs.path()));
    let end = VmcoreComplete {
        capture: CAPTURE,
        bytes: 0,
        status: CaptureStatus::Complete,
    };
    survivor.ask(Message::VmcoreComplete(end)).await;
    let reply = survivor.next().await;
    assert!(
        matches!(reply, Message::VmcoreCompleteReply(_)),
        "{reply:?}"
    );
    assert!(!holds(survivor.sysfs.path()), "it has let go of it");
    survivor.serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_was_not_lent_is_refused_and_the_channel_ends() {
    let one = || pages(&[(0, 1)]);
    let at_port = |port: Option<&str>| VmcoreStart {
        pci_port: port.map(str::to_owned),
        ..one()
    };
    let lent = |windows: &[MemoryWindow]| VmcoreStart {
        windows: windows.to_vec(),
        ..one()
    };
    let of = |capture, chunk_bytes| VmcoreStart {
        fixed: VmcoreStartFixed {
            capture,
            generation: 3,
            chunk_bytes,
        },
        ..one()
    };
    let endless = MemoryWindow {
        length: u64::MAX,
        ..window(START, 0, OFFSET)
    };
    let (refused, malformed) = (ErrorCode::RefusedByPolicy, ErrorCode::Malformed);
    let cases = [
        ("behind the window", pages(&[(7, 2)]), refused),
        ("far behind it", pages(&[(0, 1), (1 << 50, 1)]), refused),
        ("nothing lent", lent(&[]), refused),
        ("a window without an end", lent(&[endless]), refused),
        ("no place", lent(&[window(START, 1, u64::MAX)]), refused),
        ("no port", at_port(None), refused),
        ("a path", at_port(Some("../../etc")), refused),
        ("a port and more", at_port(Some("0000:00:1e.0/.")), refused),
        ("another capture", of(6, PAGE), ErrorCode::UnexpectedInState),
        ("half a page", of(CAPTURE, 2048), malformed),
        ("no bytes", of(CAPTURE, 0), malformed),
        ("too large a chunk", of(CAPTURE, 1 << 20), malformed),
    ];
    for (what, request, code) in cases {
        let mut survivor = Survivor::asked(request).await;
        match survivor.next().await {
            Message::Error(error) => assert_eq!(error.code, code, "{what}: {}", error.text),
            other => panic!("{what}: {other:?}"),
        }
        if !code.ends(Channel::Bulk) {
            // The channel goes on: what it was opened for is still read.
            survivor.ask(Message::VmcoreStart(pages(&[(0, 1)]))).await;
            assert_eq!(survivor.read().await.0, 4096, "{what}");
            continue;
        }
        let ended = survivor.serving.await.unwrap();
        let refused = matches!(ended, Err(ConnectionError::Refused { .. }));
        assert!(refused, "{what}: {ended:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_left_out_and_said() {
    let mut survivor = Survivor::asked(pages(&[(0, 8)])).await;
    let (_, whole, _) = survivor.read().await;
    assert_eq!(whole.len(), 4);
    let memory = device(survivor.sysfs.path()).join("resource2");
    let memory = std::fs::File::options().write(true).open(memory).unwrap();
    // As when the device is unplugged: what was there when it was opened is not there any more.
    memory.set_len(OFFSET + 3 * 4096).unwrap();
    survivor.ask(Message::VmcoreStart(pages(&[(0, 8)]))).await;
    let (begun, chunks, done) = survivor.read().await;
    assert_eq!((begun, done.bytes), (8 * 4096, 2 * 4096));
    assert_eq!(done.status, CaptureStatus::Incomplete);
    assert_eq!(chunks.len(), 1);
}

/// A survivor's server, and how connections come to it.
fn server() -> tokio::sync::mpsc::Sender<Connection> {
    let (connections, accepted) = tokio::sync::mpsc::channel(1);
    let workload = Workload::none();
    let log = slog::Logger::root(slog::Discard, slog::o!());
    let served = Served {
        instance: "db".to_owned(),
        said: Said::default(),
        morphs: Morphs::new(workload.clone(), 1, None, log.clone()),
        workload,
        topology: kmorph_agent::topology::Topology::in_dir(std::env::temp_dir()),
        log,
        pulses: Pulses::none(),
        scheduling: Scheduling::default(),
    };
    let figures = Sampler::new(Scope::System, 1);
    tokio::spawn(server::serve(accepted, served, figures));
    connections
}

#[tokio::test]
async fn a_capture_takes_no_bulk_channel_from_a_morph() {
    let server = server();
    let mut channels = Vec::new();
    for _ in 0..2 {
        let (near, far) = link::memory();
        let identity = hello(PeerRole::Instance);
        let (daemon, agent) = tokio::join!(
            greet(near, hello(PeerRole::Daemon)),
            welcome(far, &identity)
        );
        server.send(agent.unwrap()).await.unwrap();
        channels.push(daemon.unwrap());
    }
    // The newer one is a capture's, the older one turns out to be a morph's: both are answered.
    let no_port = VmcoreStart {
        pci_port: None,
        ..pages(&[(0, 1)])
    };
    let pull = MorphTransfer {
        fixed: MorphTransferFixed {
            session: CAPTURE,
            offset: 0,
            total_bytes: 0,
            dirty_bytes: 0,
            round: 1,
            chunk_crc32: 0,
            op: TransferOp::Pull,
            mode: TransferMode::Rounds,
            provider: StateProvider::Cooperative,
            flags: 0,
        },
        data: Vec::new(),
        references: Vec::new(),
    };
    let firsts = [Message::VmcoreStart(no_port), Message::MorphTransfer(pull)];
    for (channel, first) in channels.iter_mut().rev().zip(firsts) {
        channel.writer.send(&first).await.unwrap();
        let answer = tokio::time::timeout(DEADLINE, channel.reader.next());
        let answer = answer.await.expect("an answer in time").unwrap();
        assert!(matches!(answer.message, Message::Error(_)), "{answer:?}");
    }
}

#[tokio::test]
async fn what_is_asked_for_ahead_is_read_one_by_one() {
    let mut survivor = Survivor::asked(pages(&[(0, 8)])).await;
    for page in 1..4 {
        survivor
            .ask(Message::VmcoreStart(pages(&[(page, 1)])))
            .await;
    }
    assert_eq!(survivor.read().await.0, 8 * 4096);
    for page in 1..4 {
        let (_, chunks, _) = survivor.read().await;
        assert_eq!(chunks[0].0, START + page * 4096);
    }
}

#[tokio::test]
async fn a_survivor_whose_channel_ends_lets_go_of_the_memory() {
    let mut survivor = Survivor::asked(pages(&[(0, 1)])).await;
    survivor.read().await;
    assert!(holds(survivor.sysfs.path()));
    drop(survivor.daemon);
    let ended = tokio::time::timeout(DEADLINE, survivor.serving).await;
    let ended = ended.expect("it ends").unwrap();
    assert!(matches!(ended, Err(ConnectionError::Closed)), "{ended:?}");
    let begun = std::time::Instant::now();
    // By the thread that has read it, soon.
    while holds(survivor.sysfs.path()) {
        assert!(begun.elapsed() < DEADLINE, "it still has the memory");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_answer_to_another_request_than_the_oldest_ends_the_channel() {
    let taken = |capture| {
        Message::VmcoreCompleteReply(VmcoreComplete {
            capture,
            bytes: 4096,
            status: CaptureStatus::Complete,
        })
    };
    // Of this survivor's numbers a chunk had 1 and VMCORE_COMPLETE 2.
    for (what, capture, sequence, sound) in [
        ("the answer", CAPTURE, 2, true),
        ("to a chunk", CAPTURE, 1, false),
        ("to nothing", CAPTURE, 3, false),
        ("of another capture", 6, 2, false),
    ] {
        let mut survivor = Survivor::asked(pages(&[(0, 1)])).await;
        survivor.read().await;
        let answer = taken(capture);
        let answered = survivor.daemon.writer.reply(&answer, sequence);
        answered.await.unwrap();
        if sound {
            survivor.ask(Message::VmcoreStart(pages(&[(1, 1)]))).await;
            survivor.read().await;
            continue;
        }
        let ended = tokio::time::timeout(DEADLINE, survivor.serving).await;
        let ended = ended.expect("it goes on").unwrap();
        let nothing = matches!(ended, Err(ConnectionError::AnswersNothing { .. }));
        assert!(nothing, "{what}: {ended:?}");
    }
}
