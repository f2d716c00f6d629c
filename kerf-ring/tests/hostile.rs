//! A peer that writes whatever it likes into every shared word, at every moment.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::sync::atomic::Ordering::Relaxed;

use kmorph_kerf_ring::layout::{PACKET_MAX, kind, peer, ring};
use kmorph_kerf_ring::{Class, Corrupt, Link, LinkEvent, Memory, PutError, Region};
use proptest::prelude::*;
use support::{Shared, linked, region, small};

/// Where the ring from 0 to 1 begins in [`small`]: the header, one page of peers, and ring 0 to 0.
const FIRST_RING: u64 = 8192;
const STRIDE: u64 = 77824;
const TO_PEER: u64 = FIRST_RING + STRIDE;
const FROM_PEER: u64 = FIRST_RING + 2 * STRIDE;

#[derive(Clone, Debug)]
enum Step {
    /// Garbage at a shared word.
    Write(u64, u32),
    Put(usize, Class),
    Take,
    Poll,
    Ring,
    Attach,
}

/// Words that matter come up often; any other now and then.
fn place() -> impl Strategy<Value = u64> {
    let control = [ring::HEAD, ring::WANT, ring::ACK];
    let receiver = [ring::TAIL, ring::FREED, ring::WAKE];
    let words = control.into_iter().chain(receiver);
    let words: Vec<u64> = words.flat_map(|w| [TO_PEER + w, FROM_PEER + w]).collect();
    let entry = peer::OFFSET + peer::STRIDE;
    prop_oneof![
        6 => prop::sample::select(words),
        3 => (0..64u64).prop_map(|w| FROM_PEER + ring::DESCRIPTORS + w * 4),
        2 => (0..4u64).prop_map(move |w| entry + w * 4),
        1 => (0..small().region_size() / 4).prop_map(|w| w * 4),
    ]
}

/// Small numbers are nearly right, which is worse than garbage.
fn value() -> impl Strategy<Value = u32> {
    let descriptor = (0..40_000u32, 0..4u32).prop_map(|(len, kind)| len & 0xffff | kind << 16);
    prop_oneof![any::<u32>(), 0..70u32, descriptor]
}

