//! Rules of `docs/kmp.md` on single fields and records, checked for every message that has them: reserved bytes,
//! flags, enumerations, bit sets, lengths and limits. Each test names its rule.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod forge;
mod samples;

use forge::{all, broken, forge, frame, layout_reason, record, refused, sample, with_records};
use kmp_proto::codec::{Decoder, FrameFault};
use kmp_proto::message::*;
use kmp_proto::wire::{ErrorCode, HEADER_BYTES, HeaderError, MsgType, REPLY_BIT};

/// Size of a record's header, bytes.
const RECORD_HEADER: usize = 8;

fn decoded(bytes: &[u8]) -> Message {
    all(&mut Decoder::new(), bytes).unwrap().remove(0).message
}

/// Returns the offset, in the payload, of the body of the first record of this kind.
fn record_at(name: &str, fixed: usize, kind: u16) -> usize {
    let bytes = sample(name);
    let mut at = HEADER_BYTES + fixed;
    loop {
        let header: [u8; 8] = bytes[at..at + RECORD_HEADER].try_into().unwrap();
        if header[..2] == kind.to_le_bytes() {
            return at + RECORD_HEADER - HEADER_BYTES;
        }
        let len = usize::from(u16::from_le_bytes([header[4], header[5]]));
        at += RECORD_HEADER + len.next_multiple_of(8);
    }
}

/// Returns a golden frame with the bytes of its payload at `at` replaced by `with`.
fn changed(name: &str, at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = sample(name);
    forge(&mut bytes, HEADER_BYTES + at, with);
    bytes
}

#[test]
fn a_reserved_byte_that_is_not_zero_is_malformed_in_every_message() {
    let claim = record_at("recover_reclaim", 24, 5);
    let entry = record_at("recover_complete", 32, 6);
    let check = record_at("morph_validate_reply", 16, 10);
    for (name, reserved) in [
        ("heartbeat_req", 12..16),
        ("health_status", 12..16),
        ("recover_prepare", 18..24),
        ("recover_prepare_reply", 12..16),
        ("recover_reclaim", 18..24),
        ("recover_reclaim", claim + 24..claim + 32),
        ("recover_reclaim_reply", 12..16),
        ("recover_complete", 30..32),
        ("recover_complete", entry + 28..entry + 32),
        ("recover_complete_reply", 12..16),
        ("vmcore_start", 20..24),
        ("vmcore_start_reply", 18..24),
        ("vmcore_data", 30..32),
        ("vmcore_complete", 18..24),
        ("vmcore_complete_reply", 18..24),
        ("morph_prepare", 33..40),
        ("morph_prepare_reply", 8..16),
        ("morph_negotiate", 12..16),
        ("morph_negotiate_reply", 8..16),
        ("morph_transfer_state", 52..56),
        ("morph_transfer_state_reply", 52..56),
        ("morph_validate", 24..32),
        ("morph_validate_reply", 9..16),
        ("morph_validate_reply", check + 7..check + 8),
        ("morph_commit", 20..32),
        ("morph_commit_reply", 32..40),
        ("morph_rollback", 9..16),
        ("morph_rollback_reply", 10..16),
        ("error", 8..16),
        ("retry", 12..16),
    ] {
        for at in reserved {
            let reason = layout_reason(&changed(name, at, &[1]));
            assert_eq!(reason, LayoutError::ReservedNotZero, "{name} at {at}");
        }
    }
}

#[test]
fn unused_flags_are_ignored_wherever_they_are() {
    let claim = record_at("recover_reclaim", 24, 5);
    // Defined bits keep their values: bit 0 of RECOVER_COMPLETE and of MORPH_TRANSFER_STATE.
    for (name, at, unused) in [
        ("hello", 6, vec![0xff, 0xff]),
        ("hello_reply", 6, vec![0xff, 0xff]),
        ("heartbeat_req", 4, vec![0xff; 4]),
        ("health_status", 2, vec![0xff; 2]),
        ("recover_reclaim", claim + 4, vec![0xff; 4]),
        ("recover_complete", 28, vec![0xfe, 0xff]),
        ("morph_transfer_state", 36, vec![0xff; 4]),
        ("morph_validate", 12, vec![0xff; 4]),
        ("morph_commit", 18, vec![0xff; 2]),
        // The flags of a record: the record keeps its meaning.
        ("error", 16 + 2, vec![0xfe, 0xff]),
    ] {
        let found = decoded(&changed(name, at, &unused));
        assert_eq!(
            found.msg_type(),
            decoded(&sample(name)).msg_type(),
            "{name}"
        );
    }
}

