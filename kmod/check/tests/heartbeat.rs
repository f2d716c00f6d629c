//! The kernel's heartbeat responder against the protocol's own codec.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use kmorph_kmod_check::Responder;
use kmp_proto::codec::{Decoder, FrameFault, encode};
use kmp_proto::message::{
    Authenticate, Channel, HeartbeatReq, Hello, HelloFixed, Message, PRESSURE_ABSENT, PeerRole,
    RecoverReply,
};
use kmp_proto::wire::{ErrorCode, MsgType};
use proptest::prelude::*;

fn hello(instance: &str, generation: u64) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: 1,
            version_max: 1,
            role: PeerRole::Daemon,
            channel: Channel::Heartbeat,
            flags: 0,
            generation,
            boot_id: [1; 16],
            features: 3,
            session: 0,
            incarnation: 0,
        },
        instance: instance.to_owned(),
        kernel_release: "6.1.0".to_owned(),
        agent_version: "1".to_owned(),
        nonce: None,
        proof: None,
    }
}

fn request(probe: u32) -> Message {
    Message::HeartbeatReq(HeartbeatReq {
        probe,
        flags: 0,
        self_lag_us: 5,
    })
}

fn frame(message: &Message, sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(message, sequence, 99, &mut bytes).unwrap();
    bytes
}

/// What was answered, as sequence and message.
fn decode(bytes: &[u8]) -> Vec<(u32, Message)> {
    let (mut decoder, mut input, mut found) = (Decoder::new(), bytes, Vec::new());
    while let Some(frame) = decoder.feed(&mut input).unwrap() {
        found.push((frame.header.sequence, frame.message));
    }
    assert_eq!(decoder.buffered(), 0);
    found
}

fn greeted() -> Responder {
    let mut responder = Responder::new("web", 7);
    let greeting = frame(&Message::Hello(hello("web", 7)), 1);
    assert!(responder.feed(&greeting).1);
    responder
}

