//! The decoder against splits, damage, bombs and noise.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod samples;

use kmp_proto::codec::{Decoder, Frame, FrameError, encode};
use kmp_proto::message::*;
use kmp_proto::wire::{ErrorCode, HEADER_BYTES, HeaderError, MsgType};
use proptest::prelude::*;
use proptest::sample::Index;

fn frame(sample: &samples::Sample) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&sample.3, sample.1, sample.2, &mut bytes).unwrap();
    bytes
}

fn all(decoder: &mut Decoder, mut input: &[u8]) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    while let Some(frame) = decoder.feed(&mut input)? {
        frames.push(frame);
    }
    assert!(input.is_empty(), "what is not refused is taken");
    Ok(frames)
}

/// Sets bytes of a frame and makes the checksum hold again.
fn forge(bytes: &mut [u8], at: usize, with: &[u8]) {
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes[24..28].fill(0);
    let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(bytes);
    bytes[24..28].copy_from_slice(&crc.to_le_bytes());
}

fn sample(name: &str) -> Vec<u8> {
    frame(
        &samples::samples()
            .into_iter()
            .find(|s| s.0 == name)
            .unwrap(),
    )
}

fn refused(bytes: &[u8]) -> FrameError {
    all(&mut Decoder::new(), bytes).unwrap_err()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

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
        // A longer payload_len makes the frame incomplete: what follows completes it.
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
        let message = Message::HeartbeatRsp(HeartbeatRsp {
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
        });
        let mut bytes = Vec::new();
        encode(&message, probe, figures.0, &mut bytes).unwrap();
        prop_assert_eq!(&all(&mut Decoder::new(), &bytes).unwrap()[0].message, &message);
    }

    #[test]
    fn chunks_of_any_bytes_round_trip_and_damage_between_hops_is_seen(
        data in proptest::collection::vec(any::<u8>(), 1..5000), offset: u64, flip in any::<Index>(),
    ) {
        let fixed = MorphTransferFixed {
            session: 1, offset, total_bytes: u64::MAX, dirty_bytes: 0, round: 1, flags: 0,
            chunk_crc32: 0, op: TransferOp::Chunk, mode: TransferMode::Rounds,
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
    assert_eq!(refused(&bytes), FrameError::BadCrc(MsgType::HeartbeatReq));
    bytes[12..16].copy_from_slice(&129u32.to_le_bytes());
    let too_large = HeaderError::TooLarge {
        msg_type: MsgType::HeartbeatReq,
        len: 129,
    };
    assert_eq!(refused(&bytes), FrameError::Header(too_large));
    bytes[6..8].copy_from_slice(&0x7777u16.to_le_bytes());
    assert_eq!(
        refused(&bytes),
        FrameError::Header(HeaderError::UnknownType(0x7777))
    );
    bytes[28] = 1;
    assert_eq!(
        refused(&bytes),
        FrameError::Header(HeaderError::ReservedNotZero(1))
    );
    bytes[4] = 2;
    assert_eq!(
        refused(&bytes),
        FrameError::Header(HeaderError::UnsupportedVersion(2))
    );
    bytes[0] = 1;
    assert_eq!(
        refused(&bytes),
        FrameError::Header(HeaderError::BadMagic(0x4B4D_5001))
    );
    assert_eq!(refused(&bytes).code(), ErrorCode::Malformed);
}

#[test]
fn a_reply_to_a_type_that_has_none_is_unknown() {
    let mut bytes = sample("heartbeat_req");
    forge(&mut bytes, 6, &0x8101u16.to_le_bytes());
    assert_eq!(
        refused(&bytes),
        FrameError::Header(HeaderError::UnknownType(0x8101))
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
                error,
                FrameError::Layout {
                    msg_type: MsgType::HeartbeatReq,
                    reason
                }
            );
        }
    }
}

#[test]
fn a_validation_that_passed_with_a_failed_check_is_malformed() {
    let mut bytes = sample("morph_validate_reply");
    forge(&mut bytes, HEADER_BYTES + 8, &[1]);
    let reason = LayoutError::Inconsistent;
    assert_eq!(
        refused(&bytes),
        FrameError::Layout {
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
