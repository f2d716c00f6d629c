//! The rules of `docs/kmp.md` for the frames on a connection, tested against a peer that breaks one of them.
//! Each test names its rule. Waits use virtual time.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod hello;
mod raw;

use std::time::Duration;

use hello::hello;
use kmp_proto::codec::{Frame, encode};
use kmp_proto::message::*;
use kmp_proto::wire::{ErrorCode, HEADER_BYTES};
use kmp_transport::connection::{Connection, ConnectionError, FRAME_TIMEOUT, greet, welcome};
use kmp_transport::link::memory;
use kmp_transport::peer::{PROBES_MAX, PeerEvent};
use raw::{Daemon, Raw};
use tokio::io::AsyncWriteExt;

fn probe(number: u32) -> Message {
    Message::HeartbeatReq(HeartbeatReq {
        probe: number,
        flags: 0,
        self_lag_us: 0,
    })
}

fn beat(number: u32) -> Message {
    Message::HeartbeatRsp(HeartbeatRsp::from(HeartbeatRspFixed {
        probe: number,
        health: Health::Healthy,
        workload: WorkloadState::Running,
        cpu_count: 1,
        cpu_busy_permille: 0,
        pressure_cpu: PRESSURE_ABSENT,
        pressure_memory: PRESSURE_ABSENT,
        pressure_io: PRESSURE_ABSENT,
        memory_total_kib: 0,
        memory_available_kib: 0,
        io_read_bytes: 0,
        io_write_bytes: 0,
    }))
}

/// Runs a daemon's greeting, which the instance answers with `reply` and the sequence of HELLO plus `ahead`. Returns
/// the result of the greeting, and the daemon's last frame.
async fn greeted(reply: Message, ahead: u32) -> (Result<(), ConnectionError>, Option<Frame>) {
    let (near, far) = memory();
    let mut raw = Raw::new(far);
    let instance = async {
        let asked = raw.next().await.unwrap();
        raw.send(&reply, asked.header.sequence + ahead).await;
        raw.next().await
    };
    let daemon = async { greet(near, hello(PeerRole::Daemon)).await.map(drop) };
    tokio::join!(daemon, instance)
}

/// A change of a HELLO.
type Change = fn(&mut HelloFixed);