#[test]
fn a_number_that_a_closed_enumeration_has_not_is_malformed_wherever_it_is() {
    let check = record_at("morph_validate_reply", 16, 10);
    for (name, at, width, field) in [
        ("hello", 4, 1, "PeerRole"),
        ("hello", 5, 1, "Channel"),
        ("hello_reply", 4, 1, "PeerRole"),
        ("hello_reply", 5, 1, "Channel"),
        ("vmcore_data", 28, 2, "ChunkEncoding"),
        ("vmcore_complete", 16, 2, "CaptureStatus"),
        ("morph_prepare", 32, 1, "Side"),
        ("morph_transfer_state", 44, 2, "TransferOp"),
        ("morph_transfer_state", 46, 2, "TransferMode"),
        ("morph_validate_reply", 8, 1, "CheckResult"),
        ("morph_validate_reply", check + 6, 1, "CheckResult"),
        ("morph_commit", 16, 2, "CommitStep"),
        ("morph_commit_reply", 28, 2, "CommitStep"),
        ("morph_commit_reply", 30, 2, "StepStatus"),
        ("morph_rollback", 8, 1, "Side"),
        ("morph_rollback_reply", 8, 2, "RollbackStatus"),
    ] {
        let number = [77, 0];
        let reason = layout_reason(&changed(name, at, &number[..width]));
        let value = 77;
        assert_eq!(reason, LayoutError::BadValue { field, value }, "{name}");
    }
}

#[test]
fn unknown_numbers_of_a_fence_are_kept() {
    let claim = record_at("recover_reclaim", 24, 5);
    let message = decoded(&changed("recover_reclaim", claim, &[77, 0, 78, 0]));
    let Message::RecoverReclaim(notice) = message else {
        panic!("{message:?}");
    };
    assert_eq!((notice.fence.method, notice.fence.confirmation), (77, 78));
}

#[test]
fn unknown_bits_of_a_bit_set_are_ignored() {
    let offer = record_at("morph_negotiate_reply", 16, 7);
    for (name, at, width) in [
        ("hello", 32, 8),
        ("morph_negotiate", 8, 4),
        ("morph_negotiate_reply", offer + 20, 4),
        ("morph_negotiate_reply", offer + 24, 4),
    ] {
        let bytes = changed(name, at, &[0xff; 8][..width]);
        let again = frame(&("", 1, 1, decoded(&bytes)));
        assert_eq!(again[HEADER_BYTES..], bytes[HEADER_BYTES..], "{name}");
    }
}

#[test]
fn each_text_keeps_its_limit_to_the_byte() {
    for (name, fixed, kind, limit) in [
        ("hello", 56, 1, 63),
        ("hello", 56, 2, 128),
        ("hello", 56, 3, 128),
        ("health_status", 16, 4, 512),
        ("recover_prepare", 24, 1, 63),
        ("recover_prepare", 24, 4, 512),
        ("recover_reclaim", 24, 1, 63),
        ("recover_complete", 32, 1, 63),
        ("vmcore_start", 24, 12, 32),
        ("morph_rollback", 16, 4, 512),
        ("error", 16, 4, 512),
    ] {
        let too_long = LayoutError::TextTooLong { kind, limit };
        let with = |len| with_records(name, fixed, &record(kind, &vec![b'x'; len]));
        assert_eq!(layout_reason(&with(limit + 1)), too_long, "{name}");
        let kept = all(&mut Decoder::new(), &with(limit))
            .err()
            .map(|e| e.fault);
        let reason =
            |fault| matches!(fault, FrameFault::Layout { reason, .. } if reason == too_long);
        assert!(!kept.is_some_and(reason), "{name}");
    }
}