/// Asks once; the code of the error that it is answered with, which ends the connection or does not.
fn error(responder: &mut Responder, bytes: &[u8]) -> (ErrorCode, u32) {
    let (answer, goes_on) = responder.feed(bytes);
    match decode(&answer).as_slice() {
        [(sequence, Message::Error(info))] => {
            assert_eq!(*sequence, info.offending_sequence);
            assert_eq!(goes_on, !info.code.ends(Channel::Heartbeat));
            (info.code, info.offending_sequence)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn hello_and_heartbeats_are_answered_however_they_are_cut() {
    let mut stream = frame(&Message::Hello(hello("web", 7)), 1);
    stream.extend(frame(&request(41), 2));
    stream.extend(frame(&request(42), 3));
    for cut in [1, 7, 48, stream.len()] {
        let mut responder = Responder::new("web", 7);
        let mut answers = Vec::new();
        for piece in stream.chunks(cut) {
            let (answer, goes_on) = responder.feed(piece);
            assert!(goes_on);
            answers.extend(answer);
        }
        assert!(answers.len() < 512);
        let answers = decode(&answers);
        let [
            (1, Message::HelloReply(reply)),
            (2, Message::HeartbeatRsp(first)),
            (3, second),
        ] = answers.as_slice()
        else {
            panic!("{answers:?}");
        };
        assert_eq!(reply.fixed.role, PeerRole::Instance);
        assert_eq!(reply.fixed.channel, Channel::Heartbeat);
        assert_eq!(reply.fixed.generation, 7);
        assert_eq!(reply.fixed.boot_id, [7; 16]);
        assert_eq!(reply.instance, "web");
        assert_eq!(reply.kernel_release, "6.12.0-test");
        assert_eq!((first.fixed.probe, first.fixed.cpu_count), (41, 2));
        assert_eq!(first.fixed.pressure_cpu, PRESSURE_ABSENT);
        assert_eq!(first.fixed.memory_total_kib, 1000);
        assert_eq!(first.fixed.memory_available_kib, 600);
        assert!(matches!(second, Message::HeartbeatRsp(r) if r.fixed.probe == 42));
    }
}

#[test]
fn who_means_another_is_refused() {
    let mut wrong_channel = hello("web", 7);
    wrong_channel.fixed.channel = Channel::Control;
    let mut wrong_role = hello("web", 7);
    wrong_role.fixed.role = PeerRole::Instance;
    let mut newer = hello("web", 7);
    (newer.fixed.version_min, newer.fixed.version_max) = (2, 3);
    for (hello, code) in [
        (hello("web", 6), ErrorCode::StaleGeneration),
        (hello("web2", 7), ErrorCode::WrongPeer),
        (hello("we", 7), ErrorCode::WrongPeer),
        (wrong_channel, ErrorCode::UnexpectedInState),
        (wrong_role, ErrorCode::WrongPeer),
        (newer, ErrorCode::UnsupportedVersion),
    ] {
        let bytes = frame(&Message::Hello(hello.clone()), 9);
        let refused = error(&mut Responder::new("web", 7), &bytes);
        assert_eq!(refused, (code, 9), "{hello:?}");
    }
}

#[test]
fn after_what_was_refused_with_code_5_the_connection_serves() {
    let mut responder = Responder::new("web", 7);
    let mut stream = frame(&request(1), 4);
    let mut control = hello("web", 7);
    control.fixed.channel = Channel::Control;
    stream.extend(frame(&Message::Hello(control), 5));
    stream.extend(frame(&Message::Hello(hello("web", 7)), 6));
    stream.extend(frame(&request(2), 7));
    let (answer, goes_on) = responder.feed(&stream);
    assert!(goes_on);
    assert!(matches!(
        decode(&answer).as_slice(),
        [
            (4, Message::Error(_)),
            (5, Message::Error(_)),
            (6, Message::HelloReply(_)),
            (7, Message::HeartbeatRsp(_)),
        ]
    ));
}

#[test]
fn what_is_not_asked_of_a_kernel_is_refused() {
    let early = frame(&request(1), 4);
    let refused = error(&mut Responder::new("web", 7), &early);
    assert_eq!(refused, (ErrorCode::UnexpectedInState, 4));
    let again = frame(&Message::Hello(hello("web", 7)), 5);
    assert_eq!(
        error(&mut greeted(), &again),
        (ErrorCode::UnexpectedInState, 5)
    );
}

#[test]
fn nothing_answers_an_answer() {
    let reply = Message::RecoverPrepareReply(RecoverReply {
        recovery: 1,
        elapsed_ms: 1,
    });
    let mut bytes = frame(&reply, 6);
    bytes.extend(frame(&request(3), 7));
    let (answer, goes_on) = greeted().feed(&bytes);
    assert!(goes_on);
    assert!(matches!(
        decode(&answer).as_slice(),
        [(7, Message::HeartbeatRsp(_))]
    ));
}

#[test]
fn each_check_of_a_frame_has_its_code_and_names_the_frame_once_its_header_could_be_read() {
    for (at, value, code, sequence) in [
        (0, 0xff, ErrorCode::Malformed, 0),
        (4, 2, ErrorCode::UnsupportedVersion, 0),
        (6, 0x77, ErrorCode::UnknownType, 8),
        (7, 0x80, ErrorCode::UnknownType, 8),
        (14, 1, ErrorCode::TooLarge, 8),
        (24, 0xff, ErrorCode::BadCrc, 8),
        (28, 1, ErrorCode::Malformed, 0),
        (32, 0xff, ErrorCode::BadCrc, 8),
    ] {
        let mut bytes = frame(&request(1), 8);
        bytes[at] ^= value;
        assert_eq!(error(&mut greeted(), &bytes), (code, sequence), "{at}");
    }
}

/// Makes the checksum right.
fn seal(bytes: &mut [u8]) {
    bytes[24..28].fill(0);
    let crc = kmp_proto::checksum::crc32(&[bytes]);
    bytes[24..28].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn what_is_not_served_is_refused_whatever_its_payload_holds() {
    // The payload of a heartbeat, as that of HELLO, RECOVER_PREPARE and MORPH_PREPARE.
    for msg_type in [0x0001u16, 0x0201, 0x0301] {
        let mut bytes = frame(&request(1), 8);
        bytes[6..8].copy_from_slice(&msg_type.to_le_bytes());
        seal(&mut bytes);
        let refused = error(&mut greeted(), &bytes);
        assert_eq!(refused, (ErrorCode::UnexpectedInState, 8), "{msg_type:#x}");
    }
}

#[test]
fn a_payload_of_1024_bytes_is_taken_and_a_longer_one_is_too_large() {
    // Of a type that may have more, and that no kernel is asked for.
    let recover_prepare = 0x0201_u16;
    for (length, code) in [
        (1024_u32, ErrorCode::UnexpectedInState),
        (1025, ErrorCode::TooLarge),
    ] {
        let mut bytes = frame(&request(1), 8);
        bytes[6..8].copy_from_slice(&recover_prepare.to_le_bytes());
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
        bytes.resize(32 + 1024, 0);
        seal(&mut bytes);
        assert_eq!(error(&mut greeted(), &bytes), (code, 8), "{length}");
    }
}

#[test]
fn nobody_proves_anything_to_a_kernel() {
    let proof = Message::Authenticate(Authenticate { proof: [1; 32] });
    let refused = error(&mut greeted(), &frame(&proof, 2));
    assert_eq!(refused, (ErrorCode::UnexpectedInState, 2));
    let asked = frame(&Message::Hello(hello("web", 7)), 1);
    let (answer, goes_on) = Responder::new("web", 7).feed(&asked);
    assert!(goes_on);
    let answers = decode(&answer);
    let [(1, Message::HelloReply(reply))] = answers.as_slice() else {
        panic!("{answers:?}");
    };
    assert_eq!((reply.nonce, reply.proof), (None, None));
}

proptest! {
    /// Its verdict on a damaged stream is that of the protocol's own decoder.
    #[test]
    fn it_judges_like_the_codec(
        at in 0usize..48,
        flip in 1u8..,
        sealed in any::<bool>(),
        cut in 1usize..60,
    ) {
        let mut bytes = frame(&request(1), 8);
        bytes[at] ^= flip;
        if sealed {
            seal(&mut bytes);
        }
        let expected = Decoder::new().feed(&mut &bytes[..]).map(|frame| frame.map(|f| f.message));
        let named = expected.as_ref().err().map_or(0, |error| error.answer().offending_sequence);
        let mut responder = greeted();
        let (mut answers, mut open) = (Vec::new(), true);
        for piece in bytes.chunks(cut) {
            if open {
                let (answer, goes_on) = responder.feed(piece);
                answers.extend(answer);
                open = goes_on;
            }
        }
        let answers = decode(&answers);
        match expected {
            // What it does not serve is refused, or as an answer ignored, whatever its payload holds.
            Err(error) if matches!(error.fault, FrameFault::Layout { msg_type, .. } if msg_type != MsgType::HeartbeatReq) => {
                let refused = matches!(answers.as_slice(), [(_, Message::Error(i))] if i.code == ErrorCode::UnexpectedInState);
                prop_assert!(answers.is_empty() || refused, "{answers:?}");
            }
            Err(error) => {
                let code = matches!(answers.as_slice(), [(sequence, Message::Error(i))] if i.code == error.code() && *sequence == named);
                prop_assert!(code && !open, "{error:?} {answers:?}");
            }
            Ok(None) => {
                // Longer than it says it is; or, too long to be kept here, of another channel.
                let other = matches!(answers.as_slice(), [(_, Message::Error(i))] if i.code == ErrorCode::TooLarge);
                prop_assert!(answers.is_empty() || other);
            }
            Ok(Some(Message::HeartbeatReq(_))) => {
                let answered = matches!(answers.as_slice(), [(_, Message::HeartbeatRsp(_))]);
                prop_assert!(answered && open, "{answers:?}");
            }
            Ok(Some(message)) => prop_assert_eq!(answers.is_empty(), message.is_answer()),
        }
    }

    #[test]
    fn garbage_ends_in_one_error(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let (answer, _) = greeted().feed(&bytes);
        prop_assert!(answer.len() <= 48);
    }
}
