//! The decoder against splits, damage, bombs and noise.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod forge;
mod samples;

use forge::{all, broken, forge, frame, layout_reason, record, refused, sample, with_records};
use kmp_proto::codec::{Decoder, EncodeError, FrameFault, Offender, encode};
use kmp_proto::message::*;
use kmp_proto::wire::{ErrorCode, HEADER_BYTES, HeaderError, MsgType};
use proptest::prelude::*;
use proptest::sample::Index;

proptest! {
    #[test]
    fn any_split_of_the_stream_gives_the_same_frames(
        order in proptest::collection::vec(any::<Index>(), 1..8),
        cuts in proptest::collection::vec(any::<Index>(), 0..12),
    ) {
        let samples = samples::samples();
        let chosen: Vec<_> = order.iter().map(|i| i.get(&samples)).collect();
        let stream: Vec<u8> = chosen.iter().flat_map(|s| frame(s)).collect();
        let mut at: Vec<_> = cuts.iter().map(|i| i.index(stream.len() + 1)).collect();
        at.extend([0, stream.len()]);
        at.sort_unstable();
        let mut decoder = Decoder::new();
        let mut frames = Vec::new();
        for piece in at.windows(2) {
            frames.extend(all(&mut decoder, &stream[piece[0]..piece[1]]).unwrap());
        }
        let messages: Vec<_> = frames.into_iter().map(|f| f.message).collect();
        let expected: Vec<_> = chosen.iter().map(|s| s.3.clone()).collect();
        prop_assert_eq!(messages, expected);
        prop_assert_eq!(decoder.buffered(), 0);
    }

    #[test]
    fn any_flipped_bit_is_caught(which in any::<Index>(), bit in any::<Index>()) {
        let samples = samples::samples();
        let mut bytes = frame(which.get(&samples));
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        // A larger payload_len makes the frame incomplete: the bytes that follow complete the frame.
        bytes.extend(std::iter::repeat_n(0, 1 << 20));
        prop_assert!(all(&mut Decoder::new(), &bytes).is_err());
    }

    #[test]
    fn noise_never_panics_and_what_parses_is_written_back_alike(
        which in any::<Index>(),
        payload in proptest::collection::vec(any::<u8>(), 0..600),
        keep in any::<Index>(),
    ) {
        let samples = samples::samples();
        let chosen = which.get(&samples);
        let good = frame(chosen);
        let keep = HEADER_BYTES + keep.index(good.len() - HEADER_BYTES + 1);
        let mut bytes = good[..keep].to_vec();
        bytes.extend_from_slice(&payload);
        let length = u32::try_from(bytes.len() - HEADER_BYTES).unwrap();
        forge(&mut bytes, 12, &length.to_le_bytes());
        if let Ok(frames) = all(&mut Decoder::new(), &bytes) {
            let mut again = Vec::new();
            encode(&frames[0].message, 1, 2, &mut again).unwrap();
            let back = all(&mut Decoder::new(), &again).unwrap();
            prop_assert_eq!(&back[0].message, &frames[0].message);
        }
    }

    #[test]
    fn heartbeats_of_any_figures_round_trip(
        probe: u32, cpus: u16, busy: u16, pressure: (u16, u16, u16), figures: (u64, u64, u64, u64),
    ) {
        let message = Message::HeartbeatRsp(HeartbeatRsp::from(HeartbeatRspFixed {
            probe,
            health: Health::Unhealthy,
            workload: WorkloadState::Frozen,
            cpu_count: cpus,
            cpu_busy_permille: busy,
            pressure_cpu: pressure.0,
            pressure_memory: pressure.1,
            pressure_io: pressure.2,
            memory_total_kib: figures.0,
            memory_available_kib: figures.1,
            io_read_bytes: figures.2,
            io_write_bytes: figures.3,
        }));
        let mut bytes = Vec::new();
        encode(&message, probe, figures.0, &mut bytes).unwrap();
        prop_assert_eq!(&all(&mut Decoder::new(), &bytes).unwrap()[0].message, &message);
    }

    #[test]
    fn chunks_of_any_bytes_round_trip_and_damage_between_hops_is_seen(
        data in proptest::collection::vec(any::<u8>(), 1..5000), offset: u64,
        provider: u32, flip in any::<Index>(),
    ) {
        let fixed = MorphTransferFixed {
            session: 1, offset, total_bytes: u64::MAX, dirty_bytes: 0, round: 1, flags: 0,
            chunk_crc32: 0, op: TransferOp::Chunk, mode: TransferMode::Rounds,
            provider: StateProvider::from_value(provider),
        };
        let chunk = MorphTransfer::chunk(fixed, data);
        let mut bytes = Vec::new();
        encode(&Message::MorphTransfer(chunk.clone()), 1, 1, &mut bytes).unwrap();
        let back = all(&mut Decoder::new(), &bytes).unwrap().remove(0).message;
        prop_assert_eq!(&back, &Message::MorphTransfer(chunk.clone()));
        prop_assert!(chunk.chunk_holds());
        let mut damaged = chunk;
        let at = flip.index(damaged.data.len());
        damaged.data[at] ^= 1;
        prop_assert!(!damaged.chunk_holds());
    }
}

