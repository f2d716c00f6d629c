//! A peer that shares no code with this implementation: `tests/peers/python_peer.py`, written from `docs/kmp.md`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kmp_proto::auth::Key;
use kmp_proto::codec::{Decoder, Frame, encode};
use kmp_proto::fence::{Confirmation, FenceMethod, FenceOrder};
use kmp_proto::message::*;
use kmp_proto::wire::ErrorCode;
use kmp_transport::connection::{ConnectionError, greet};
use kmp_transport::link::{Address, connect};
use kmp_transport::peer::{Peer, PeerEvent};
use kmp_transport::speaker::Speaker;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

/// Maximum wait for any required event.
const DEADLINE: Duration = Duration::from_secs(30);

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn python(arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.arg(root().join("tests/peers/python_peer.py"));
    command.args(arguments);
    command
}

/// The instance `web`, generation 7, in Python. The process exits at the end of its standard input.
struct Instance {
    process: Child,
    dir: tempfile::TempDir,
}

/// Key of the instance, as on its command line.
const KEY: &str = "0707070707070707070707070707070707070707070707070707070707070707";

impl Instance {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let mut process = python(&["serve", path.to_str().unwrap(), "web", "7", KEY])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = process.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { process, dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    fn address(&self) -> Address {
        Address::Unix(self.path())
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

fn hello(instance: &str, generation: u64) -> Speaker {
    Speaker::with_key(plain(instance, generation, 0), Key::new([7; 32]))
}

fn plain(instance: &str, generation: u64, incarnation: u64) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: 1,
            version_max: 1,
            role: PeerRole::Daemon,
            channel: Channel::Control,
            flags: 0,
            generation,
            boot_id: *b"0123456789abcdef",
            features: features::MORPHS | features::BY_REFERENCE,
            session: 0,
            incarnation,
        },
        instance: instance.to_owned(),
        kernel_release: "6.12.0".to_owned(),
        agent_version: "kmorphd".to_owned(),
        nonce: None,
        proof: None,
    }
}