#[test]
fn each_record_of_fixed_length_has_exactly_that() {
    for (name, fixed, kind, length) in [
        ("hello", 56, 14, 32),
        ("hello", 56, 15, 32),
        ("recover_reclaim", 24, 5, 32),
        ("morph_transfer_state", 56, 9, 24),
        ("vmcore_start", 24, 11, 16),
        ("vmcore_start", 24, 13, 24),
    ] {
        for other in [0, length - 8, length - 1, length + 1, length + 8] {
            let reason = layout_reason(&with_records(name, fixed, &record(kind, &vec![0; other])));
            let of_length = matches!(
                reason,
                LayoutError::WrongLength(_) | LayoutError::Trailing(_) | LayoutError::TooShort
            );
            assert!(of_length, "{name}, {other} bytes: {reason}");
        }
    }
}

#[test]
fn each_list_keeps_its_limit() {
    let entry = [vec![0; 32], vec![]].concat();
    let check = [&[0; 6][..], &[1, 0]].concat();
    for (name, fixed, kind, bytes, limit) in [
        ("vmcore_start", 24, 13, vec![0; 24], 16),
        ("vmcore_start", 24, 11, vec![0; 16], 1024),
        ("morph_transfer_state", 56, 9, vec![0; 24], 1024),
        ("morph_validate_reply", 16, 10, check, 100),
        ("recover_complete", 32, 6, entry, 2048),
    ] {
        // RECOVER_COMPLETE has a mandatory record.
        let first = if fixed == 32 {
            record(1, b"db")
        } else {
            Vec::new()
        };
        let with = |count| {
            let records = [first.clone(), record(kind, &bytes).repeat(count)].concat();
            with_records(name, fixed, &records)
        };
        assert_eq!(
            layout_reason(&with(limit + 1)),
            LayoutError::TooMany(limit),
            "{name}"
        );
        decoded(&with(limit));
    }
}

/// Returns a PROVIDER record of this provider, with this reason.
fn provider(number: u32, why_not: &[u8]) -> Vec<u8> {
    let fixed = [&[0; 16][..], &number.to_le_bytes(), &[0; 12]].concat();
    record(7, &[&fixed, why_not].concat())
}

#[test]
fn a_negotiate_reply_says_each_provider_once_and_twelve_at_most() {
    let with = |records: &[u8]| with_records("morph_negotiate_reply", 16, records);
    let bits = |count| {
        (0..count)
            .flat_map(|bit| provider(1 << bit, b"why"))
            .collect::<Vec<_>>()
    };
    assert_eq!(layout_reason(&with(&bits(13))), LayoutError::TooMany(12));
    decoded(&with(&bits(12)));
    decoded(&with(&[]));
    for number in [1, 64] {
        let twice = [provider(number, b""), provider(number, b"why")].concat();
        assert_eq!(layout_reason(&with(&twice)), LayoutError::Repeated(7));
    }
    let longest = |len| with(&provider(1, &vec![b'x'; len]));
    let (kind, limit) = (7, 512);
    let too_long = LayoutError::TextTooLong { kind, limit };
    assert_eq!(layout_reason(&longest(513)), too_long);
    decoded(&longest(512));
}

#[test]
fn a_provider_without_a_name_is_carried_by_its_number() {
    let unnamed = StateProvider::Other(0x8000_0000);
    let offer = provider(unnamed.value(), b"");
    let reply = decoded(&with_records("morph_negotiate_reply", 16, &offer));
    let Message::MorphNegotiateReply(reply) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!(reply.offers[0].provider, unnamed);
    let pull = changed("morph_transfer_state", 48, &unnamed.value().to_le_bytes());
    let Message::MorphTransfer(pull) = decoded(&pull) else {
        panic!("another message");
    };
    assert_eq!(pull.fixed.provider, unnamed);
    let bits: Vec<_> = StateProvider::ALL.iter().map(|p| p.value()).collect();
    for (n, bit) in bits.iter().enumerate() {
        assert!(bit.is_power_of_two(), "{bit}");
        assert!(!bits[..n].contains(bit), "{bit} is used twice");
    }
}