#[test]
fn the_checks_come_in_their_order_each_with_its_own_error() {
    let mut bytes = sample("heartbeat_req");
    bytes[39] ^= 0xff;
    assert_eq!(refused(&bytes), FrameFault::BadCrc(MsgType::HeartbeatReq));
    bytes[12..16].copy_from_slice(&129u32.to_le_bytes());
    let too_large = HeaderError::TooLarge {
        msg_type: MsgType::HeartbeatReq,
        len: 129,
    };
    assert_eq!(refused(&bytes), FrameFault::Header(too_large));
    bytes[6..8].copy_from_slice(&0x7777u16.to_le_bytes());
    assert_eq!(
        refused(&bytes),
        FrameFault::Header(HeaderError::UnknownType(0x7777))
    );
    bytes[28] = 1;
    assert_eq!(
        refused(&bytes),
        FrameFault::Header(HeaderError::ReservedNotZero(1))
    );
    bytes[4] = 2;
    assert_eq!(
        refused(&bytes),
        FrameFault::Header(HeaderError::UnsupportedVersion(2))
    );
    bytes[0] = 1;
    assert_eq!(
        refused(&bytes),
        FrameFault::Header(HeaderError::BadMagic(0x4B4D_5001))
    );
    assert_eq!(broken(&bytes).code(), ErrorCode::Malformed);
}

#[test]
fn a_reply_to_a_type_that_has_none_is_unknown() {
    let mut bytes = sample("heartbeat_req");
    forge(&mut bytes, 6, &0x8101u16.to_le_bytes());
    assert_eq!(
        refused(&bytes),
        FrameFault::Header(HeaderError::UnknownType(0x8101))
    );
}

#[test]
fn an_oversized_length_is_refused_before_a_byte_of_payload_is_held() {
    let mut header = sample("morph_transfer_state")[..HEADER_BYTES].to_vec();
    header[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut decoder = Decoder::new();
    let error = all(&mut decoder, &header).unwrap_err();
    assert_eq!(error.code(), ErrorCode::TooLarge);
    assert_eq!(decoder.buffered(), 0);
}

#[test]
fn a_broken_stream_stays_broken() {
    let mut decoder = Decoder::new();
    let error = all(&mut decoder, &[0; HEADER_BYTES]).unwrap_err();
    assert_eq!(all(&mut decoder, &sample("hello")).unwrap_err(), error);
}

#[test]
fn unknown_records_are_skipped_unless_they_are_critical() {
    for (flags, refused) in [(0u16, false), (1, true)] {
        let mut bytes = sample("heartbeat_req");
        bytes.extend_from_slice(&999u16.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&3u32.to_le_bytes());
        bytes.extend_from_slice(b"new\0\0\0\0\0");
        forge(&mut bytes, 12, &32u32.to_le_bytes());
        let result = all(&mut Decoder::new(), &bytes);
        assert_eq!(result.is_err(), refused);
        if let Err(error) = result {
            let reason = LayoutError::CriticalRecord(999);
            assert_eq!(
                error.fault,
                FrameFault::Layout {
                    msg_type: MsgType::HeartbeatReq,
                    reason
                }
            );
        }
    }
}

#[test]
fn every_single_bit_of_every_golden_frame_counts() {
    for sample in samples::samples() {
        let good = frame(&sample);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match all(&mut Decoder::new(), &bytes) {
                Err(_) => {}
                Ok(frames) => {
                    let length = 12 * 8..16 * 8;
                    assert!(
                        frames.is_empty() && length.contains(&bit),
                        "{} bit {bit}",
                        sample.0
                    );
                }
            }
        }
    }
}

