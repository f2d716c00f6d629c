//! The numbers are those of the golden file, which the C side is compiled against.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use kmorph_kerf_ring::layout::{self, header, kind, peer, ring};
use kmorph_kerf_ring::{Geometry, OpenError, RETRY_MAX, RETRY_MIN, Region};
use support::{Shared, small};

fn golden() -> BTreeMap<String, u64> {
    let text = include_str!("../golden/layout.def");
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|l| l.starts_with("KERF_GOLDEN(")) {
        let inner = line
            .trim_start_matches("KERF_GOLDEN(")
            .trim_end_matches(')');
        let (name, value) = inner.split_once(", ").unwrap();
        let value = match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
            None => value.parse().unwrap(),
        };
        assert_eq!(found.insert(name.to_owned(), value), None, "{name} twice");
    }
    found
}

fn milliseconds(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap()
}

#[test]
fn every_number_is_the_golden_one() {
    let ours: BTreeMap<String, u64> = [
        ("MAGIC", layout::MAGIC),
        ("VERSION", layout::VERSION.into()),
        ("PEERS_MAX", layout::PEERS_MAX.into()),
        ("SLOTS_MIN", layout::SLOTS_MIN.into()),
        ("SLOTS_MAX", layout::SLOTS_MAX.into()),
        ("SLOTS_RESERVED", layout::SLOTS_RESERVED.into()),
        ("BYTES_MIN", layout::BYTES_MIN.into()),
        ("BYTES_MAX", layout::BYTES_MAX.into()),
        ("BYTES_ALIGN", layout::BYTES_ALIGN.into()),
        ("INLINE_MAX", layout::INLINE_MAX.into()),
        ("PACKET_MAX", layout::PACKET_MAX.into()),
        ("SLOT_SIZE", layout::SLOT_SIZE.into()),
        ("HEADER_MAGIC", header::MAGIC),
        ("HEADER_VERSION", header::VERSION),
        ("HEADER_PEERS", header::PEERS),
        ("HEADER_SLOTS", header::SLOTS),
        ("HEADER_BYTES", header::BYTES),
        ("HEADER_SIZE", header::SIZE),
        ("PEERS_OFFSET", peer::OFFSET),
        ("PEER_STRIDE", peer::STRIDE),
        ("PEER_WORD", peer::WORD),
        ("PEER_VECTORS", peer::VECTORS),
        ("PEER_REASON_LEN", peer::REASON_LEN),
        ("PEER_REASON", peer::REASON),
        ("REASON_MAX", peer::REASON_MAX.into()),
        ("RING_HEAD", ring::HEAD),
        ("RING_WANT", ring::WANT),
        ("RING_ACK", ring::ACK),
        ("RING_BEGUN", ring::BEGUN),
        ("RING_TAIL", ring::TAIL),
        ("RING_FREED", ring::FREED),
        ("RING_WAKE", ring::WAKE),
        ("RING_DESCRIPTORS", ring::DESCRIPTORS),
        ("KIND_INLINE", kind::INLINE),
        ("KIND_BULK", kind::BULK),
        ("RETRY_MIN_MS", milliseconds(RETRY_MIN)),
        ("RETRY_MAX_MS", milliseconds(RETRY_MAX)),
        ("STATE_ABSENT", 0),
        ("STATE_STARTING", 1),
        ("STATE_READY", 2),
        ("STATE_LEFT", 3),
        ("STATE_PANICKED", 4),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    assert_eq!(ours, golden());
}

#[test]
fn measures_out_of_range_are_refused() {
    assert!(Geometry::new(64, 1024, 16 << 20).is_some());
    for (peers, slots, bytes) in [
        (0, 64, 65536),
        (65, 64, 65536),
        (2, 16, 65536),
        (2, 48, 65536),
        (2, 2048, 65536),
        (2, 64, 32768),
        (2, 64, 65537),
        (2, 64, 32 << 20),
    ] {
        let made = Geometry::new(peers, slots, bytes);
        assert_eq!(made, None, "{peers} {slots} {bytes}");
    }
}

#[test]
fn a_region_is_opened_as_it_was_made() {
    let shared = Shared::new(small().region_size());
    assert_eq!(Region::open(shared.view()).unwrap_err(), OpenError::Absent);
    Region::format(shared.view(), small()).unwrap();
    assert_eq!(Region::open(shared.view()).unwrap().geometry(), small());
}

#[test]
fn a_header_that_lies_is_refused() {
    use kmorph_kerf_ring::Memory;
    use std::sync::atomic::Ordering::Relaxed;
    for (at, value, error) in [
        (header::VERSION, 2, OpenError::Version(2)),
        (header::PEERS, 0, OpenError::Measures),
        (header::PEERS, 3, OpenError::Measures),
        (header::SLOTS, 33, OpenError::Measures),
        (header::BYTES, u32::MAX, OpenError::Measures),
        (header::SIZE, 4096, OpenError::Measures),
    ] {
        let shared = Shared::new(small().region_size());
        Region::format(shared.view(), small()).unwrap();
        shared.view().store32(at, value, Relaxed);
        assert_eq!(Region::open(shared.view()).unwrap_err(), error, "{at}");
    }
    let short = Shared::new(small().region_size() - 8);
    assert_eq!(
        Region::format(short.view(), small()).unwrap_err(),
        OpenError::Measures
    );
}