#[tokio::test(start_paused = true)]
async fn each_mismatch_of_a_hello_reply_ends_the_connection_and_is_told() {
    let cases: [(Change, ErrorCode); 6] = [
        (
            |f| (f.version_min, f.version_max) = (0, 0),
            ErrorCode::UnsupportedVersion,
        ),
        (
            |f| (f.version_min, f.version_max) = (2, 1),
            ErrorCode::UnsupportedVersion,
        ),
        (|f| f.role = PeerRole::Daemon, ErrorCode::WrongPeer),
        (|f| f.generation += 1, ErrorCode::StaleGeneration),
        (|f| f.channel = Channel::Heartbeat, ErrorCode::WrongPeer),
        (
            |f| (f.channel, f.session) = (Channel::Bulk, 999),
            ErrorCode::WrongPeer,
        ),
    ];
    for (change, code) in cases {
        let mut reply = hello(PeerRole::Instance);
        change(&mut reply.fixed);
        let (greeted, last) = greeted(Message::HelloReply(reply.clone()), 0).await;
        assert!(
            matches!(greeted, Err(ConnectionError::Hello(_))),
            "{reply:?}"
        );
        let Some(Message::Error(error)) = last.map(|frame| frame.message) else {
            panic!("{reply:?}: not told");
        };
        assert_eq!((error.code, error.offending_type), (code, 0x8001));
    }
    greeted(Message::HelloReply(hello(PeerRole::Instance)), 0)
        .await
        .0
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_hello_reply_carries_the_sequence_of_hello() {
    let reply = Message::HelloReply(hello(PeerRole::Instance));
    let (greeted, _) = greeted(reply, 1).await;
    assert!(matches!(
        greeted,
        Err(ConnectionError::AnswersNothing { sequence: 2, .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_hello_is_refused_and_hello_still_taken() {
    let (near, far) = memory();
    let mut raw = Raw::new(near);
    let own = hello(PeerRole::Instance);
    let daemon = async {
        for sequence in 1..4 {
            raw.send(&probe(1), sequence).await;
            let error = raw.error().await;
            assert_eq!(error.code, ErrorCode::UnexpectedInState);
            assert_eq!(
                (error.offending_type, error.offending_sequence),
                (0x0101, sequence)
            );
        }
        raw.send(&Message::Hello(hello(PeerRole::Daemon)), 4).await;
        let reply = raw.next().await.unwrap();
        assert!(matches!(reply.message, Message::HelloReply(_)));
    };
    let (welcomed, ()) = tokio::join!(welcome(far, &own), daemon);
    welcomed.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stranger_who_never_says_hello_is_closed_in_time_whatever_it_says() {
    let (near, far) = memory();
    let mut raw = Raw::new(near);
    let own = hello(PeerRole::Instance);
    let stranger = async {
        loop {
            raw.send(&probe(1), 1).await;
            raw.error().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let welcomed = tokio::select! {
        welcomed = welcome(far, &own) => welcomed,
        () = stranger => panic!("for ever"),
    };
    assert!(matches!(welcomed, Err(ConnectionError::HelloTimeout)));
}

#[tokio::test(start_paused = true)]
async fn both_sides_use_the_features_that_both_have() {
    let (near, far) = memory();
    let (mut daemon, mut instance) = (hello(PeerRole::Daemon), hello(PeerRole::Instance));
    daemon.fixed.features = features::MORPHS | features::BY_REFERENCE | 1 << 60;
    instance.fixed.features = features::MORPHS | features::READS_LENT_MEMORY;
    let (ours, theirs) = tokio::join!(greet(near, daemon), welcome(far, &instance));
    assert_eq!(ours.unwrap().features, features::MORPHS);
    assert_eq!(theirs.unwrap().features, features::MORPHS);
}

async fn introduced() -> (Raw, Connection) {
    let (near, far) = memory();
    let mut raw = Raw::new(near);
    let own = hello(PeerRole::Instance);
    let daemon = async {
        raw.send(&Message::Hello(hello(PeerRole::Daemon)), 1).await;
        raw.next().await.unwrap();
    };
    let (instance, ()) = tokio::join!(welcome(far, &own), daemon);
    (raw, instance.unwrap())
}

#[tokio::test(start_paused = true)]
async fn half_a_frame_has_a_deadline_that_nothing_beside_it_moves() {
    let mut frame = Vec::new();
    encode(&probe(1), 2, 1, &mut frame).unwrap();
    for half in [1, HEADER_BYTES, frame.len() - 1] {
        let (mut raw, mut instance) = introduced().await;
        raw.link.write_all(&frame[..half]).await.unwrap();
        let begun = tokio::time::Instant::now();
        let end = loop {
            // Like a loop that handles other events as well.
            let next = instance.reader.next();
            match tokio::time::timeout(FRAME_TIMEOUT / 4, next).await {
                Ok(end) => break end,
                Err(_) => assert!(begun.elapsed() < FRAME_TIMEOUT * 2, "{half} bytes"),
            }
        };
        assert!(matches!(end, Err(ConnectionError::HalfFrame)), "{end:?}");
    }
    // Silence between frames has no timeout.
    let (mut raw, mut instance) = introduced().await;
    let silence = tokio::time::timeout(FRAME_TIMEOUT * 10, instance.reader.next());
    assert!(silence.await.is_err());
    raw.send(&probe(1), 2).await;
    instance.reader.next().await.unwrap();
}

fn reply(recovery: u64) -> Message {
    Message::RecoverPrepareReply(RecoverReply {
        recovery,
        elapsed_ms: 0,
    })
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_what_was_never_sent_ends_the_channel() {
    let retry = Message::Retry(RetryAfter {
        retry_after_ms: 1,
        reason: ErrorCode::Busy,
        offending_type: 0x0201,
        offending_sequence: 99,
    });
    for answer in [reply(1), retry] {
        let mut daemon = Daemon::start();
        let mut raw = daemon.channel(Channel::Control).await;
        // The sequence of HELLO was 1.
        raw.send(&answer, 99).await;
        let why = daemon.down(Channel::Control).await;
        assert!(why.contains("does not answer any request"), "{why}");
        assert!(raw.next().await.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_heartbeat_is_answered_once_with_its_own_sequence_and_number() {
    for (number, ahead) in [(8, 0), (7, 1)] {
        let mut daemon = Daemon::start();
        let mut raw = daemon.channel(Channel::Heartbeat).await;
        daemon.peer.send(Channel::Heartbeat, 0, probe(7)).unwrap();
        let asked = raw.next().await.unwrap();
        raw.send(&beat(number), asked.header.sequence + ahead).await;
        let why = daemon.down(Channel::Heartbeat).await;
        assert!(why.contains("does not answer any request"), "{why}");
    }
    let mut daemon = Daemon::start();
    let mut raw = daemon.channel(Channel::Heartbeat).await;
    daemon.peer.send(Channel::Heartbeat, 0, probe(7)).unwrap();
    let asked = raw.next().await.unwrap();
    for _ in 0..2 {
        raw.send(&beat(7), asked.header.sequence).await;
    }
    let why = daemon.down(Channel::Heartbeat).await;
    assert!(why.contains("does not answer any request"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn so_many_probes_wait_at_most_and_each_answer_makes_room() {
    let mut daemon = Daemon::start();
    let mut raw = daemon.channel(Channel::Heartbeat).await;
    let mut sequences = Vec::new();
    for number in 1..=3 * u32::try_from(PROBES_MAX).unwrap() {
        daemon
            .peer
            .send(Channel::Heartbeat, 0, probe(number))
            .unwrap();
        // Lets the daemon take the probe from the queue before the next one is queued.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for number in 1..=u32::try_from(PROBES_MAX).unwrap() {
        let asked = raw.next().await.unwrap();
        assert_eq!(asked.message, probe(number));
        sequences.push(asked.header.sequence);
    }
    let more = tokio::time::timeout(Duration::from_secs(1), raw.next());
    assert!(more.await.is_err(), "a probe too many");
    raw.send(&beat(1), sequences[0]).await;
    while !matches!(daemon.event().await, PeerEvent::Frame(..)) {}
    daemon.peer.send(Channel::Heartbeat, 0, probe(99)).unwrap();
    assert_eq!(raw.next().await.unwrap().message, probe(99));
}

#[tokio::test(start_paused = true)]
async fn an_answer_on_the_wrong_channel_ends_it() {
    let mut daemon = Daemon::start();
    let mut raw = daemon.channel(Channel::Heartbeat).await;
    raw.send(&reply(1), 1).await;
    let why = daemon.down(Channel::Heartbeat).await;
    assert!(why.contains("wrong channel"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn the_daemon_refuses_what_an_instance_does_not_send_and_goes_on() {
    let status = Message::HealthStatus(HealthStatus {
        fixed: HealthStatusFixed {
            health: Health::Healthy,
            workload: WorkloadState::None,
            flags: 0,
            exit_status: 0,
            restarts: 0,
        },
        text: String::new(),
    });
    for (channel, message, msg_type) in [
        (Channel::Heartbeat, status, 0x0103),
        (Channel::Control, probe(1), 0x0101),
        (
            Channel::Control,
            Message::Hello(hello(PeerRole::Daemon)),
            0x0001,
        ),
    ] {
        let mut daemon = Daemon::start();
        let mut raw = daemon.channel(channel).await;
        for sequence in [5, 6] {
            raw.send(&message, sequence).await;
            let error = raw.error().await;
            assert_eq!(error.code, ErrorCode::UnexpectedInState);
            assert_eq!(
                (error.offending_type, error.offending_sequence),
                (msg_type, sequence)
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_daemon_tells_a_bad_frame_by_type_and_sequence_on_each_channel() {
    for channel in [Channel::Heartbeat, Channel::Control] {
        let mut daemon = Daemon::start();
        let mut raw = daemon.channel(channel).await;
        let mut bytes = Vec::new();
        encode(&beat(1), 77, 1, &mut bytes).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        raw.link.write_all(&bytes).await.unwrap();
        let error = raw.error().await;
        assert_eq!(error.code, ErrorCode::BadCrc);
        assert_eq!(
            (error.offending_type, error.offending_sequence),
            (0x0102, 77)
        );
        assert!(raw.next().await.is_none(), "and closes");
        let why = daemon.down(channel).await;
        assert!(why.contains("checksum"), "{why}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_ends_a_channel_by_its_code() {
    for (code, ends) in [
        (ErrorCode::StaleGeneration, true),
        (ErrorCode::Malformed, true),
        (ErrorCode::UnexpectedInState, false),
        (ErrorCode::Busy, false),
        (ErrorCode::Other(999), false),
    ] {
        let mut daemon = Daemon::start();
        let mut raw = daemon.channel(Channel::Control).await;
        let error = Message::Error(ErrorInfo {
            code,
            offending_type: 0x0001,
            offending_sequence: 1,
            text: "no".to_owned(),
        });
        raw.send(&error, 1).await;
        while !matches!(daemon.event().await, PeerEvent::Frame(..)) {}
        if ends {
            daemon.down(Channel::Control).await;
        } else {
            raw.send(&probe(1), 5).await;
            raw.error().await;
        }
    }
}

#[test]
fn the_bounds_on_the_page_are_those_in_force() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kmp.md");
    let page = std::fs::read_to_string(path).unwrap();
    let probes = format!("At most **{PROBES_MAX}** probes wait for their answer");
    assert!(page.contains(&probes), "{probes}");
    let half = format!("**{} s** after the first byte", FRAME_TIMEOUT.as_secs());
    assert!(page.contains(&half), "{half}");
}