#[test]
fn a_prefix_of_a_frame_is_no_error_and_no_frame() {
    for sample in samples::samples() {
        let bytes = frame(&sample);
        for end in 0..bytes.len() {
            assert_eq!(
                all(&mut Decoder::new(), &bytes[..end]),
                Ok(Vec::new()),
                "{}",
                sample.0
            );
        }
    }
}

#[test]
fn records_that_break_a_rule_are_malformed_each_with_its_reason() {
    const ERROR_FIXED: usize = 16;
    let error = |records: &[u8]| layout_reason(&with_records("error", ERROR_FIXED, records));
    let text = record(4, b"what happened");
    assert_eq!(
        error(&[&text[..], &text[..]].concat()),
        LayoutError::Repeated(4)
    );
    assert_eq!(
        error(&record(4, &[b'x'; TEXT_MAX_BYTES + 1])),
        LayoutError::TextTooLong {
            kind: 4,
            limit: TEXT_MAX_BYTES
        }
    );
    assert_eq!(error(&record(4, &[0xff, 0xfe])), LayoutError::NotText);
    assert_eq!(error(&text[..text.len() - 8]), LayoutError::TooShort);
    assert_eq!(error(&text[..5]), LayoutError::TooShort);
    let mut endless = text.clone();
    endless[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(error(&endless), LayoutError::TooShort);
    let mut unclean = text.clone();
    *unclean.last_mut().unwrap() = 1;
    assert_eq!(error(&unclean), LayoutError::ReservedNotZero);
    let hello = layout_reason(&with_records("hello", 56, &[]));
    assert_eq!(hello, LayoutError::MissingRecord(1));
    let long = layout_reason(&with_records(
        "morph_transfer_state",
        56,
        &record(9, &[0; 32]),
    ));
    assert_eq!(long, LayoutError::Trailing(8));
    let unproven = with_records("recover_reclaim", 24, &record(1, b"web-server"));
    assert_eq!(layout_reason(&unproven), LayoutError::MissingRecord(5));
}

#[test]
fn a_number_that_no_enumeration_has_is_malformed() {
    let mut bytes = sample("hello");
    forge(&mut bytes, HEADER_BYTES + 5, &[9]);
    let reason = LayoutError::BadValue {
        field: "Channel",
        value: 9,
    };
    assert_eq!(layout_reason(&bytes), reason);
}

#[test]
fn a_number_without_a_name_in_an_open_enumeration_is_carried_as_such() {
    let forged = |name: &str, at: usize, with: &[u8]| {
        let mut bytes = sample(name);
        forge(&mut bytes, HEADER_BYTES + at, with);
        let message = all(&mut Decoder::new(), &bytes).unwrap().remove(0).message;
        let mut again = Vec::new();
        encode(&message, 1, 1, &mut again).unwrap();
        assert_eq!(again[HEADER_BYTES..], bytes[HEADER_BYTES..], "{name}");
        message
    };
    let code = 999u16.to_le_bytes();
    let error = forged("error", 0, &code);
    assert!(matches!(error, Message::Error(e) if e.code == ErrorCode::Other(999)));
    let retry = forged("retry", 4, &code);
    assert!(matches!(retry, Message::Retry(r) if r.reason == ErrorCode::Other(999)));
    let Message::HeartbeatRsp(beat) = forged("heartbeat_rsp", 4, &[77, 78]) else {
        panic!("another message");
    };
    assert_eq!(beat.fixed.health, Health::Other(77));
    assert_eq!(beat.fixed.workload, WorkloadState::Other(78));
    let status = forged("health_status", 0, &[77, 78]);
    assert!(matches!(status, Message::HealthStatus(s) if s.fixed.health == Health::Other(77)));
    for name in ["recover_prepare", "recover_reclaim"] {
        let (Message::RecoverPrepare(RecoverNotice { fixed, .. })
        | Message::RecoverReclaim(RecoverReclaim { fixed, .. })) = forged(name, 16, &code)
        else {
            panic!("another message");
        };
        assert_eq!(fixed.cause, FailureCause::Other(999));
        assert_eq!(fixed.cause.to_string(), "unknown (999)");
    }
    let complete = forged("recover_complete", 24, &code);
    let Message::RecoverComplete(complete) = complete else {
        panic!("another message");
    };
    assert_eq!(complete.fixed.outcome, RecoveryOutcome::Other(999));
}

#[test]
fn the_error_names_type_and_sequence_of_the_frame_once_its_header_could_be_read() {
    let named = |bytes: &[u8]| {
        let error = broken(bytes);
        let answer = error.answer();
        let named = (answer.offending_type, answer.offending_sequence);
        assert_eq!(
            named,
            error.offender.map_or((0, 0), |o| (o.msg_type, o.sequence))
        );
        error.offender
    };
    let good = sample("morph_commit");
    let changed = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    // Magic, version and reserved decide whether the bytes are a header of this version at all.
    for at in [0, 4, 28] {
        assert_eq!(named(&changed(at, 9)), None, "byte {at}");
    }
    let offender = |msg_type| {
        let sequence = 44;
        Some(Offender { msg_type, sequence })
    };
    assert_eq!(named(&changed(6, 0x77)), offender(0x0377));
    assert_eq!(named(&changed(14, 1)), offender(0x0305));
    assert_eq!(named(&changed(40, 1)), offender(0x0305));
    let mut malformed = good.clone();
    forge(&mut malformed, HEADER_BYTES + 31, &[1]);
    assert_eq!(named(&malformed), offender(0x0305));
}

#[test]
fn a_reserved_byte_in_use_is_malformed() {
    let mut bytes = sample("morph_commit");
    forge(&mut bytes, HEADER_BYTES + 31, &[1]);
    assert_eq!(layout_reason(&bytes), LayoutError::ReservedNotZero);
}

#[test]
fn a_list_over_its_limit_is_not_cut_but_refused() {
    let chunk = MorphTransferFixed {
        session: 1,
        offset: 0,
        total_bytes: 0,
        dirty_bytes: 0,
        round: 1,
        flags: 0,
        chunk_crc32: 0,
        op: TransferOp::EndOfRound,
        mode: TransferMode::ByReference,
        provider: StateProvider::Cooperative,
    };
    let reference = Reference {
        region: 1,
        length: 2,
        digest: 3,
    };
    let mut transfer = MorphTransfer {
        fixed: chunk,
        data: Vec::new(),
        references: vec![reference; 1024],
    };
    let mut out = Vec::new();
    encode(&Message::MorphTransfer(transfer.clone()), 1, 1, &mut out).unwrap();
    transfer.references.push(reference);
    out.clear();
    let error = encode(&Message::MorphTransfer(transfer), 1, 1, &mut out).unwrap_err();
    let (msg_type, reason) = (MsgType::MorphTransferState, LayoutError::TooMany(1024));
    assert_eq!(error, EncodeError::Unwritable { msg_type, reason });
    assert!(out.is_empty());
}

#[test]
fn a_text_over_its_limit_is_cut_at_a_character() {
    let error = ErrorInfo {
        code: ErrorCode::Internal,
        offending_type: 0,
        offending_sequence: 0,
        text: "é".repeat(TEXT_MAX_BYTES) + "x",
    };
    let mut out = Vec::new();
    encode(&Message::Error(error), 1, 1, &mut out).unwrap();
    let Message::Error(back) = all(&mut Decoder::new(), &out).unwrap().remove(0).message else {
        panic!("another message");
    };
    assert_eq!(back.text, "é".repeat(TEXT_MAX_BYTES / 2));
}

#[test]
fn a_validation_that_passed_with_a_failed_check_is_malformed() {
    let mut bytes = sample("morph_validate_reply");
    forge(&mut bytes, HEADER_BYTES + 8, &[1]);
    let reason = LayoutError::Inconsistent;
    assert_eq!(
        refused(&bytes),
        FrameFault::Layout {
            msg_type: MsgType::MorphValidate,
            reason
        }
    );
}

#[test]
fn a_message_over_its_limit_is_not_written() {
    let mut out = vec![1, 2, 3];
    let message = Message::VmcoreData(VmcoreData {
        fixed: VmcoreDataFixed {
            capture: 1,
            address: 0,
            length: 1 << 20,
            chunk_crc32: 0,
            encoding: ChunkEncoding::Raw,
        },
        data: vec![0; 1 << 20],
    });
    assert!(encode(&message, 1, 1, &mut out).is_err());
    assert_eq!(out, [1, 2, 3]);
}
