//! The stream decoder: any bytes in any pieces give the same frames and the same error, and what was
//! decoded is written again as it came.

#![no_main]

mod frames;

use frames::{decode, reread, seal};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    let mut sealed = data.to_vec();
    seal(&mut sealed);
    check(&sealed);
});

fn check(stream: &[u8]) {
    let (frames, error) = decode([stream]);
    for size in [1, 7, 31, 33, 64] {
        assert_eq!(decode(stream.chunks(size)), (frames.clone(), error));
    }
    let mut at = 0;
    for frame in &frames {
        let len = kmp_proto::wire::HEADER_BYTES + frame.header.payload_len as usize;
        reread(frame, &stream[at..at + len]);
        at += len;
    }
}
