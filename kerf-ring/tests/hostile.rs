//! A peer that writes whatever it likes into every shared word, at every moment.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use kmorph_kerf_ring::layout::{PACKET_MAX, kind, peer, ring};
use kmorph_kerf_ring::{
    Class, Corrupt, Link, LinkEvent, Mapped, Memory, PutError, RETRY_MAX, RETRY_MIN, Region,
};
use proptest::prelude::*;
use support::{NOW, Shared, linked, pattern, region, small};

/// Where the ring from 0 to 1 begins in [`small`]: the header, one page of peers, and ring 0 to 0.
const FIRST_RING: u64 = 8192;
const STRIDE: u64 = 77824;
const TO_PEER: u64 = FIRST_RING + STRIDE;
const FROM_PEER: u64 = FIRST_RING + 2 * STRIDE;

/// The losses of a link, and how long each keeps it down: told apart from the link's own count.
#[derive(Default)]
struct Losses {
    last: Option<(Duration, u32)>,
    wait: Duration,
}

impl Losses {
    fn add(&mut self, now: Duration, region: &Region<Mapped>) {
        self.wait = (self.wait * 2).clamp(RETRY_MIN, RETRY_MAX);
        self.last = Some((now, region.peer(1).generation));
    }

    /// Whether the peer has another generation than when the link was lost, or the wait is over.
    fn may_come_up(&self, now: Duration, region: &Region<Mapped>) -> bool {
        self.last.is_none_or(|(at, generation)| {
            now >= at + self.wait || region.peer(1).generation != generation
        })
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Garbage at a shared word.
    Write(u64, u32),
    Put(usize, Class),
    Take,
    Poll,
    Ring,
    Attach,
    /// Time passes.
    Wait(Duration),
}

/// Words that matter come up often; any other now and then.
fn place() -> impl Strategy<Value = u64> {
    let names = [ring::ACK, ring::ACK + 4, ring::BEGUN, ring::BEGUN + 4];
    let control = [ring::HEAD, ring::WANT].into_iter().chain(names);
    let receiver = [ring::TAIL, ring::FREED, ring::WAKE];
    let words = control.chain(receiver);
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
        1 => (0..3000u64).prop_map(|ms| Step::Wait(Duration::from_millis(ms))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Nothing panics or reaches out of bounds (Mapped asserts it); what is taken is never longer than a
    /// packet can be; a link that was lost stays down for a while, twice as long each time, unless the peer has a new
    /// generation.
    #[test]
    fn garbage_is_found_or_harmless(steps in prop::collection::vec(step(), 1..300)) {
        let (shared, region) = region(small());
        let (mut link, _other) = linked(&region);
        let hostile = shared.view();
        let packet = vec![0x5a; PACKET_MAX as usize];
        let mut got = Vec::new();
        let mut now = NOW;
        let mut lost = Losses::default();
        for step in steps {
            match step {
                Step::Write(at, value) => hostile.store32(at, value, Relaxed),
                Step::Put(len, class) => {
                    let put = link.put(&region, &[&packet[..len]], class);
                    if put == Err(PutError::Corrupt(Corrupt)) {
                        link.corrupt(&region, now);
                        lost.add(now, &region);
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
                            let blamed = link.corrupt(&region, now);
                            lost.add(now, &region);
                            let seen = link.poll(&region, now);
                            if blamed {
                                prop_assert_eq!(seen, LinkEvent::Down);
                                prop_assert!(link.is_waiting());
                            }
                        }
                    }
                }
                Step::Poll => {
                    let was = link.is_up();
                    let event = link.poll(&region, now);
                    let is = link.is_up();
                    match event {
                        LinkEvent::Lost => lost.add(now, &region),
                        LinkEvent::CameUp => prop_assert!(lost.may_come_up(now, &region)),
                        _ => {}
                    }
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
                Step::Wait(time) => now += time,
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
        assert!(link.corrupt(&region, NOW), "{what}");
        assert_eq!(link.poll(&region, NOW), LinkEvent::Down, "{what}");
        assert!(link.is_waiting(), "{what}");
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
    assert!(!a.corrupt(&region, NOW), "it is not to blame");
    let mut b = Link::new(1, 0, generation);
    assert_eq!(a.poll(&region, NOW), LinkEvent::Down);
    assert_eq!(b.poll(&region, NOW), LinkEvent::CameUp);
    assert_eq!(a.poll(&region, NOW), LinkEvent::CameUp);
}

#[test]
fn a_new_generation_ends_the_wait() {
    let (shared, region) = region(small());
    let (mut a, mut b) = linked(&region);
    shared.view().store32(FROM_PEER + ring::HEAD, 1000, Relaxed);
    let mut got = Vec::new();
    assert_eq!(a.take(&region, &mut got), Err(Corrupt));
    assert!(a.corrupt(&region, NOW));
    assert_eq!(
        b.poll(&region, NOW),
        LinkEvent::Lost,
        "it sees that the other has given up"
    );
    for _ in 0..3 {
        assert_eq!(a.poll(&region, NOW), LinkEvent::Down);
        assert_eq!(b.poll(&region, NOW), LinkEvent::Down);
    }
    let mut b = Link::new(1, 0, region.attach(1, 1));
    a.poll(&region, NOW);
    assert_eq!(b.poll(&region, NOW), LinkEvent::CameUp);
    assert_eq!(a.poll(&region, NOW), LinkEvent::CameUp);
    assert!(!a.is_waiting());
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

/// Two ends that keep the rules, as their programs do: they look every 100 ms, and judge what they find.
struct Pair {
    region: Region<Mapped>,
    generations: [u32; 2],
    ends: [Link; 2],
    now: Duration,
}

/// How often an end looks.
const SCAN: Duration = Duration::from_millis(100);

impl Pair {
    fn look(&mut self) {
        self.now += SCAN;
        for (me, end) in (0..).zip(&mut self.ends) {
            self.region.restate(me, self.generations[me as usize], 1);
            end.poll(&self.region, self.now);
        }
        self.take(0);
        self.take(1);
    }

    /// A packet for one end, or nothing.
    fn take(&mut self, to: usize) -> Vec<u8> {
        let mut got = Vec::new();
        if self.ends[to].take(&self.region, &mut got).is_err() {
            self.ends[to].corrupt(&self.region, self.now);
        }
        got
    }

    /// One packet from `from`; whether it arrived.
    fn exchange(&mut self, from: usize, seed: u32) -> bool {
        let sent = pattern(seed, if seed.is_multiple_of(3) { 3000 } else { 80 });
        let put = self.ends[from].put(&self.region, &[&sent], Class::Data);
        if put == Err(PutError::Corrupt(Corrupt)) {
            self.ends[from].corrupt(&self.region, self.now);
        }
        self.take(1 - from) == sent
    }
}

/// What a third peer can write over: every word of the pair's rings, their descriptors, and both peers' entries.
fn of_the_pair() -> impl Strategy<Value = u64> {
    let ring = prop_oneof![Just(TO_PEER), Just(FROM_PEER)];
    let sender = (0..6u64).prop_map(|word| word * 4);
    let receiver = (0..3u64).prop_map(|word| ring::TAIL + word * 4);
    let descriptors = (0..64u64).prop_map(|word| ring::DESCRIPTORS + word * 4);
    let word = prop_oneof![3 => sender, 3 => receiver, 1 => descriptors];
    prop_oneof![
        6 => (ring, word).prop_map(|(ring, word)| ring + word),
        1 => (0..2u64, 0..3u64).prop_map(|(n, word)| peer::OFFSET + n * peer::STRIDE + word * 4),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// A third peer writes over the words of a pair, in between whatever the two do. When it has stopped the two
    /// come together again, with the generations that they have.
    #[test]
    fn a_pair_that_a_third_peer_spoiled_recovers(
        spoils in prop::collection::vec((of_the_pair(), value(), 0..4u8), 1..60),
    ) {
        /// More than the longest waits of both, one after the other, and a scan for each step of the handshake.
        const LOOKS_MAX: u32 = 4 * 600;
        /// Twice what a ring holds, so nothing is left of what was spoiled.
        const PACKETS: u32 = 64;
        let (shared, region) = region(small());
        let (a, b) = linked(&region);
        let mut pair = Pair { region, generations: [1, 1], ends: [a, b], now: NOW };
        for (seed, (at, value, then)) in (0..).zip(spoils) {
            shared.view().store32(at, value, Relaxed);
            match then {
                0 => pair.look(),
                1 => drop(pair.exchange(0, seed)),
                2 => drop(pair.exchange(1, seed)),
                _ => {}
            }
        }
        let (mut looks, mut whole) = (0, 0);
        while whole < PACKETS {
            prop_assert!(looks < LOOKS_MAX, "the pair stays apart: {:?}", pair.ends);
            pair.look();
            looks += 1;
            while whole < PACKETS && pair.exchange(0, whole) && pair.exchange(1, whole) {
                whole += 1;
            }
            if whole < PACKETS {
                whole = 0;
            }
        }
        for me in [0, 1] {
            prop_assert_eq!(pair.region.peer(me).generation, 1);
        }
    }
}

/// Each word of a pair that a third peer may spoil, one at a time.
#[test]
fn one_word_keeps_a_pair_apart_for_the_shortest_wait() {
    for ring in [TO_PEER, FROM_PEER] {
        for (word, value) in [
            (ring::HEAD, 1000),
            (ring::TAIL, 1000),
            (ring::ACK, 7),
            (ring::ACK + 4, 7),
            (ring::BEGUN, 7),
            (ring::BEGUN + 4, 7),
        ] {
            let (shared, region) = region(small());
            let (a, b) = linked(&region);
            let mut pair = Pair {
                region,
                generations: [1, 1],
                ends: [a, b],
                now: NOW,
            };
            shared.view().store32(ring + word, value, Relaxed);
            let mut lost = [false; 2];
            for seed in 0..3 {
                pair.look();
                pair.exchange(0, seed);
                pair.exchange(1, seed);
                for (lost, end) in lost.iter_mut().zip(&pair.ends) {
                    *lost |= !end.is_up();
                }
            }
            assert_eq!(lost[0], lost[1], "{ring} {word}: both are told");
            // Its owner states a name again, and may do so before the other end looks.
            let owned = word != ring::HEAD && word != ring::TAIL;
            assert!(lost[0] || owned, "{ring} {word}: it is found");
            let until = pair.now + RETRY_MIN + 4 * SCAN;
            while pair.now < until {
                pair.look();
            }
            for from in [0, 1] {
                assert!(pair.exchange(from, 9), "{ring} {word}");
            }
        }
    }
}

/// A peer that breaks the rules again and again is looked at less and less, down to once in the longest wait.
#[test]
fn a_peer_that_never_stops_costs_less_and_less() {
    let (shared, region) = region(small());
    let (a, b) = linked(&region);
    let mut pair = Pair {
        region,
        generations: [1, 1],
        ends: [a, b],
        now: NOW,
    };
    let mut losses = 0;
    let hour = Duration::from_secs(3600);
    while pair.now < hour {
        if pair.ends[0].is_up() {
            shared.view().store32(FROM_PEER + ring::HEAD, 1000, Relaxed);
            pair.take(0);
            losses += u32::from(!pair.ends[0].is_up());
        }
        pair.look();
    }
    // 1, 2, 4, … 32 s, and then each minute.
    assert!((50..=70).contains(&losses), "{losses} in an hour");
    // An hour of peace, and it is as it was in the beginning.
    while pair.now < 2 * hour {
        pair.look();
    }
    shared.view().store32(FROM_PEER + ring::HEAD, 1000, Relaxed);
    pair.take(0);
    let until = pair.now + RETRY_MIN + 4 * SCAN;
    while pair.now < until {
        pair.look();
    }
    assert!(pair.ends[0].is_up() && pair.ends[1].is_up());
}
