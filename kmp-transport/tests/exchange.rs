//! Rules of `docs/kmp.md` for the HELLO exchange: the order of its checks, its timeout, the fields that change in each
//! exchange, and the violations that later end a connection. Each test names its rule. Waits use virtual time.

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
use kmp_proto::auth::Key;
use kmp_proto::codec::encode;
use kmp_proto::message::*;
use kmp_proto::wire::{ErrorCode, HEADER_BYTES};
use kmp_transport::connection::{ConnectionError, FRAME_TIMEOUT, HELLO_TIMEOUT, greet, welcome};
use kmp_transport::link::memory;
use kmp_transport::peer::PeerEvent;
use kmp_transport::speaker::Speaker;
use raw::{Daemon, Raw};
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

const KEY: [u8; 32] = [7; 32];

fn speaker(role: PeerRole, incarnation: u64) -> Speaker {
    let mut hello = hello(role);
    hello.fixed.incarnation = incarnation;
    Speaker::with_key(hello, Key::new(KEY))
}

/// Returns the HELLO of a daemon, as on the wire.
fn asked(incarnation: u64) -> Hello {
    let mut asked = hello(PeerRole::Daemon);
    asked.fixed.incarnation = incarnation;
    asked.nonce = Some([1; 32]);
    asked
}

/// Returns the reply to `asked` from an instance that has the key.
fn reply_to(asked: &Hello) -> Hello {
    let mut reply = hello(PeerRole::Instance);
    reply.nonce = Some([2; 32]);
    reply.proof = Some(Key::new(KEY).proof(PeerRole::Instance, asked, &reply));
    reply
}

async fn next_hello(raw: &mut Raw) -> Hello {
    match raw.next().await.unwrap().message {
        Message::Hello(hello) | Message::HelloReply(hello) => hello,
        other => panic!("{other:?}"),
    }
}

