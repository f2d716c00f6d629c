//! Frames that are deliberately invalid, and the verdict of the decoder.

use kmp_proto::codec::{Decoder, Frame, FrameError, FrameFault, encode};
use kmp_proto::message::LayoutError;
use kmp_proto::wire::HEADER_BYTES;

use crate::samples;

pub(crate) fn frame(sample: &samples::Sample) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&sample.3, sample.1, sample.2, &mut bytes).unwrap();
    bytes
}

pub(crate) fn all(decoder: &mut Decoder, mut input: &[u8]) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    while let Some(frame) = decoder.feed(&mut input)? {
        frames.push(frame);
    }
    assert!(input.is_empty(), "what is not refused is taken");
    Ok(frames)
}

/// Sets bytes of a frame and fixes the checksum.
pub(crate) fn forge(bytes: &mut [u8], at: usize, with: &[u8]) {
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes[24..28].fill(0);
    let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(bytes);
    bytes[24..28].copy_from_slice(&crc.to_le_bytes());
}

pub(crate) fn sample(name: &str) -> Vec<u8> {
    frame(
        &samples::samples()
            .into_iter()
            .find(|s| s.0 == name)
            .unwrap(),
    )
}

pub(crate) fn broken(bytes: &[u8]) -> FrameError {
    all(&mut Decoder::new(), bytes).unwrap_err()
}

pub(crate) fn refused(bytes: &[u8]) -> FrameFault {
    broken(bytes).fault
}

/// Returns a frame of `name` with its fixed part unchanged and its records replaced by `records`.
pub(crate) fn with_records(name: &str, fixed: usize, records: &[u8]) -> Vec<u8> {
    let mut bytes = sample(name)[..HEADER_BYTES + fixed].to_vec();
    bytes.extend_from_slice(records);
    let length = u32::try_from(bytes.len() - HEADER_BYTES).unwrap();
    forge(&mut bytes, 12, &length.to_le_bytes());
    bytes
}

pub(crate) fn record(kind: u16, bytes: &[u8]) -> Vec<u8> {
    let mut record = kind.to_le_bytes().to_vec();
    record.extend_from_slice(&1u16.to_le_bytes());
    record.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_le_bytes());
    record.extend_from_slice(bytes);
    record.resize(record.len().next_multiple_of(8), 0);
    record
}

pub(crate) fn layout_reason(bytes: &[u8]) -> LayoutError {
    match refused(bytes) {
        FrameFault::Layout { reason, .. } => reason,
        other => panic!("{other}"),
    }
}