#[test]
fn one_that_may_appear_once_is_malformed_the_second_time() {
    let (instance, text) = (record(1, b"db"), record(4, b"what"));
    for (name, fixed, kind, one) in [
        ("hello", 56, 1, instance.clone()),
        ("hello", 56, 2, record(2, b"6.12")),
        ("hello", 56, 3, record(3, b"1.0")),
        ("hello", 56, 14, record(14, &[1; 32])),
        ("hello", 56, 15, record(15, &[1; 32])),
        ("heartbeat_rsp", 48, 16, record(16, &[0; 8])),
        ("health_status", 16, 4, text.clone()),
        ("recover_prepare", 24, 1, instance.clone()),
        ("recover_prepare", 24, 4, text.clone()),
        ("recover_reclaim", 24, 1, instance.clone()),
        ("recover_reclaim", 24, 5, record(5, &[0; 32])),
        ("recover_complete", 32, 1, instance),
        ("vmcore_start", 24, 12, record(12, b"0000:00:1e.0")),
        ("vmcore_data", 32, 8, record(8, b"data")),
        ("morph_transfer_state", 56, 8, record(8, b"data")),
        ("morph_rollback", 16, 4, text.clone()),
        ("error", 16, 4, text),
    ] {
        let twice = with_records(name, fixed, &one.repeat(2));
        assert_eq!(layout_reason(&twice), LayoutError::Repeated(kind), "{name}");
    }
}

#[test]
fn cpus_that_run_nothing_are_told_with_a_heartbeat() {
    let Message::HeartbeatRsp(mut answer) = decoded(&sample("heartbeat_rsp")) else {
        panic!("another message");
    };
    assert_eq!(answer.stall, None);
    let told = with_records(
        "heartbeat_rsp",
        48,
        &record(16, &[1, 0, 2, 0, 0xb8, 0x0b, 0, 0]),
    );
    answer.stall = Some(CpuStall {
        cpu: 1,
        count: 2,
        stalled_ms: 3000,
    });
    assert_eq!(decoded(&told), Message::HeartbeatRsp(answer));
    let written = frame(&("", 1, 1, Message::HeartbeatRsp(answer)));
    assert_eq!(decoded(&written), Message::HeartbeatRsp(answer));
    let short = with_records("heartbeat_rsp", 48, &record(16, &[1, 0, 2, 0]));
    assert_eq!(layout_reason(&short), LayoutError::TooShort);
}

#[test]
fn one_that_must_appear_and_does_not_is_malformed() {
    for (name, fixed, there, kind) in [
        ("hello", 56, Vec::new(), 1),
        ("recover_prepare", 24, Vec::new(), 1),
        ("recover_reclaim", 24, record(5, &[0; 32]), 1),
        ("recover_reclaim", 24, record(1, b"db"), 5),
        ("recover_complete", 32, Vec::new(), 1),
    ] {
        let missing = with_records(name, fixed, &there);
        assert_eq!(
            layout_reason(&missing),
            LayoutError::MissingRecord(kind),
            "{name}"
        );
    }
}

#[test]
fn records_come_in_any_order_and_are_used_whether_critical_or_not() {
    let certificate = record(
        5,
        &[7; 24].iter().chain(&[0; 8]).copied().collect::<Vec<_>>(),
    );
    let mut instance = record(1, b"db");
    for critical in [0, 1] {
        instance[2] = critical;
        let orders = [
            [certificate.clone(), instance.clone()].concat(),
            [instance.clone(), certificate.clone()].concat(),
        ];
        for records in orders {
            let message = decoded(&with_records("recover_reclaim", 24, &records));
            let Message::RecoverReclaim(notice) = message else {
                panic!("{message:?}");
            };
            assert_eq!(
                (notice.instance.as_str(), notice.fence.method),
                ("db", 0x0707)
            );
        }
    }
}

