//! Two threads at the two ends of a ring, over memory of this process: whatever both touch must be atomic, and each packet
//! must arrive whole. `tests/ordering.rs` goes through every order of a few steps on a model of memory; this test moves
//! thousands of packets through the real [`Mapped`], around the ends of ring and bytes. `make sanitize` runs it under the
//! sanitizers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use kmorph_kerf_ring::layout::{INLINE_MAX, PACKET_MAX};
use kmorph_kerf_ring::{Class, Link, Mapped, PutError, Region};
use support::{NOW, linked, pattern, region, small};

/// Packets that each end sends: enough for the slots and the bytes to wrap around a hundred times and more.
const PACKETS: u32 = 4_000;

/// Lengths of all kinds, the longest seldom.
fn length(seed: u32) -> usize {
    let (inline, most) = (INLINE_MAX as usize, PACKET_MAX as usize);
    match seed % 64 {
        0 => most,
        1 => inline,
        2 => inline + 1,
        3..20 => inline + 1 + (seed as usize * 7) % 2_000,
        _ => 1 + seed as usize % inline,
    }
}

/// Sends all packets and receives as many, whichever is possible.
fn exchange(link: &mut Link, region: &Region<Mapped>, own: u32, others: u32) {
    let (mut sent, mut received) = (0, 0);
    let mut got = Vec::new();
    while sent < PACKETS || received < PACKETS {
        let before = (sent, received);
        if sent < PACKETS {
            let packet = pattern(own + sent, length(sent));
            let (front, back) = packet.split_at(packet.len() / 3);
            match link.put(region, &[front, back], Class::Data) {
                Ok(()) => sent += 1,
                Err(error) => assert_eq!(error, PutError::Full),
            }
        }
        got.clear();
        if link.take(region, &mut got).unwrap().is_some() {
            assert_eq!(got, pattern(others + received, length(received)));
            received += 1;
        }
        if before == (sent, received) {
            std::thread::yield_now();
        }
    }
}

#[test]
fn what_two_threads_send_each_other_arrives_whole_and_in_order() {
    let (shared, near) = region(small());
    let (mut a, mut b) = linked(&near);
    let far = Region::open(shared.view()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| exchange(&mut b, &far, 1 << 24, 2 << 24));
        exchange(&mut a, &near, 2 << 24, 1 << 24);
    });
    a.poll(&near, NOW);
    assert!(a.is_up() && b.is_up());
}
