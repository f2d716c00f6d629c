//! Golden frames: the exact bytes of one frame of every type and reply, in a form that any other implementation can
//! read. `UPDATE_GOLDEN=1 cargo test -p kmp-proto --test golden` rewrites the frames after a deliberate change of the
//! protocol.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod samples;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;

use kmp_proto::codec::{Decoder, encode};
use kmp_proto::message::Message;
use kmp_proto::wire::{HEADER_BYTES, MsgType};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn to_text(name: &str, message: &Message, frame: &[u8]) -> String {
    let reply = if message.is_reply() { " (reply)" } else { "" };
    let mut text = format!("# {name}: {}{reply}\n# header\n", message.msg_type());
    for (n, line) in frame.chunks(16).enumerate() {
        if n == 2 {
            text.push_str("# payload\n");
        }
        let hex: Vec<_> = line.iter().map(|b| format!("{b:02x}")).collect();
        writeln!(text, "{}", hex.join(" ")).unwrap();
    }
    text
}

fn from_text(text: &str) -> Vec<u8> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap());
    lines
        .flat_map(str::split_whitespace)
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect()
}

#[test]
fn every_frame_has_exactly_the_golden_bytes() {
    for (name, sequence, timestamp, message) in samples::samples() {
        let mut frame = Vec::new();
        encode(&message, sequence, timestamp, &mut frame).unwrap();
        let path = folder().join(format!("{name}.hex"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, to_text(name, &message, &frame)).unwrap();
        }
        let golden = from_text(&std::fs::read_to_string(&path).unwrap());
        assert_eq!(frame, golden, "{name}");
        let mut input = &golden[..];
        let decoded = Decoder::new().feed(&mut input).unwrap().unwrap();
        assert_eq!(
            (decoded.message, decoded.header.sequence),
            (message, sequence),
            "{name}"
        );
        assert_eq!(decoded.header.timestamp, timestamp, "{name}");
    }
}

/// With `UPDATE_GOLDEN`, writes `bytes` to the fuzzers' corpus; else compares `bytes` with the corpus.
fn assert_seed(target: &str, name: &str, bytes: &[u8]) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let path = folder.join(target).join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, bytes).unwrap();
    }
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "{}", path.display());
}

#[test]
fn every_golden_frame_is_a_seed_of_the_fuzzers() {
    for (name, sequence, timestamp, message) in samples::samples() {
        let mut frame = Vec::new();
        encode(&message, sequence, timestamp, &mut frame).unwrap();
        assert_seed("frame_decoder", name, &frame);
        // The input of that target is the message type, then the payload.
        let payload = [&frame[6..8], &frame[HEADER_BYTES..]].concat();
        assert_seed("frame_payload", name, &payload);
    }
}

#[test]
fn every_type_and_reply_has_a_golden_frame_and_every_file_is_one() {
    let mut covered = BTreeSet::new();
    let mut files: BTreeSet<_> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for (name, _, _, message) in samples::samples() {
        covered.insert((message.msg_type(), message.is_reply()));
        assert!(files.remove(&format!("{name}.hex")), "{name}");
    }
    for msg_type in MsgType::ALL {
        assert!(covered.contains(&(*msg_type, false)), "{msg_type}");
        assert_eq!(
            covered.contains(&(*msg_type, true)),
            msg_type.has_reply(),
            "{msg_type}"
        );
    }
    assert!(files.is_empty(), "files without a sample: {files:?}");
}

#[test]
fn a_heartbeat_is_asked_for_in_48_bytes_and_answered_in_80_and_never_in_256() {
    let heartbeat = samples::samples()
        .into_iter()
        .find(|s| s.0 == "heartbeat_rsp")
        .unwrap();
    let mut frame = Vec::new();
    encode(&heartbeat.3, 1, 1, &mut frame).unwrap();
    assert_eq!(frame.len(), 80);
    let request = samples::samples()
        .into_iter()
        .find(|s| s.0 == "heartbeat_req")
        .unwrap();
    frame.clear();
    encode(&request.3, 1, 1, &mut frame).unwrap();
    assert_eq!(frame.len(), 48);
    assert!(MsgType::HeartbeatRsp.payload_limit() + 32 < 256);
}