#[test]
fn it_reads_and_writes_every_golden_frame_and_misses_no_flipped_bit() {
    let golden = root().join("kmp-proto/golden");
    let output = python(&["golden", golden.to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let wrong = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}{wrong}");
    assert_eq!(said.lines().count(), golden.read_dir().unwrap().count());
    assert!(said.contains("morph_commit_reply: MORPH_COMMIT reply 44\n"));
}

/// Returns the next frame on a channel.
async fn frame_on(events: &mut mpsc::UnboundedReceiver<PeerEvent>, wanted: Channel) -> Frame {
    let next = async {
        loop {
            match events.recv().await.unwrap() {
                PeerEvent::Frame(channel, frame) if channel == wanted => return *frame,
                PeerEvent::Down(channel, why) => panic!("{} is down: {why}", channel.as_str()),
                _ => {}
            }
        }
    };
    tokio::time::timeout(DEADLINE, next).await.unwrap()
}

fn recover() -> (RecoverFixed, FenceClaim) {
    let fixed = RecoverFixed {
        recovery: 3,
        failed_generation: 6,
        cause: FailureCause::KernelDead,
    };
    let order = FenceOrder::new(6);
    let proof = order.confirm(FenceMethod::ProcessesKilled, Confirmation::ProcessesGone, 1);
    (fixed, proof.claim())
}

#[tokio::test]
async fn it_is_an_instance_to_the_daemons_end() {
    let instance = Instance::start();
    let (sender, mut events) = mpsc::unbounded_channel();
    let sink = Arc::new(move |event| {
        let _ = sender.send(event);
    });
    let peer = Peer::start(instance.address(), hello("web", 7), 1, sink);
    // On the control channel, the instance first reports its health.
    let status = frame_on(&mut events, Channel::Control).await;
    let Message::HealthStatus(status) = status.message else {
        panic!("{status:?}");
    };
    assert_eq!(status.fixed.health, Health::Healthy);
    let ask = |channel, message| peer.send(channel, 0, message).unwrap();
    let (fixed, fence) = recover();
    let reclaim = |fence| {
        let instance = "db".to_owned();
        Message::RecoverReclaim(RecoverReclaim {
            fixed,
            instance,
            fence,
        })
    };
    ask(Channel::Control, reclaim(fence));
    let answer = frame_on(&mut events, Channel::Control).await.message;
    assert!(matches!(answer, Message::RecoverReclaimReply(reply) if reply.recovery == 3));
    ask(
        Channel::Control,
        reclaim(FenceClaim {
            generation: 5,
            ..fence
        }),
    );
    let answer = frame_on(&mut events, Channel::Control).await.message;
    assert!(matches!(answer, Message::Error(error) if error.code == ErrorCode::NotFenced));
    let own = Message::RecoverReclaim(RecoverReclaim {
        fixed,
        instance: "web".to_owned(),
        fence,
    });
    ask(Channel::Control, own);
    let answer = frame_on(&mut events, Channel::Control).await.message;
    assert!(matches!(answer, Message::Error(error) if error.code == ErrorCode::NotFenced));
    let topology = RecoverComplete {
        fixed: RecoverCompleteFixed {
            recovery: 3,
            failed_generation: 6,
            new_generation: 8,
            outcome: RecoveryOutcome::Recovered,
            part: 0,
            flags: 0,
        },
        instance: "db".to_owned(),
        topology: vec![
            TopologyEntry {
                name: "db".to_owned(),
                generation: 8,
                memory_kib: 1,
                cid: 3,
                cpus: (0..1024).collect(),
            };
            300
        ],
    };
    let parts = topology.into_parts();
    assert_eq!(parts.len(), 3);
    // The second part alone is invalid; then all parts, in order.
    for (n, refused) in [(1, true), (0, false), (1, false), (2, false), (2, true)] {
        ask(Channel::Control, Message::RecoverComplete(parts[n].clone()));
        let answer = frame_on(&mut events, Channel::Control).await.message;
        let error = matches!(&answer, Message::Error(e) if e.code == ErrorCode::UnexpectedInState);
        let reply = matches!(answer, Message::RecoverCompleteReply(_));
        assert_eq!((error, reply), (refused, !refused), "part {n}");
    }
    // The peer refuses a request that it does not support, and the connection continues.
    let request = MorphPrepare {
        session: 1,
        from_generation: 7,
        to_generation: 8,
        downtime_budget_us: 1,
        phase_timeout_ms: 1,
        side: Side::Source,
    };
    ask(Channel::Control, Message::MorphPrepare(request));
    let answer = frame_on(&mut events, Channel::Control).await;
    let Message::Error(error) = answer.message else {
        panic!("{answer:?}");
    };
    assert_eq!(error.code, ErrorCode::UnexpectedInState);
    assert_eq!(error.offending_type, 0x0301);
    assert_eq!(error.offending_sequence, answer.header.sequence);
    for probe in [41, 42] {
        let request = HeartbeatReq {
            probe,
            flags: 0,
            self_lag_us: 0,
        };
        ask(Channel::Heartbeat, Message::HeartbeatReq(request));
        let answer = frame_on(&mut events, Channel::Heartbeat).await.message;
        let Message::HeartbeatRsp(answer) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!(
            (answer.fixed.probe, answer.fixed.health),
            (probe, Health::Healthy)
        );
        assert_eq!(answer.fixed.pressure_cpu, PRESSURE_ABSENT);
    }
}

#[tokio::test]
async fn it_refuses_who_means_another_generation_or_another_instance() {
    let instance = Instance::start();
    for (name, generation, expected) in [
        ("web", 6, ErrorCode::StaleGeneration),
        ("web", 8, ErrorCode::StaleGeneration),
        ("db", 7, ErrorCode::WrongPeer),
    ] {
        let link = connect(&instance.address(), 9000).await.unwrap();
        match greet(link, hello(name, generation)).await {
            Err(ConnectionError::Refused { code, .. }) => assert_eq!(code, expected),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{name} {generation} was welcome"),
        }
    }
}

#[tokio::test]
async fn it_refuses_who_has_not_its_key_and_who_is_older_than_one_before() {
    let instance = Instance::start();
    let refused = async |speaker: Speaker| {
        let link = connect(&instance.address(), 9000).await.unwrap();
        match greet(link, speaker).await {
            Err(ConnectionError::Refused { code, .. }) => Some(code),
            // A daemon with another key rejects the instance's proof as well.
            Err(ConnectionError::Hello(error)) => Some(error.code()),
            Err(other) => panic!("{other}"),
            Ok(_) => None,
        }
    };
    let with = |key, incarnation| Speaker::with_key(plain("web", 7, incarnation), Key::new(key));
    let none = plain("web", 7, 5).into();
    assert_eq!(refused(none).await, Some(ErrorCode::NotAuthentic));
    assert_eq!(
        refused(with([8; 32], 9)).await,
        Some(ErrorCode::NotAuthentic)
    );
    assert_eq!(
        refused(with([7; 32], 5)).await,
        None,
        "9 has not proved itself"
    );
    assert_eq!(
        refused(with([7; 32], 4)).await,
        Some(ErrorCode::OlderDaemon)
    );
    assert_eq!(refused(with([7; 32], 5)).await, None);
    assert_eq!(refused(with([7; 32], 6)).await, None);
    assert_eq!(
        refused(with([7; 32], 5)).await,
        Some(ErrorCode::OlderDaemon)
    );
}

/// Sends raw bytes as the first of a connection, and returns the ERROR that ends the connection.
async fn refused(path: &Path, bytes: &[u8]) -> ErrorInfo {
    let mut stream = tokio::net::UnixStream::connect(path).await.unwrap();
    stream.write_all(b"CONNECT 9000\n").await.unwrap();
    let mut line = [0; 8];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"OK 9000\n");
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    // A close with an unread payload resets the connection, which is an end as well.
    if let Err(error) = tokio::time::timeout(DEADLINE, read).await.unwrap() {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    let mut rest = &answer[..];
    let frame = Decoder::new().feed(&mut rest).unwrap().unwrap();
    assert!(rest.is_empty(), "one ERROR, then the end");
    match frame.message {
        Message::Error(error) => {
            assert_eq!(frame.header.sequence, error.offending_sequence);
            error
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn it_answers_a_broken_stream_with_one_error_and_closes() {
    let instance = Instance::start();
    let mut good = Vec::new();
    encode(&Message::Hello(plain("web", 7, 0)), 1, 1, &mut good).unwrap();
    let changed = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    let (unread, read) = ((0, 0), (0x0001, 1));
    for (bytes, expected, named) in [
        (changed(0, 1), ErrorCode::Malformed, unread),
        (changed(4, 2), ErrorCode::UnsupportedVersion, unread),
        (changed(28, 1), ErrorCode::Malformed, unread),
        (changed(6, 99), ErrorCode::UnknownType, (99, 1)),
        (changed(15, 1), ErrorCode::TooLarge, read),
        (changed(40, 1), ErrorCode::BadCrc, read),
    ] {
        let error = refused(&instance.path(), &bytes).await;
        assert_eq!(error.code, expected);
        assert_eq!((error.offending_type, error.offending_sequence), named);
    }
}