#[test]
fn a_topology_entry_is_exactly_as_long_as_its_counts_say() {
    let entry = |cpus: u16, name: u16, rest: usize| {
        let counts = [cpus.to_le_bytes(), name.to_le_bytes()].concat();
        let entry = [vec![0; 24], counts, vec![0; 4], vec![b'x'; rest]].concat();
        let records = [record(1, b"db"), record(6, &entry)].concat();
        with_records("recover_complete", 32, &records)
    };
    decoded(&entry(2, 3, 7));
    decoded(&entry(1024, 63, 2 * 1024 + 63));
    for (cpus, name, rest) in [
        (2, 3, 6),
        (2, 3, 8),
        (3, 3, 7),
        (1025, 1, 2051),
        (1, 64, 66),
    ] {
        layout_reason(&entry(cpus, name, rest));
    }
}

#[test]
fn a_check_has_a_name_and_a_text_within_their_limits() {
    let check = |name: u16, rest: usize| {
        let fixed = [&[0; 4][..], &name.to_le_bytes(), &[2, 0]].concat();
        let bytes = [fixed, vec![b'x'; rest]].concat();
        with_records("morph_validate_reply", 16, &record(10, &bytes))
    };
    decoded(&check(64, 64 + 512));
    for (name, rest) in [(65, 65), (64, 64 + 513), (5, 4)] {
        layout_reason(&check(name, rest));
    }
}

#[test]
fn each_type_and_each_reply_has_its_limit() {
    for msg_type in MsgType::ALL {
        let replies = [Some(0), msg_type.has_reply().then_some(REPLY_BIT)];
        for bit in replies.into_iter().flatten() {
            let with_length = |len: u32| {
                let mut header = sample("heartbeat_req")[..HEADER_BYTES].to_vec();
                header[6..8].copy_from_slice(&(*msg_type as u16 | bit).to_le_bytes());
                header[12..16].copy_from_slice(&len.to_le_bytes());
                header
            };
            let (limit, msg_type) = (msg_type.payload_limit(), *msg_type);
            assert!(limit <= 1_048_576);
            let within = all(&mut Decoder::new(), &with_length(limit));
            assert_eq!(within, Ok(Vec::new()), "{msg_type}: wait for more");
            let len = limit + 1;
            let too_large = FrameFault::Header(HeaderError::TooLarge { msg_type, len });
            assert_eq!(refused(&with_length(len)), too_large);
            assert_eq!(broken(&with_length(len)).code(), ErrorCode::TooLarge);
        }
    }
}

#[test]
fn a_timestamp_is_never_judged() {
    for timestamp in [0, 1, u64::MAX] {
        let mut bytes = sample("heartbeat_req");
        forge(&mut bytes, 16, &timestamp.to_le_bytes());
        let found = all(&mut Decoder::new(), &bytes).unwrap().remove(0);
        assert_eq!(found.header.timestamp, timestamp);
        assert_eq!(found.message, decoded(&sample("heartbeat_req")));
    }
}

#[test]
fn each_request_needs_its_features() {
    let (morphs, reference, lent) = (1, 2, 4);
    for (name, _, _, message) in samples::samples() {
        let needs = match &message {
            Message::MorphTransfer(transfer)
                if transfer.fixed.mode == TransferMode::ByReference =>
            {
                morphs | reference
            }
            message if message.is_answer() => 0,
            message => match message.msg_type().name() {
                "VMCORE_START" => lent,
                other if other.starts_with("MORPH_") => morphs,
                _ => 0,
            },
        };
        assert_eq!(message.needs(), needs, "{name}");
    }
    let Message::MorphTransfer(mut pull) = decoded(&sample("morph_transfer_state")) else {
        panic!("another message");
    };
    pull.fixed.mode = TransferMode::ByReference;
    assert_eq!(Message::MorphTransfer(pull).needs(), morphs | reference);
}