fn step() -> impl Strategy<Value = Step> {
    let class = prop_oneof![Just(Class::Data), Just(Class::Control)];
    prop_oneof![
        6 => (place(), value()).prop_map(|(at, value)| Step::Write(at, value)),
        3 => (1..=PACKET_MAX as usize, class).prop_map(|(len, class)| Step::Put(len, class)),
        3 => Just(Step::Take),
        4 => Just(Step::Poll),
        1 => Just(Step::Ring),
        1 => Just(Step::Attach),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Nothing panics or reaches out of bounds (Mapped asserts it); what is taken is never longer than a
    /// packet can be; what is refused stays refused until the peer has a new generation.
    #[test]
    fn garbage_is_found_or_harmless(steps in prop::collection::vec(step(), 1..300)) {
        let (shared, region) = region(small());
        let (mut link, _other) = linked(&region);
        let hostile = shared.view();
        let packet = vec![0x5a; PACKET_MAX as usize];
        let mut got = Vec::new();
        for step in steps {
            match step {
                Step::Write(at, value) => hostile.store32(at, value, Relaxed),
                Step::Put(len, class) => {
                    let put = link.put(&region, &[&packet[..len]], class);
                    if put == Err(PutError::Corrupt(Corrupt)) {
                        link.corrupt(&region);
                        prop_assert!(!link.is_up());
                    }
                }
                Step::Take => {
                    got.clear();
                    match link.take(&region, &mut got) {
                        Ok(taken) => {
                            prop_assert_eq!(taken.unwrap_or(0), got.len());
                            prop_assert!(got.len() <= PACKET_MAX as usize);
                        }
                        Err(Corrupt) => {
                            let refused = link.corrupt(&region);
                            prop_assert_eq!(refused, link.is_refused());
                            let before = region.peer(1);
                            let seen = link.poll(&region);
                            if refused && before == region.peer(1) {
                                prop_assert_eq!(seen, LinkEvent::Down);
                            }
                        }
                    }
                }
                Step::Poll => {
                    let was = link.is_up();
                    let event = link.poll(&region);
                    let is = link.is_up();
                    let expected = match event {
                        LinkEvent::Down => (false, false),
                        LinkEvent::Up => (true, true),
                        LinkEvent::CameUp => (false, true),
                        LinkEvent::Lost => (true, false),
                    };
                    prop_assert_eq!((was, is), expected);
                }
                Step::Ring => {
                    if let Some((tx, rx)) = link.rings() {
                        tx.must_ring(region.memory());
                        rx.must_ring(region.memory());
                        tx.want_room(region.memory());
                        rx.sleep(region.memory());
                    }
                }
                Step::Attach => {
                    region.attach(1, u32::MAX);
                }
            }
        }
    }

    #[test]
    fn a_region_of_garbage_is_refused_or_within_its_memory(
        words in prop::collection::vec(value(), 1024),
        genuine in any::<bool>(),
    ) {
        let shared = Shared::new(small().region_size());
        let view = shared.view();
        if genuine {
            Region::format(shared.view(), small()).unwrap();
        }
        for (at, word) in (if genuine { 8 } else { 0 }..).step_by(4).zip(words) {
            if at < 4096 {
                view.store32(at, word, Relaxed);
            }
        }
        if let Ok(region) = Region::open(shared.view()) {
            prop_assert!(region.geometry().region_size() <= shared.size());
        }
    }
}

/// One rule broken at a time: each is found by the first look at it.
#[test]
fn each_lie_of_a_sender_is_corrupt() {
    let inline = |len: u64, kind: u64, position: u64| position << 32 | kind << 16 | len;
    for (what, head, descriptor) in [
        ("more than the ring holds", 33, inline(4, kind::INLINE, 0)),
        (
            "a head that moved back",
            u32::MAX,
            inline(4, kind::INLINE, 0),
        ),
        ("no length", 1, inline(0, kind::INLINE, 0)),
        ("too long for a slot", 1, inline(256, kind::INLINE, 0)),
        ("another slot", 1, inline(4, kind::INLINE, 1)),
        ("no kind", 1, inline(4, 0, 0)),
        ("unknown kind", 1, inline(4, 3, 0)),
        ("too short for the bytes", 1, inline(255, kind::BULK, 0)),
        ("too long for a packet", 1, inline(32257, kind::BULK, 0)),
        ("other bytes", 1, inline(256, kind::BULK, 64)),
    ] {
        let (shared, region) = region(small());
        let (mut link, _other) = linked(&region);
        let view = shared.view();
        view.store64(FROM_PEER + ring::DESCRIPTORS, descriptor, Relaxed);
        view.store32(FROM_PEER + ring::HEAD, head, Relaxed);
        let mut got = Vec::new();
        assert_eq!(link.take(&region, &mut got), Err(Corrupt), "{what}");
        assert!(got.is_empty(), "{what}");
        assert!(link.corrupt(&region), "{what}");
        assert_eq!(link.poll(&region), LinkEvent::Down, "{what}: refused");
    }
}

#[test]
fn a_packet_that_was_promised_cannot_be_taken_back() {
    let (shared, region) = region(small());
    let (mut a, mut b) = linked(&region);
    b.put(&region, &[b"one"], Class::Data).unwrap();
    b.put(&region, &[b"two"], Class::Data).unwrap();
    let mut got = Vec::new();
    assert_eq!(a.take(&region, &mut got), Ok(Some(3)));
    shared.view().store32(FROM_PEER + ring::HEAD, 1, Relaxed);
    assert_eq!(a.take(&region, &mut got), Err(Corrupt));
}

#[test]
fn each_lie_of_a_receiver_is_corrupt() {
    for (what, at, value) in [
        ("took what was not sent", ring::TAIL, 2),
        ("moved back", ring::TAIL, u32::MAX),
        ("gave back what it did not have", ring::FREED, 64),
        ("moved back in the bytes", ring::FREED, u32::MAX),
    ] {
        let (shared, region) = region(small());
        let (mut link, _other) = linked(&region);
        link.put(&region, &[b"one"], Class::Data).unwrap();
        shared.view().store32(TO_PEER + at, value, Relaxed);
        let put = link.put(&region, &[&[1; 300]], Class::Data);
        assert_eq!(put, Err(PutError::Corrupt(Corrupt)), "{what}");
    }
}

#[test]
fn a_peer_that_begins_anew_in_between_is_not_blamed() {
    let (_shared, region) = region(small());
    let (mut a, mut b) = linked(&region);
    b.put(&region, &[b"x"], Class::Data).unwrap();
    let mut got = Vec::new();
    a.take(&region, &mut got).unwrap();
    let generation = region.attach(1, 1);
    assert_eq!(
        a.take(&region, &mut got),
        Err(Corrupt),
        "its head is zero again"
    );
    assert!(!a.corrupt(&region), "it is not to blame");
    let mut b = Link::new(1, 0, generation);
    assert_eq!(a.poll(&region), LinkEvent::Down);
    assert_eq!(b.poll(&region), LinkEvent::CameUp);
    assert_eq!(a.poll(&region), LinkEvent::CameUp);
}

#[test]
fn what_is_refused_comes_back_with_a_new_generation_only() {
    let (shared, region) = region(small());
    let (mut a, mut b) = linked(&region);
    shared.view().store32(FROM_PEER + ring::HEAD, 1000, Relaxed);
    let mut got = Vec::new();
    assert_eq!(a.take(&region, &mut got), Err(Corrupt));
    assert!(a.corrupt(&region));
    assert_eq!(
        b.poll(&region),
        LinkEvent::Lost,
        "it sees that it is refused"
    );
    for _ in 0..3 {
        assert_eq!(a.poll(&region), LinkEvent::Down);
        assert_eq!(b.poll(&region), LinkEvent::Down);
    }
    let mut b = Link::new(1, 0, region.attach(1, 1));
    a.poll(&region);
    assert_eq!(b.poll(&region), LinkEvent::CameUp);
    assert_eq!(a.poll(&region), LinkEvent::CameUp);
    assert!(!a.is_refused());
}

#[test]
fn a_reason_is_cut_at_its_field() {
    let (shared, region) = region(small());
    let entry = peer::OFFSET + peer::STRIDE;
    shared
        .view()
        .store32(entry + peer::REASON_LEN, u32::MAX, Relaxed);
    assert_eq!(region.reason(1).len(), peer::REASON_MAX as usize);
    shared.view().store32(entry + peer::VECTORS, 0, Relaxed);
    assert_eq!(region.vector(1, 5), 0);
}