/// A change that one check finds, the error code of the answer, and words of its text.
type Broken = (fn(&mut Hello), ErrorCode, &'static str);

/// Applies all changes from `first` on, so that the check of `first` is the first to fail.
fn broken_from(good: &Hello, cases: &[Broken], first: usize) -> Hello {
    let mut hello = good.clone();
    for (change, _, _) in &cases[first..] {
        change(&mut hello);
    }
    hello
}

#[tokio::test(start_paused = true)]
async fn the_checks_of_hello_come_in_their_order() {
    let instance = speaker(PeerRole::Instance, 0);
    let (near, far) = memory();
    let (newer, _) = tokio::join!(
        greet(near, speaker(PeerRole::Daemon, 5)),
        welcome(far, &instance)
    );
    newer.unwrap();
    let cases: [Broken; 6] = [
        (
            |h| (h.fixed.version_min, h.fixed.version_max) = (2, 3),
            ErrorCode::UnsupportedVersion,
            "versions",
        ),
        (
            |h| h.fixed.role = PeerRole::Instance,
            ErrorCode::WrongPeer,
            "expected was daemon",
        ),
        (
            |h| h.instance = "other".to_owned(),
            ErrorCode::WrongPeer,
            "\"other\"",
        ),
        (
            |h| h.fixed.generation += 1,
            ErrorCode::StaleGeneration,
            "generation",
        ),
        (
            |h| h.fixed.incarnation = 4,
            ErrorCode::OlderDaemon,
            "daemon 4",
        ),
        (|h| h.nonce = None, ErrorCode::NotAuthentic, "prove"),
    ];
    for (n, (_, code, words)) in cases.iter().enumerate() {
        let (near, far) = memory();
        let mut raw = Raw::new(near);
        let dialogue = async {
            let broken = broken_from(&asked(5), &cases, n);
            raw.send(&Message::Hello(broken), 3).await;
            let error = raw.error().await;
            (error, raw.next().await.is_none())
        };
        let ((error, closed), _) = tokio::join!(dialogue, welcome(far, &instance));
        assert_eq!(
            (error.code, error.offending_sequence),
            (*code, 3),
            "{words}"
        );
        assert!(error.text.contains(words), "{words}: {}", error.text);
        assert!(closed, "{words}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_checks_of_a_hello_reply_come_in_their_order() {
    let cases: [Broken; 6] = [
        (
            |h| (h.fixed.version_min, h.fixed.version_max) = (2, 3),
            ErrorCode::UnsupportedVersion,
            "versions",
        ),
        (
            |h| h.fixed.role = PeerRole::Daemon,
            ErrorCode::WrongPeer,
            "expected was instance",
        ),
        (
            |h| h.instance = "other".to_owned(),
            ErrorCode::WrongPeer,
            "\"other\"",
        ),
        (
            |h| h.fixed.generation += 1,
            ErrorCode::StaleGeneration,
            "generation",
        ),
        (|h| h.proof = None, ErrorCode::NotAuthentic, "prove"),
        (
            |h| h.fixed.channel = Channel::Heartbeat,
            ErrorCode::WrongPeer,
            "channel",
        ),
    ];
    for (n, (_, code, words)) in cases.iter().enumerate() {
        let (near, far) = memory();
        let mut raw = Raw::new(far);
        let dialogue = async {
            let asked = next_hello(&mut raw).await;
            let mut broken = broken_from(&reply_to(&asked), &cases, n);
            // A proof covers the message as sent, even if the message is invalid.
            let proof = Key::new(KEY).proof(PeerRole::Instance, &asked, &broken);
            broken.proof = broken.proof.map(|_| proof);
            raw.send(&Message::HelloReply(broken), 1).await;
            let error = raw.error().await;
            (error, raw.next().await.is_none())
        };
        let greeting = async { greet(near, speaker(PeerRole::Daemon, 5)).await.map(drop) };
        let ((error, closed), greeted) = tokio::join!(dialogue, greeting);
        assert!(greeted.is_err(), "{words}");
        assert_eq!(
            (error.code, error.offending_type),
            (*code, 0x8001),
            "{words}"
        );
        assert!(error.text.contains(words), "{words}: {}", error.text);
        assert!(closed, "{words}");
    }
}

#[tokio::test(start_paused = true)]
async fn each_side_has_a_new_nonce_for_each_connection() {
    let (daemon, instance) = (speaker(PeerRole::Daemon, 5), speaker(PeerRole::Instance, 0));
    let mut nonces = Vec::new();
    for _ in 0..2 {
        let (near, far) = memory();
        let mut raw = Raw::new(far);
        let first = async { next_hello(&mut raw).await.nonce };
        tokio::select! {
            nonce = first => nonces.push(nonce.unwrap()),
            _ = greet(near, &daemon) => panic!("nobody answered"),
        }
        let (near, far) = memory();
        let mut raw = Raw::new(near);
        let reply = async {
            raw.send(&Message::Hello(asked(5)), 1).await;
            next_hello(&mut raw).await.nonce
        };
        tokio::select! {
            nonce = reply => nonces.push(nonce.unwrap()),
            _ = welcome(far, &instance) => panic!("nobody proved anything"),
        }
    }
    nonces.sort_unstable();
    nonces.dedup();
    assert_eq!(nonces.len(), 4, "{nonces:?}");
}

#[tokio::test(start_paused = true)]
async fn the_newest_incarnation_that_has_proved_itself_is_said_in_replies() {
    let instance = speaker(PeerRole::Instance, 0);
    for (incarnation, seen) in [(5, 0), (9, 5), (9, 9)] {
        let (near, far) = memory();
        let mut raw = Raw::new(near);
        let dialogue = async {
            let asked = asked(incarnation);
            raw.send(&Message::Hello(asked.clone()), 1).await;
            let reply = next_hello(&mut raw).await;
            let proof = Key::new(KEY).proof(PeerRole::Daemon, &asked, &reply);
            raw.send(&Message::Authenticate(Authenticate { proof }), 2)
                .await;
            let answer = raw.next().await.unwrap().message;
            (reply.fixed.incarnation, answer)
        };
        let ((said, answer), _) = tokio::join!(dialogue, welcome(far, &instance));
        assert_eq!(said, seen);
        let believed = Authenticated { incarnation };
        assert_eq!(answer, Message::AuthenticateReply(believed));
    }
}

#[tokio::test(start_paused = true)]
async fn all_of_the_exchange_has_two_seconds_on_either_side() {
    let late = HELLO_TIMEOUT * 3 / 4;
    let (near, far) = memory();
    let mut raw = Raw::new(near);
    let begun = Instant::now();
    let stranger = async {
        tokio::time::sleep(late).await;
        raw.send(&Message::Hello(asked(5)), 1).await;
        next_hello(&mut raw).await;
        std::future::pending::<()>().await;
    };
    let instance = speaker(PeerRole::Instance, 0);
    tokio::select! {
        welcomed = welcome(far, &instance) => {
            assert!(matches!(welcomed, Err(ConnectionError::HelloTimeout)));
        }
        () = stranger => {}
    }
    assert_eq!(begun.elapsed().as_secs(), HELLO_TIMEOUT.as_secs());
    let (near, far) = memory();
    let mut raw = Raw::new(far);
    let begun = Instant::now();
    let slow = async {
        let asked = next_hello(&mut raw).await;
        tokio::time::sleep(late).await;
        raw.send(&Message::HelloReply(reply_to(&asked)), 1).await;
        let proof = raw.next().await.unwrap();
        assert!(matches!(proof.message, Message::Authenticate(_)));
        std::future::pending::<()>().await;
    };
    tokio::select! {
        greeted = greet(near, speaker(PeerRole::Daemon, 5)) => {
            assert!(matches!(greeted, Err(ConnectionError::HelloTimeout)));
        }
        () = slow => {}
    }
    assert_eq!(begun.elapsed().as_secs(), HELLO_TIMEOUT.as_secs());
    assert_eq!(HELLO_TIMEOUT.as_secs(), 2);
}

fn damaged(message: &Message, sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(message, sequence, 1, &mut bytes).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    bytes
}

/// The first two answers to a daemon: the reply to HELLO, and the reply to AUTHENTICATE.
#[tokio::test(start_paused = true)]
async fn a_daemon_tells_of_a_bad_frame_in_place_of_either_answer() {
    for spoiled in [1, 2] {
        let (near, far) = memory();
        let mut raw = Raw::new(far);
        let dialogue = async {
            let asked = next_hello(&mut raw).await;
            let reply = Message::HelloReply(reply_to(&asked));
            if spoiled == 1 {
                raw.link.write_all(&damaged(&reply, 1)).await.unwrap();
            } else {
                raw.send(&reply, 1).await;
                raw.next().await.unwrap();
                let believed = Message::AuthenticateReply(Authenticated { incarnation: 5 });
                raw.link.write_all(&damaged(&believed, 2)).await.unwrap();
            }
            let told = raw.next().await.unwrap();
            assert_eq!(told.header.sequence, spoiled);
            let Message::Error(error) = told.message else {
                panic!("{told:?}");
            };
            assert_eq!(error.code, ErrorCode::BadCrc);
            assert_eq!(u32::from(error.offending_type), 0x8000 + spoiled);
            assert!(raw.next().await.is_none(), "and closes");
        };
        let greeting = async { greet(near, speaker(PeerRole::Daemon, 5)).await.map(drop) };
        let (greeted, ()) = tokio::join!(greeting, dialogue);
        assert!(matches!(greeted, Err(ConnectionError::Frame(_))));
    }
}

#[tokio::test(start_paused = true)]
async fn half_a_frame_ends_a_daemons_channel_without_an_error() {
    let mut daemon = Daemon::start();
    let mut raw = daemon.channel(Channel::Control).await;
    let begun = Instant::now();
    raw.link.write_all(&[0; HEADER_BYTES - 1]).await.unwrap();
    assert!(raw.next().await.is_none(), "nothing is said");
    let took = begun.elapsed();
    assert!(
        took >= FRAME_TIMEOUT && took < FRAME_TIMEOUT * 2,
        "{took:?}"
    );
    let why = daemon.down(Channel::Control).await;
    assert!(why.contains("not complete"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn an_error_that_ends_the_connection_is_taken_whatever_its_sequence() {
    for (code, sequence) in [
        (ErrorCode::BadCrc, 0),
        (ErrorCode::Malformed, 99),
        (ErrorCode::OlderDaemon, u32::MAX),
    ] {
        let mut daemon = Daemon::start();
        let mut raw = daemon.channel(Channel::Control).await;
        let error = ErrorInfo {
            code,
            offending_type: 0,
            offending_sequence: sequence,
            text: "the last word".to_owned(),
        };
        raw.send(&Message::Error(error), sequence).await;
        let told = loop {
            match daemon.event().await {
                PeerEvent::Frame(_, frame) => break frame.message,
                PeerEvent::Down(_, why) => panic!("it was not taken: {why}"),
                _ => {}
            }
        };
        assert!(matches!(told, Message::Error(error) if error.code == code));
        let why = daemon.down(Channel::Control).await;
        assert!(why.contains("the last word"), "{why}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_daemon_says_hello_as_soon_as_it_is_connected_on_each_channel_once() {
    let mut daemon = Daemon::start();
    for channel in [Channel::Heartbeat, Channel::Control] {
        let begun = Instant::now();
        let mut raw = daemon.channel(channel).await;
        assert!(begun.elapsed() < Duration::from_secs(1));
        let more = tokio::time::timeout(Duration::from_secs(60), raw.next());
        assert!(more.await.is_err(), "it says nothing unasked");
        let probe = Message::HeartbeatReq(HeartbeatReq {
            probe: 1,
            flags: 0,
            self_lag_us: 0,
        });
        daemon.peer.send(channel, 0, probe.clone()).unwrap();
        assert_eq!(raw.next().await.unwrap().message, probe, "it lives");
        daemon = Daemon::start();
    }
}
