//! The payload of every message: two bytes of message type, then the payload, in a frame that is sound
//! but for that.

#![no_main]

mod frames;

use kmp_proto::wire::{HEADER_BYTES, MAGIC, VERSION};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((msg_type, payload)) = data.split_first_chunk::<2>() else {
        return;
    };
    let mut frame = MAGIC.to_le_bytes().to_vec();
    frame.extend_from_slice(&VERSION.to_le_bytes());
    frame.extend_from_slice(msg_type);
    frame.extend_from_slice(&[9, 0, 0, 0]);
    frame.extend_from_slice(
        &u32::try_from(payload.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    frame.resize(HEADER_BYTES, 0);
    frame.extend_from_slice(payload);
    frames::seal(&mut frame);
    if let (decoded, None) = frames::decode([&frame[..]]) {
        decoded.iter().for_each(|one| frames::reread(one, &frame));
    }
});
