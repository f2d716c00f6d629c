//! What the two frame targets share.

use kmp_proto::checksum::crc32;
use kmp_proto::codec::{Decoder, Frame, FrameError, encode};
use kmp_proto::message::layouts;
use kmp_proto::wire::HEADER_BYTES;

/// The frames of a stream that arrives in `pieces`, and the error that ended it.
pub fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Frame>, Option<FrameError>) {
    let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
    for mut piece in pieces {
        loop {
            match decoder.feed(&mut piece) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(
                        decoder.feed(&mut piece),
                        Err(error),
                        "it is broken for ever"
                    );
                    return (frames, Some(error));
                }
            }
        }
        assert!(piece.is_empty(), "what is not refused is taken");
    }
    (frames, None)
}

/// Makes the checksum of each frame in `stream` hold, so that the checks after it are reached.
pub fn seal(mut stream: &mut [u8]) {
    while stream.len() >= HEADER_BYTES {
        let payload_len = u32::from_le_bytes([stream[12], stream[13], stream[14], stream[15]]);
        let len = HEADER_BYTES.saturating_add(payload_len as usize);
        let Some((frame, rest)) = stream.split_at_mut_checked(len) else {
            return;
        };
        frame[24..28].fill(0);
        let crc = crc32(&[frame]);
        frame[24..28].copy_from_slice(&crc.to_le_bytes());
        stream = rest;
    }
}

/// Holds a decoded frame to what was read. Its header and fixed part are written again byte for byte;
/// records only in sense, since some may have been skipped, marked otherwise, or in another order. What
/// was written once is written alike for ever.
pub fn reread(frame: &Frame, came: &[u8]) {
    let (header, message) = (frame.header, &frame.message);
    let write = |message| {
        let mut bytes = Vec::new();
        encode(message, header.sequence, header.timestamp, &mut bytes)
            .expect("what was read can be written");
        bytes
    };
    let again = write(message);
    assert!(again.len() <= came.len(), "{message:?}");
    let (mut frames, error) = decode([&again[..]]);
    assert_eq!((frames.len(), error), (1, None));
    let second = frames.remove(0);
    assert_eq!(write(&second.message), again);
    assert_eq!(second.message, *message);
    // A reply may be shorter than the request of its type.
    let same = fixed_bytes(frame).min(again.len() - HEADER_BYTES);
    assert_eq!(again[..12], came[..12], "magic, version, type, sequence");
    assert_eq!(again[16..24], came[16..24], "timestamp");
    assert_eq!(again[HEADER_BYTES..][..same], came[HEADER_BYTES..][..same]);
    if again.len() == came.len() && came.len() <= HEADER_BYTES + same {
        assert_eq!(again, came);
    }
}

/// Bytes with which every payload of this type begins, whatever records follow.
fn fixed_bytes(frame: &Frame) -> usize {
    let name = frame.header.msg_type.name();
    let sizes = layouts().filter(|(heading, _)| *heading == name);
    sizes.map(|(_, layout)| layout.size).min().unwrap_or(0)
}
