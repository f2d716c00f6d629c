//! Rules of `docs/kmp.md` on well-formed messages: the reply to each request, the channel of each message, and the
//! limits that peers announce. Each test names its rule.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod samples;

use kmp_proto::codec::encode;
use kmp_proto::message::*;
use kmp_proto::wire::{ErrorCode, MsgType};

fn sample(name: &str) -> Message {
    let mut samples = samples::samples().into_iter();
    samples.find(|sample| sample.0 == name).unwrap().3
}

/// Returns the expectation of the golden request of this name for its reply.
fn expected(name: &str) -> Expected {
    Expected::of(&sample(name)).unwrap()
}

fn field(reply: &Message, request: &str) -> &'static str {
    match expected(request).check(reply) {
        Err(ReplyError::OtherField { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_reply_of_another_type_is_refused() {
    for (name, _, _, message) in samples::samples() {
        let Some(expected) = Expected::of(&message) else {
            let nothing = message.is_answer() || !message.msg_type().has_reply();
            assert!(nothing, "{name} has a reply");
            continue;
        };
        for (other, _, _, reply) in samples::samples() {
            let same = reply.is_reply() && reply.msg_type() == message.msg_type();
            let refused = matches!(expected.check(&reply), Err(ReplyError::OtherType { .. }));
            assert_eq!(refused, !same, "{other} to {name}");
        }
    }
}

#[test]
fn a_reply_about_another_recovery_capture_or_session_is_refused() {
    let recovery = RecoverReply {
        recovery: 99,
        elapsed_ms: 0,
    };
    let capture = VmcoreComplete {
        capture: 99,
        bytes: 0,
        status: CaptureStatus::Complete,
    };
    let session = SessionReply { session: 99 };
    let Message::MorphNegotiateReply(mut negotiate) = sample("morph_negotiate_reply") else {
        panic!("another message");
    };
    negotiate.session = 99;
    let Message::MorphValidateReply(mut validate) = sample("morph_validate_reply") else {
        panic!("another message");
    };
    validate.fixed.session = 99;
    let rollback = RollbackReply {
        session: 99,
        status: RollbackStatus::Running,
    };
    for (request, reply, name) in [
        (
            "recover_prepare",
            Message::RecoverPrepareReply(recovery),
            "recovery",
        ),
        (
            "recover_reclaim",
            Message::RecoverReclaimReply(recovery),
            "recovery",
        ),
        (
            "recover_complete",
            Message::RecoverCompleteReply(recovery),
            "recovery",
        ),
        (
            "vmcore_start",
            Message::VmcoreStartReply(capture),
            "capture",
        ),
        (
            "vmcore_complete",
            Message::VmcoreCompleteReply(capture),
            "capture",
        ),
        (
            "morph_prepare",
            Message::MorphPrepareReply(session),
            "session",
        ),
        (
            "morph_negotiate",
            Message::MorphNegotiateReply(negotiate),
            "session",
        ),
        (
            "morph_validate",
            Message::MorphValidateReply(validate),
            "session",
        ),
        (
            "morph_rollback",
            Message::MorphRollbackReply(rollback),
            "session",
        ),
    ] {
        assert_eq!(field(&reply, request), name, "{request}");
    }
}

#[test]
fn a_commit_reply_repeats_session_nonce_and_step() {
    let Message::MorphCommitReply(good) = sample("morph_commit_reply") else {
        panic!("another message");
    };
    let reply = |changed| Message::MorphCommitReply(changed);
    expected("morph_commit").check(&reply(good)).unwrap();
    let session = CommitReply {
        session: 999,
        ..good
    };
    let nonce = CommitReply { nonce: 1, ..good };
    let step = CommitReply {
        step: CommitStep::Serve,
        ..good
    };
    for (changed, name) in [(session, "session"), (nonce, "nonce"), (step, "step")] {
        assert_eq!(field(&reply(changed), "morph_commit"), name);
    }
}

#[test]
fn an_applied_reply_repeats_session_round_mode_provider_and_whether_it_is_the_last() {
    let Message::MorphTransfer(request) = sample("morph_transfer_state") else {
        panic!("another message");
    };
    let expected = Expected::of(&Message::MorphTransfer(request.clone())).unwrap();
    let reply = |change: fn(&mut MorphTransferFixed)| {
        let mut reply = MorphTransfer {
            data: Vec::new(),
            ..request.clone()
        };
        reply.fixed.op = TransferOp::Applied;
        change(&mut reply.fixed);
        expected.check(&Message::MorphTransferReply(reply))
    };
    reply(|_| ()).unwrap();
    for (refused, name) in [
        (reply(|f| f.session = 999), "session"),
        (reply(|f| f.round = 99), "round"),
        (reply(|f| f.mode = TransferMode::ByReference), "mode"),
        (reply(|f| f.provider = StateProvider::Other(64)), "provider"),
        (reply(|f| f.flags = 0), "flags"),
    ] {
        assert!(matches!(refused, Err(ReplyError::OtherField { field, .. }) if field == name));
    }
    let pulled = reply(|f| f.op = TransferOp::Pull);
    assert_eq!(pulled, Err(ReplyError::NotApplied(TransferOp::Pull)));
}

fn hellos() -> (Hello, Hello) {
    let (Message::Hello(mut daemon), Message::HelloReply(instance)) =
        (sample("hello"), sample("hello_reply"))
    else {
        panic!("other messages");
    };
    (daemon.fixed.channel, daemon.fixed.session) = (Channel::Heartbeat, 0);
    (daemon, instance)
}

/// A change of a HELLO.
type Change = fn(&mut Hello);

#[test]
fn hello_and_its_reply_are_checked_alike_each_mismatch_with_its_code() {
    let (daemon, instance) = hellos();
    instance.accept(&daemon).unwrap();
    daemon.accept_reply(&instance, true).unwrap();
    let versions = |min, max| HelloError::Version { min, max };
    let changes: [(Change, HelloError, ErrorCode); 6] = [
        (
            |h| (h.fixed.version_min, h.fixed.version_max) = (0, 0),
            versions(0, 0),
            ErrorCode::UnsupportedVersion,
        ),
        (
            |h| (h.fixed.version_min, h.fixed.version_max) = (2, 1),
            versions(2, 1),
            ErrorCode::UnsupportedVersion,
        ),
        (
            |h| (h.fixed.version_min, h.fixed.version_max) = (2, 3),
            versions(2, 3),
            ErrorCode::UnsupportedVersion,
        ),
        (
            |h| h.instance.push('x'),
            HelloError::Instance {
                expected: "web-server".into(),
                found: "web-serverx".into(),
            },
            ErrorCode::WrongPeer,
        ),
        (
            |h| h.fixed.generation = 6,
            HelloError::Generation {
                expected: 7,
                found: 6,
            },
            ErrorCode::StaleGeneration,
        ),
        (
            |h| h.fixed.generation = 8,
            HelloError::Generation {
                expected: 7,
                found: 8,
            },
            ErrorCode::StaleGeneration,
        ),
    ];
    for (change, error, code) in changes {
        let (mut asked, mut answered) = (daemon.clone(), instance.clone());
        change(&mut asked);
        change(&mut answered);
        assert_eq!(instance.accept(&asked), Err(error.clone()));
        assert_eq!(daemon.accept_reply(&answered, true), Err(error.clone()));
        assert_eq!(error.code(), code);
        assert!(code.ends(Channel::Control) && code.ends(Channel::Heartbeat));
    }
    assert!(matches!(
        instance.accept(&instance),
        Err(HelloError::Role { .. })
    ));
    assert!(matches!(
        daemon.accept_reply(&daemon, true),
        Err(HelloError::Role { .. })
    ));
}

#[test]
fn a_hello_reply_repeats_channel_and_session() {
    let (daemon, instance) = hellos();
    let mut other = instance.clone();
    other.fixed.channel = Channel::Control;
    let refused = daemon.accept_reply(&other, true);
    assert!(matches!(refused, Err(HelloError::OtherChannel { .. })));
    let mut asked = daemon;
    (asked.fixed.channel, asked.fixed.session) = (Channel::Bulk, 11);
    (other.fixed.channel, other.fixed.session) = (Channel::Bulk, 12);
    let refused = asked.accept_reply(&other, true).unwrap_err();
    assert_eq!(refused.code(), ErrorCode::WrongPeer);
}

#[test]
fn a_session_is_named_on_a_bulk_channel_and_on_no_other() {
    let mut out = Vec::new();
    for (channel, session, sound) in [
        (Channel::Bulk, 11, true),
        (Channel::Control, 0, true),
        (Channel::Bulk, 0, false),
        (Channel::Heartbeat, 11, false),
    ] {
        let mut hello = hellos().0;
        (hello.fixed.channel, hello.fixed.session) = (channel, session);
        assert_eq!(
            encode(&Message::Hello(hello), 1, 1, &mut out).is_ok(),
            sound
        );
    }
}

#[test]
fn a_session_is_never_0_and_leads_from_one_generation_to_another() {
    let Message::MorphPrepare(good) = sample("morph_prepare") else {
        panic!("another message");
    };
    let mut out = Vec::new();
    for (session, to_generation, sound) in [(1, 8, true), (0, 8, false), (1, 7, false)] {
        let prepare = MorphPrepare {
            session,
            to_generation,
            ..good
        };
        let written = encode(&Message::MorphPrepare(prepare), 1, 1, &mut out);
        assert_eq!(written.is_ok(), sound, "{prepare:?}");
    }
}

#[test]
fn each_message_travels_from_its_side_on_its_channel_only() {
    const ALL: [Channel; 3] = [Channel::Heartbeat, Channel::Control, Channel::Bulk];
    let (daemon, instance) = (PeerRole::Daemon, PeerRole::Instance);
    for (name, _, _, message) in samples::samples() {
        let of_both = matches!(
            message.msg_type(),
            MsgType::Error | MsgType::Retry | MsgType::VmcoreComplete
        );
        for channel in ALL {
            let (down, up) = (
                message.may_travel(daemon, channel),
                message.may_travel(instance, channel),
            );
            let carried = match message.msg_type() {
                MsgType::Hello | MsgType::Authenticate | MsgType::Error | MsgType::Retry => true,
                MsgType::HeartbeatReq | MsgType::HeartbeatRsp => channel == Channel::Heartbeat,
                MsgType::VmcoreStart | MsgType::VmcoreData | MsgType::VmcoreComplete => {
                    channel == Channel::Bulk
                }
                // The golden chunk belongs to a transfer by rounds, the golden reply to a transfer by reference.
                MsgType::MorphTransferState if !message.is_reply() => channel == Channel::Bulk,
                _ => channel == Channel::Control,
            };
            assert_eq!(down || up, carried, "{name} on {}", channel.as_str());
            let both = of_both || name == "morph_transfer_state";
            assert_eq!(
                down && up,
                carried && both,
                "{name} on {}",
                channel.as_str()
            );
        }
    }
    assert!(!sample("hello").may_travel(instance, Channel::Control));
    assert!(!sample("heartbeat_rsp").may_travel(daemon, Channel::Heartbeat));
    assert!(!sample("morph_commit").may_travel(instance, Channel::Control));
    assert!(!sample("morph_commit_reply").may_travel(daemon, Channel::Control));
}

#[test]
fn code_7_ends_every_channel_and_code_5_none() {
    for channel in [Channel::Heartbeat, Channel::Control, Channel::Bulk] {
        assert!(ErrorCode::StaleGeneration.ends(channel));
        assert!(!ErrorCode::UnexpectedInState.ends(channel));
        let other = ErrorCode::Other(999).ends(channel);
        assert_eq!(other, channel == Channel::Bulk);
    }
}

const TOTAL: u64 = 1 << 20;

fn frame_of(op: TransferOp, round: u32, data: Vec<u8>) -> MorphTransfer {
    let fixed = MorphTransferFixed {
        session: 11,
        offset: 0,
        total_bytes: TOTAL,
        dirty_bytes: 0,
        round,
        flags: 0,
        chunk_crc32: 0,
        op,
        mode: TransferMode::Rounds,
        provider: StateProvider::Cooperative,
    };
    match op {
        TransferOp::Chunk => MorphTransfer::chunk(fixed, data),
        _ => MorphTransfer {
            fixed,
            data,
            references: Vec::new(),
        },
    }
}

fn chunk(round: u32, bytes: usize) -> MorphTransfer {
    frame_of(TransferOp::Chunk, round, vec![7; bytes])
}

#[test]
fn state_comes_in_rounds_from_1_each_ended_before_the_next() {
    let mut state = IncomingState::new(11, StateProvider::Cooperative);
    assert!(matches!(
        state.take(&chunk(2, 1)),
        Err(StateError::OtherRound {
            expected: 1,
            found: 2
        })
    ));
    state.take(&chunk(1, 1)).unwrap();
    state
        .take(&frame_of(TransferOp::EndOfRound, 1, Vec::new()))
        .unwrap();
    assert!(state.take(&chunk(1, 1)).is_err());
    state.take(&chunk(2, 1)).unwrap();
    let mut other = chunk(2, 1);
    other.fixed.session = 999;
    assert!(matches!(
        state.take(&other),
        Err(StateError::NotState { .. })
    ));
    let mut other = chunk(2, 1);
    other.fixed.provider = StateProvider::Other(64);
    let error = state.take(&other).unwrap_err();
    assert!(matches!(error, StateError::OtherProvider { .. }), "{error}");
    assert_eq!(error.code(), ErrorCode::ValidationFailed);
    let pull = frame_of(TransferOp::Pull, 2, Vec::new());
    assert!(matches!(
        state.take(&pull),
        Err(StateError::NotState { .. })
    ));
}

#[test]
fn a_chunk_keeps_its_limit_and_has_its_checksum() {
    let mut state = IncomingState::new(11, StateProvider::Cooperative);
    state.take(&chunk(1, STATE_CHUNK_MAX_BYTES)).unwrap();
    let error = state
        .take(&chunk(1, STATE_CHUNK_MAX_BYTES + 1))
        .unwrap_err();
    assert_eq!(error, StateError::ChunkTooLarge(STATE_CHUNK_MAX_BYTES + 1));
    assert_eq!(error.code(), ErrorCode::TooLarge);
    let mut damaged = chunk(1, 10);
    damaged.data[3] ^= 1;
    let error = state.take(&damaged).unwrap_err();
    assert_eq!(
        (error, error.code()),
        (StateError::Damaged(0), ErrorCode::ValidationFailed)
    );
}

#[test]
fn a_side_sends_no_more_than_it_announced_and_announces_once() {
    let mut state = IncomingState::new(11, StateProvider::Cooperative);
    // The chunks of the announced state, and the tolerance of one chunk.
    let most = usize::try_from(TOTAL).unwrap() / STATE_CHUNK_MAX_BYTES + 1;
    for _ in 0..most {
        state.take(&chunk(1, STATE_CHUNK_MAX_BYTES)).unwrap();
    }
    let error = state.take(&chunk(1, 1)).unwrap_err();
    assert!(
        matches!(error, StateError::OverTotal { round: 1, .. }),
        "{error}"
    );
    assert_eq!(error.code(), ErrorCode::TooLarge);
    let mut state = IncomingState::new(11, StateProvider::Cooperative);
    state.take(&chunk(1, 1)).unwrap();
    let mut grown = chunk(1, 1);
    grown.fixed.total_bytes = TOTAL + 1;
    assert!(matches!(
        state.take(&grown),
        Err(StateError::TotalChanged { .. })
    ));
}

fn topology(entries: usize, cpus: u16) -> RecoverComplete {
    let Message::RecoverComplete(mut complete) = sample("recover_complete") else {
        panic!("another message");
    };
    let entry = TopologyEntry {
        name: "x".repeat(INSTANCE_ID_MAX_BYTES),
        generation: 1,
        memory_kib: 1,
        cid: 3,
        cpus: (0..cpus).collect(),
    };
    complete.topology = vec![entry; entries];
    complete
}

#[test]
fn the_largest_topology_goes_over_several_frames_and_comes_together_again() {
    let whole = topology(2048, 1024);
    let parts = whole.clone().into_parts();
    assert!(parts.len() > 16, "{} parts", parts.len());
    let (mut collected, mut found) = (TopologyParts::default(), None);
    for (n, part) in parts.iter().enumerate() {
        let mut frame = Vec::new();
        encode(&Message::RecoverComplete(part.clone()), 1, 1, &mut frame).unwrap();
        assert_eq!(usize::from(part.fixed.part), n);
        let more = part.fixed.flags & complete_flags::MORE != 0;
        assert_eq!(more, n + 1 < parts.len());
        assert!(found.is_none());
        found = collected.take(part.clone()).unwrap();
    }
    assert_eq!(found, Some(whole));
    let small = topology(3, 4);
    assert_eq!(small.clone().into_parts(), [small]);
    assert_eq!(topology(0, 0).into_parts().len(), 1);
}

#[test]
fn parts_come_in_their_order_agree_and_are_bounded_in_sum() {
    let parts = topology(600, 1024).into_parts();
    let begun = || {
        let mut collected = TopologyParts::default();
        assert_eq!(collected.take(parts[0].clone()), Ok(None));
        collected
    };
    let skipped = begun().take(parts[2].clone());
    assert!(matches!(
        skipped,
        Err(PartError::OutOfOrder {
            expected: 1,
            found: 2,
            ..
        })
    ));
    let alone = TopologyParts::default().take(parts[1].clone());
    assert!(matches!(
        alone,
        Err(PartError::OutOfOrder {
            expected: 0,
            found: 1,
            ..
        })
    ));
    let mut other = parts[1].clone();
    other.fixed.recovery += 1;
    assert_eq!(begun().take(other), Err(PartError::OfAnother(4)));
    let mut again = begun();
    assert_eq!(again.take(parts[0].clone()), Ok(None), "part 0 begins anew");
    assert!(again.take(parts[1].clone()).is_ok());
    let mut many = TopologyParts::default();
    let mut part = topology(1025, 0);
    part.fixed.flags = complete_flags::MORE;
    assert_eq!(many.take(part.clone()), Ok(None));
    part.fixed.part = 1;
    assert_eq!(many.take(part.clone()), Err(PartError::TooMany));
    (part.fixed.part, part.topology) = (0, Vec::new());
    assert_eq!(many.take(part), Err(PartError::Empty));
}

/// Every other list and text fits into one frame together with all records that may accompany it.
#[test]
fn every_message_at_its_documented_limits_fits_into_its_frame() {
    let text = "x".repeat(TEXT_MAX_BYTES);
    let id = "x".repeat(INSTANCE_ID_MAX_BYTES);
    let (mut hello, _) = hellos();
    hello.instance = id.clone();
    hello.kernel_release = "x".repeat(SHORT_TEXT_MAX_BYTES);
    hello.agent_version = "x".repeat(SHORT_TEXT_MAX_BYTES);
    let Message::MorphValidateReply(mut report) = sample("morph_validate_reply") else {
        panic!("another message");
    };
    let check = Check {
        name: "x".repeat(64),
        detail: text.clone(),
        ..report.checks[0].clone()
    };
    report.checks = vec![check; 100];
    let Message::MorphNegotiateReply(mut offers) = sample("morph_negotiate_reply") else {
        panic!("another message");
    };
    let offer = |bit| ProviderOffer {
        provider: StateProvider::from_value(1_u32 << bit),
        why_not: text.clone(),
        ..offers.offers[0].clone()
    };
    offers.offers = (0..12).map(offer).collect();
    let Message::VmcoreStart(mut start) = sample("vmcore_start") else {
        panic!("another message");
    };
    start.pci_port = Some("x".repeat(PCI_PORT_MAX_BYTES));
    start.windows = vec![start.windows[0]; WINDOWS_MAX];
    start.ranges = vec![start.ranges[0]; RANGES_MAX];
    let Message::RecoverPrepare(mut notice) = sample("recover_prepare") else {
        panic!("another message");
    };
    (notice.instance, notice.text) = (id, text);
    for message in [
        Message::Hello(hello),
        Message::MorphValidateReply(report),
        Message::MorphNegotiateReply(offers),
        Message::VmcoreStart(start),
        Message::RecoverPrepare(notice),
    ] {
        let mut frame = Vec::new();
        encode(&message, 1, 1, &mut frame).unwrap();
        let back = kmp_proto::codec::Decoder::new().feed(&mut &frame[..]);
        assert_eq!(back.unwrap().unwrap().message, message);
    }
}
