//! Two ends that keep the rules.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::collections::VecDeque;

use kmorph_kerf_ring::layout::{INLINE_MAX, PACKET_MAX, SLOTS_RESERVED};
use kmorph_kerf_ring::{Class, LinkEvent, PeerState, PutError};
use proptest::prelude::*;
use support::{NOW, linked, pattern, region, small};

fn length() -> impl Strategy<Value = usize> {
    let inline = INLINE_MAX as usize;
    prop_oneof![
        1..=inline,
        Just(inline),
        Just(inline + 1),
        inline + 1..=PACKET_MAX as usize,
        Just(PACKET_MAX as usize),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Put(usize, Class),
    Take,
}

fn step() -> impl Strategy<Value = Step> {
    let class = prop_oneof![Just(Class::Data), Just(Class::Control)];
    prop_oneof![
        (length(), class).prop_map(|(len, class)| Step::Put(len, class)),
        Just(Step::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// A queue is the model. Both sizes keep their order among each other.
    #[test]
    fn packets_arrive_whole_and_in_order(steps in prop::collection::vec(step(), 1..400)) {
        let (_shared, region) = region(small());
        let (mut a, mut b) = linked(&region);
        let mut model = VecDeque::new();
        let mut got = Vec::new();
        for (seed, step) in (0u32..).zip(steps) {
            match step {
                Step::Put(len, class) => {
                    let sent = pattern(seed, len);
                    let (front, back) = sent.split_at(len / 3);
                    match a.put(&region, &[front, back], class) {
                        Ok(()) => model.push_back(sent),
                        Err(error) => prop_assert_eq!(error, PutError::Full),
                    }
                }
                Step::Take => {
                    got.clear();
                    let len = b.take(&region, &mut got).unwrap();
                    prop_assert_eq!(len.is_some(), !model.is_empty());
                    prop_assert_eq!(&got, &model.pop_front().unwrap_or_default());
                }
            }
        }
    }
}

#[test]
fn control_packets_fit_where_data_has_filled_the_slots() {
    let (_shared, region) = region(small());
    let (mut a, mut b) = linked(&region);
    let mut data = 0;
    while a.put(&region, &[b"data"], Class::Data).is_ok() {
        data += 1;
    }
    assert_eq!(data, small().slots() - SLOTS_RESERVED);
    for _ in 0..SLOTS_RESERVED {
        a.put(&region, &[b"reset"], Class::Control).unwrap();
    }
    let full = a.put(&region, &[b"reset"], Class::Control);
    assert_eq!(full, Err(PutError::Full));
    let mut got = Vec::new();
    b.take(&region, &mut got).unwrap().unwrap();
    a.put(&region, &[b"reset"], Class::Control).unwrap();
}

#[test]
fn control_packets_fit_where_data_has_filled_the_bytes() {
    let (_shared, region) = region(small());
    let (mut a, _b) = linked(&region);
    let bulk = vec![7; PACKET_MAX as usize];
    a.put(&region, &[&bulk], Class::Data).unwrap();
    a.put(&region, &[&bulk], Class::Data).unwrap();
    let full = a.put(&region, &[&bulk], Class::Data);
    assert_eq!(full, Err(PutError::Full));
    a.put(&region, &[b"reset"], Class::Control).unwrap();
}

#[test]
fn lengths_that_no_packet_has_are_the_callers_mistake() {
    let (_shared, region) = region(small());
    let (mut a, _b) = linked(&region);
    let long = vec![0; PACKET_MAX as usize + 1];
    for wrong in [&[][..], &long] {
        let refused = a.put(&region, &[wrong], Class::Data);
        assert_eq!(refused, Err(PutError::Length(wrong.len())));
    }
}

#[test]
fn a_sleeper_is_rung_once_for_each_sleep() {
    let (_shared, region) = region(small());
    let (mut a, mut b) = linked(&region);
    let memory = region.memory();
    let (tx, _) = a.rings().unwrap();
    let (_, rx) = b.rings().unwrap();
    assert!(!tx.must_ring(memory), "it is awake");
    for _ in 0..2 {
        rx.sleep(memory);
        tx.put(memory, &[b"x"], Class::Data).unwrap();
        assert!(tx.must_ring(memory));
        tx.put(memory, &[b"y"], Class::Data).unwrap();
        assert!(!tx.must_ring(memory), "it was rung already");
    }
    rx.awake(memory);
    assert!(!tx.must_ring(memory));

    assert!(!rx.must_ring(memory), "nothing waits for room");
    tx.want_room(memory);
    assert!(rx.must_ring(memory));
    assert!(!rx.must_ring(memory), "it was rung already");
    tx.has_room(memory);
    assert!(!rx.must_ring(memory));
}

#[test]
fn a_peer_that_comes_back_finds_clean_rings_and_the_other_is_told() {
    let (_shared, region) = region(small());
    let (mut a, mut b) = linked(&region);
    a.put(&region, &[b"lost"], Class::Data).unwrap();
    b.put(&region, &[b"lost too"], Class::Data).unwrap();
    // It vanishes without a word, and comes back.
    let again = region.attach(1, 1);
    let mut b = kmorph_kerf_ring::Link::new(1, 0, again);
    assert_eq!(a.poll(&region, NOW), LinkEvent::Lost);
    assert!(!a.is_up());
    assert_eq!(
        a.poll(&region, NOW),
        LinkEvent::Down,
        "accepted, not yet answered"
    );
    assert!(a.must_tell() && !a.must_tell());
    assert_eq!(b.poll(&region, NOW), LinkEvent::CameUp);
    assert_eq!(a.poll(&region, NOW), LinkEvent::CameUp);
    let mut got = Vec::new();
    assert_eq!(b.take(&region, &mut got).unwrap(), None);
    assert_eq!(a.take(&region, &mut got).unwrap(), None);
    a.put(&region, &[b"new"], Class::Data).unwrap();
    assert_eq!(b.take(&region, &mut got).unwrap(), Some(3));
    assert_eq!(got, b"new");
}

#[test]
fn one_that_leaves_or_is_buried_is_lost() {
    let (_shared, region) = region(small());
    let (mut a, _b) = linked(&region);
    region.detach(1);
    assert_eq!(region.peer(1).state, PeerState::Left);
    assert_eq!(a.poll(&region, NOW), LinkEvent::Lost);
    assert_eq!(a.poll(&region, NOW), LinkEvent::Down);

    let generation = region.attach(1, 1);
    let mut b = kmorph_kerf_ring::Link::new(1, 0, generation);
    a.poll(&region, NOW);
    b.poll(&region, NOW);
    assert_eq!(a.poll(&region, NOW), LinkEvent::CameUp);
    region.bury(1);
    assert_eq!(a.poll(&region, NOW), LinkEvent::Lost);
}

#[test]
fn a_peer_can_link_with_itself() {
    let (_shared, region) = region(small());
    let mut own = kmorph_kerf_ring::Link::new(1, 1, region.attach(1, 1));
    assert_eq!(own.poll(&region, NOW), LinkEvent::CameUp);
    own.put(&region, &[b"me"], Class::Data).unwrap();
    let mut got = Vec::new();
    assert_eq!(own.take(&region, &mut got).unwrap(), Some(2));
}
