//! C and Rust at the two ends of one memory, each in each role; and C alone against a hostile peer.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../../../kerf-ring/tests/support/mod.rs"]
mod support;

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use kmorph_kerf_ring::layout::{PACKET_MAX, header, peer, ring};
use kmorph_kerf_ring::{Class, Geometry, Link, LinkEvent, Mapped, Memory, PeerState, Region};
use kmorph_kmod_check::{End, Outcome, format};
use proptest::prelude::*;
use support::{NOW, Shared, pattern, region, small};

const FROM_PEER: u64 = 8192 + 2 * 77824;
const TO_PEER: u64 = 8192 + 77824;

fn open(shared: &Shared, me: u32, peer: u32) -> End {
    // SAFETY: the memory outlives the end in each test.
    unsafe { End::open(shared.start(), shared.size(), me, peer) }.unwrap()
}

/// Rust as peer 0, C as peer 1, up.
fn linked(shared: &Shared, region: &Region<Mapped>) -> (Link, End) {
    let mut rust = Link::new(0, 1, region.attach(0, 1));
    let mut c = open(shared, 1, 0);
    assert_eq!(rust.poll(region, NOW), LinkEvent::Down);
    assert_eq!(c.poll(NOW), LinkEvent::CameUp);
    assert_eq!(rust.poll(region, NOW), LinkEvent::CameUp);
    (rust, c)
}

#[test]
fn both_make_the_same_region() {
    for (peers, slots, bytes) in [(2, 32, 65536), (5, 64, 131_072), (24, 1024, 65536)] {
        let geometry = Geometry::new(peers, slots, bytes).unwrap();
        let (ours, theirs) = (
            Shared::new(geometry.region_size()),
            Shared::new(geometry.region_size()),
        );
        Region::format(ours.view(), geometry).unwrap();
        // SAFETY: the memory is live.
        unsafe { format(theirs.start(), theirs.size(), peers, slots, bytes) }.unwrap();
        let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
        ours.view().read(0, &mut a);
        theirs.view().read(0, &mut b);
        assert_eq!(a, b);
        // SAFETY: likewise; one byte too few.
        let short = unsafe { format(theirs.start(), theirs.size() - 8, peers, slots, bytes) };
        assert!(short.is_err());
    }
}

#[test]
fn c_refuses_the_headers_that_rust_refuses() {
    for (at, value) in [
        (header::MAGIC, 0),
        (header::VERSION, 2),
        (header::PEERS, 0),
        (header::PEERS, 3),
        (header::SLOTS, 33),
        (header::BYTES, u32::MAX),
        (header::SIZE, 4096),
    ] {
        let (shared, _region) = region(small());
        shared.view().store32(at, value, Relaxed);
        // SAFETY: the memory is live.
        let opened = unsafe { End::open(shared.start(), shared.size(), 1, 0) };
        assert!(opened.is_err(), "{at}");
        assert!(Region::open(shared.view()).is_err(), "{at}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Rust(usize, bool),
    C(usize, bool),
    TakeRust,
    TakeC,
}

fn step() -> impl Strategy<Value = Step> {
    let length = || prop_oneof![3 => 1..=255usize, 2 => 256..=PACKET_MAX as usize];
    prop_oneof![
        (length(), any::<bool>()).prop_map(|(len, control)| Step::Rust(len, control)),
        (length(), any::<bool>()).prop_map(|(len, control)| Step::C(len, control)),
        Just(Step::TakeRust),
        Just(Step::TakeC),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn packets_cross_the_language_border(steps in prop::collection::vec(step(), 1..500)) {
        let (shared, region) = region(small());
        let (mut rust, mut c) = linked(&shared, &region);
        let (mut to_c, mut to_rust) = (VecDeque::new(), VecDeque::new());
        let mut got = Vec::new();
        for (seed, step) in (0u32..).zip(steps) {
            match step {
                Step::Rust(len, control) => {
                    let sent = pattern(seed, len);
                    let class = if control { Class::Control } else { Class::Data };
                    if rust.put(&region, &[&sent], class).is_ok() {
                        to_c.push_back(sent);
                    }
                }
                Step::C(len, control) => {
                    let sent = pattern(seed, len);
                    if c.put(&sent, control) == Outcome::Ok {
                        to_rust.push_back(sent);
                    }
                }
                Step::TakeRust => {
                    got.clear();
                    rust.take(&region, &mut got).unwrap();
                    prop_assert_eq!(&got, &to_rust.pop_front().unwrap_or_default());
                }
                Step::TakeC => {
                    let outcome = c.take(&mut got);
                    let sent = to_c.pop_front();
                    let expected = if sent.is_some() { Outcome::Ok } else { Outcome::Empty };
                    prop_assert_eq!(outcome, expected);
                    prop_assert_eq!(&got, &sent.unwrap_or_default());
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Attack {
    Write(u64, u32),
    Put(usize, bool),
    Take,
    Poll,
    Ring,
    Attach,
    /// Time passes.
    Wait(Duration),
    /// Both ends state again that they are there.
    Restate,
}

fn attack() -> impl Strategy<Value = Attack> {
    let words = [
        ring::HEAD,
        ring::WANT,
        ring::ACK,
        ring::ACK + 4,
        ring::BEGUN,
        ring::BEGUN + 4,
        ring::TAIL,
        ring::FREED,
        ring::WAKE,
    ];
    let words: Vec<u64> = words
        .iter()
        .flat_map(|w| [TO_PEER + w, FROM_PEER + w])
        .collect();
    let place = prop_oneof![
        6 => prop::sample::select(words),
        3 => (0..64u64).prop_map(|w| FROM_PEER + ring::DESCRIPTORS + w * 4),
        2 => (0..4u64).prop_map(|w| peer::OFFSET + peer::STRIDE + w * 4),
        1 => (0..small().region_size() / 4).prop_map(|w| w * 4),
    ];
    let descriptor = (0..40_000u32, 0..4u32).prop_map(|(len, kind)| len & 0xffff | kind << 16);
    let value = prop_oneof![any::<u32>(), 0..70u32, descriptor];
    prop_oneof![
        6 => (place, value).prop_map(|(at, value)| Attack::Write(at, value)),
        3 => (1..=PACKET_MAX as usize, any::<bool>()).prop_map(|(n, c)| Attack::Put(n, c)),
        3 => Just(Attack::Take),
        4 => Just(Attack::Poll),
        1 => Just(Attack::Ring),
        1 => Just(Attack::Attach),
        1 => (0..3000u64).prop_map(|ms| Attack::Wait(Duration::from_millis(ms))),
        1 => Just(Attack::Restate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// The memory ends where the region does, between guard pages of other allocations; what the sanitizer
    /// sees ends the process. C and Rust come to the same verdict on the same garbage.
    #[test]
    fn c_and_rust_judge_garbage_alike(steps in prop::collection::vec(attack(), 1..300)) {
        let (ours, theirs) = (region(small()), region(small()));
        let mut rust = Link::new(0, 1, ours.1.attach(0, 1));
        let mut c = open(&theirs.0, 0, 1);
        for region in [&ours.1, &theirs.1] {
            let generation = region.attach(1, 1);
            region.memory().store64(FROM_PEER + ring::ACK, 1 << 32 | 1, Relaxed);
            prop_assert_eq!(generation, 1);
        }
        let packet = vec![0x5a; PACKET_MAX as usize];
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let mut now = NOW;
        for step in steps {
            match step {
                Attack::Write(at, value) => {
                    ours.0.view().store32(at, value, Relaxed);
                    theirs.0.view().store32(at, value, Relaxed);
                }
                Attack::Put(len, control) => {
                    let class = if control { Class::Control } else { Class::Data };
                    let put = match rust.put(&ours.1, &[&packet[..len]], class) {
                        Ok(()) => Outcome::Ok,
                        Err(kmorph_kerf_ring::PutError::Full) => Outcome::Full,
                        Err(kmorph_kerf_ring::PutError::Corrupt(_)) => Outcome::Corrupt,
                        Err(kmorph_kerf_ring::PutError::Length(_)) => Outcome::TooLong,
                    };
                    prop_assert_eq!(c.put(&packet[..len], control), put);
                    if put == Outcome::Corrupt {
                        prop_assert_eq!(c.corrupt(now), rust.corrupt(&ours.1, now));
                    }
                }
                Attack::Take => {
                    a.clear();
                    let taken = match rust.take(&ours.1, &mut a) {
                        Ok(Some(_)) => Outcome::Ok,
                        Ok(None) => Outcome::Empty,
                        Err(_) => Outcome::Corrupt,
                    };
                    prop_assert_eq!(c.take(&mut b), taken);
                    if taken == Outcome::Ok {
                        prop_assert_eq!(&a, &b);
                    }
                    if taken == Outcome::Corrupt {
                        prop_assert_eq!(c.corrupt(now), rust.corrupt(&ours.1, now));
                    }
                }
                Attack::Poll => {
                    prop_assert_eq!(c.poll(now), rust.poll(&ours.1, now));
                    prop_assert_eq!(c.is_up(), rust.is_up());
                    prop_assert_eq!(c.is_waiting(), rust.is_waiting());
                }
                Attack::Ring => {
                    c.sleep();
                    c.want_room();
                    let (mut tx_rings, mut rx_rings) = (false, false);
                    if let Some((tx, rx)) = rust.rings() {
                        rx.sleep(ours.1.memory());
                        tx.want_room(ours.1.memory());
                        tx_rings = tx.must_ring(ours.1.memory());
                        rx_rings = rx.must_ring(ours.1.memory());
                    }
                    prop_assert_eq!(c.sender_must_ring(), tx_rings);
                    prop_assert_eq!(c.receiver_must_ring(), rx_rings);
                }
                Attack::Attach => {
                    ours.1.attach(1, u32::MAX);
                    theirs.1.attach(1, u32::MAX);
                }
                Attack::Wait(time) => now += time,
                Attack::Restate => {
                    ours.1.restate(0, 1, 1);
                    c.restate();
                }
            }
        }
    }
}

/// Two threads, as fast as they can, both ways at once.
#[test]
fn bulk_and_small_packets_at_full_speed() {
    const PACKETS: u32 = 20_000;
    let (shared, region) = region(small());
    let (mut rust, mut c) = linked(&shared, &region);
    let len = |seed: u32| (seed.wrapping_mul(7919) % 3000) as usize + 1;
    thread::scope(|scope| {
        scope.spawn(move || {
            let (mut sent, mut got, mut buffer) = (0, 0, Vec::new());
            while sent < PACKETS || got < PACKETS {
                if sent < PACKETS && c.put(&pattern(sent, len(sent)), false) == Outcome::Ok {
                    sent += 1;
                }
                match c.take(&mut buffer) {
                    Outcome::Ok => {
                        assert_eq!(buffer, pattern(got, len(got)));
                        got += 1;
                    }
                    Outcome::Empty => thread::yield_now(),
                    other => panic!("{other:?}"),
                }
            }
        });
        let (mut sent, mut got, mut buffer) = (0, 0, Vec::new());
        while sent < PACKETS || got < PACKETS {
            if sent < PACKETS {
                let packet = pattern(sent, len(sent));
                sent += u32::from(rust.put(&region, &[&packet], Class::Data).is_ok());
            }
            buffer.clear();
            if rust.take(&region, &mut buffer).unwrap().is_some() {
                assert_eq!(buffer, pattern(got, len(got)));
                got += 1;
            } else {
                thread::yield_now();
            }
        }
    });
}

#[test]
fn c_sees_a_rust_peer_leave_and_come_back_and_the_other_way_round() {
    let (shared, region) = region(small());
    let (_, mut c) = linked(&shared, &region);
    region.detach(0);
    assert_eq!(c.poll(NOW), LinkEvent::Lost);
    let mut rust = Link::new(0, 1, region.attach(0, 1));
    assert_eq!(c.poll(NOW), LinkEvent::Down);
    assert_eq!(rust.poll(&region, NOW), LinkEvent::CameUp);
    assert_eq!(c.poll(NOW), LinkEvent::CameUp);

    c.detach(4, "Attempted to kill init");
    assert_eq!(region.peer(1).state, PeerState::Panicked);
    assert_eq!(region.reason(1), b"Attempted to kill init");
    assert_eq!(rust.poll(&region, NOW), LinkEvent::Lost);
    let mut c = open(&shared, 1, 0);
    assert_eq!(region.reason(1), b"");
    assert_eq!(rust.poll(&region, NOW), LinkEvent::Down);
    assert_eq!(c.poll(NOW), LinkEvent::CameUp);
    assert_eq!(rust.poll(&region, NOW), LinkEvent::CameUp);
    // Its own generation is in its own memory: what another peer writes into the entry does not last.
    let before = region.peer(1).generation;
    let word = peer::OFFSET + peer::STRIDE + peer::WORD;
    shared.view().store64(word, 77 << 32 | 2, Relaxed);
    c.detach(4, "again");
    assert_eq!(region.peer(1).generation, before);
    c.detach(4, &"x".repeat(500));
    assert_eq!(region.reason(1).len(), 112);
}

#[test]
fn doorbells_cross_the_language_border() {
    let (shared, region) = region(small());
    let (mut rust, mut c) = linked(&shared, &region);
    let memory = region.memory();
    let (tx, rx) = rust.rings().unwrap();
    c.sleep();
    tx.put(memory, &[b"x"], Class::Data).unwrap();
    assert!(tx.must_ring(memory) && !tx.must_ring(memory));
    c.awake();
    assert!(!tx.must_ring(memory));
    rx.sleep(memory);
    assert_eq!(c.put(b"y", false), Outcome::Ok);
    assert!(c.sender_must_ring() && !c.sender_must_ring());
    c.want_room();
    assert!(rx.must_ring(memory) && !rx.must_ring(memory));
    c.has_room();
    tx.want_room(memory);
    assert!(c.receiver_must_ring() && !c.receiver_must_ring());
}

/// One end in each language loses the link, to a third peer, and the two come together again with the generations that
/// they have.
#[test]
fn a_spoiled_pair_of_both_languages_recovers() {
    for (at, value) in [
        (TO_PEER + ring::HEAD, 1000),
        (FROM_PEER + ring::HEAD, 1000),
        (TO_PEER + ring::ACK, 7),
        (FROM_PEER + ring::BEGUN + 4, 7),
        (peer::OFFSET + peer::WORD, 3),
        (peer::OFFSET + peer::STRIDE + peer::WORD, 3),
    ] {
        let (shared, region) = region(small());
        let (mut rust, mut c) = linked(&shared, &region);
        shared.view().store32(at, value, Relaxed);
        let (mut now, mut got) = (NOW, Vec::new());
        let mut look = |now| {
            rust.poll(&region, now);
            c.poll(now);
            if rust.take(&region, &mut got).is_err() {
                rust.corrupt(&region, now);
            }
            if c.take(&mut got) == Outcome::Corrupt {
                c.corrupt(now);
            }
            region.restate(0, 1, 1);
            c.restate();
        };
        for _ in 0..15 {
            look(now);
            now += Duration::from_millis(100);
        }
        assert!(rust.is_up() && c.is_up(), "{at}");
        assert_eq!(c.put(b"C", false), Outcome::Ok);
        got.clear();
        assert_eq!(rust.take(&region, &mut got), Ok(Some(1)), "{at}");
        rust.put(&region, &[b"Rust"], Class::Data).unwrap();
        assert_eq!(c.take(&mut got), Outcome::Ok, "{at}");
        assert_eq!(got, b"Rust");
        assert_eq!(
            (region.peer(0).generation, region.peer(1).generation),
            (1, 1)
        );
    }
}
