//! Memory ordering, with loom: every order of two threads' reads and writes that the memory model allows.
//! Packets' bytes are cells that loom watches: touching one that the other end may be touching fails.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kmorph_kerf_ring::layout::{peer, ring};
use kmorph_kerf_ring::{
    Class, Geometry, Link, LinkEvent, Memory, PeerState, RETRY_MAX, RETRY_MIN, Region,
};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, fence};

/// For links that are not lost in between.
const NOW: Duration = Duration::ZERO;
const RINGS: u64 = 8192;
const STRIDE: u64 = 77824;
const SLOTS: u64 = 32;

/// Memory in which only the words of some rings exist, and the first byte of each slot.
struct Model {
    words: BTreeMap<u64, AtomicU32>,
    wide: BTreeMap<u64, AtomicU64>,
    bytes: BTreeMap<u64, UnsafeCell<u8>>,
}

// SAFETY: loom checks every access to the cells itself; that is what this is for.
unsafe impl Sync for Model {}
// SAFETY: likewise.
unsafe impl Send for Model {}

impl Model {
    /// With the words of the rings `used`, as pairs of peers.
    fn new(used: &[(u64, u64)]) -> Self {
        let mut model = Self {
            words: BTreeMap::new(),
            wide: BTreeMap::new(),
            bytes: BTreeMap::new(),
        };
        for entry in [peer::OFFSET, peer::OFFSET + peer::STRIDE] {
            model.wide.insert(entry + peer::WORD, AtomicU64::new(0));
        }
        for (from, to) in used {
            let at = RINGS + (from * 2 + to) * STRIDE;
            for word in [ring::HEAD, ring::WANT, ring::TAIL, ring::FREED, ring::WAKE] {
                model.words.insert(at + word, AtomicU32::new(0));
            }
            for word in [ring::ACK, ring::BEGUN] {
                model.wide.insert(at + word, AtomicU64::new(0));
            }
            for slot in 0..SLOTS {
                let descriptor = at + ring::DESCRIPTORS + slot * 8;
                model.wide.insert(descriptor, AtomicU64::new(0));
                let cell = at + ring::DESCRIPTORS + 32 * 8 + slot * 256;
                model.bytes.insert(cell, UnsafeCell::new(0));
            }
        }
        model
    }
}

/// One thread's hold of it.
#[derive(Clone)]
struct Handle(Arc<Model>);

impl Memory for Handle {
    fn size(&self) -> u64 {
        u64::MAX
    }
    fn load32(&self, at: u64, order: Ordering) -> u32 {
        self.0.words.get(&at).map_or(0, |word| word.load(order))
    }
    fn store32(&self, at: u64, value: u32, order: Ordering) {
        if let Some(word) = self.0.words.get(&at) {
            word.store(value, order);
        }
    }
    fn load64(&self, at: u64, order: Ordering) -> u64 {
        self.0.wide.get(&at).map_or(0, |word| word.load(order))
    }
    fn store64(&self, at: u64, value: u64, order: Ordering) {
        if let Some(word) = self.0.wide.get(&at) {
            word.store(value, order);
        }
    }
    fn replace64(&self, at: u64, old: u64, new: u64) -> bool {
        let relaxed = Ordering::Relaxed;
        self.0.wide[&at]
            .compare_exchange(old, new, Ordering::AcqRel, relaxed)
            .is_ok()
    }
    fn read(&self, at: u64, to: &mut [u8]) {
        if to.is_empty() {
            return;
        }
        assert_eq!(to.len(), 1, "packets of one byte");
        // SAFETY: loom fails the test when the other thread may write it now.
        to[0] = self.0.bytes[&at].with(|byte| unsafe { *byte });
    }
    fn write(&self, at: u64, from: &[u8]) {
        assert_eq!(from.len(), 1, "packets of one byte");
        // SAFETY: likewise.
        self.0.bytes[&at].with_mut(|byte| unsafe { *byte = from[0] });
    }
    fn barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

fn model(used: &[(u64, u64)]) -> Handle {
    Handle(Arc::new(Model::new(used)))
}

fn open(memory: &Handle) -> Region<Handle> {
    let geometry = Geometry::new(2, 32, 64 * 1024).unwrap();
    Region::format(memory.clone(), geometry).unwrap()
}

fn linked(region: &Region<Handle>) -> (Link, Link) {
    let (a, b) = (region.attach(0, 1), region.attach(1, 1));
    let (mut a, mut b) = (Link::new(0, 1, a), Link::new(1, 0, b));
    a.poll(region, NOW);
    assert_eq!(b.poll(region, NOW), LinkEvent::CameUp);
    assert_eq!(a.poll(region, NOW), LinkEvent::CameUp);
    (a, b)
}

#[test]
fn a_published_packet_is_whole() {
    loom::model(|| {
        let memory = model(&[(0, 1), (1, 0)]);
        let (mut a, mut b) = linked(&open(&memory));
        let other = memory.clone();
        let sender = loom::thread::spawn(move || {
            let region = open(&other);
            a.put(&region, &[&[1]], Class::Data).unwrap();
            a.put(&region, &[&[2]], Class::Data).unwrap();
        });
        let region = open(&memory);
        let mut got = Vec::new();
        for _ in 0..2 {
            b.take(&region, &mut got).unwrap();
        }
        sender.join().unwrap();
        while b.take(&region, &mut got).unwrap().is_some() {}
        assert_eq!(got, [1, 2]);
    });
}

/// The ring is full: a slot is written again only when the receiver is done with it.
#[test]
fn a_slot_is_used_again_after_it_was_read() {
    loom::model(|| {
        let memory = model(&[(0, 1), (1, 0)]);
        let region = open(&memory);
        let (mut a, mut b) = linked(&region);
        while a.put(&region, &[&[1]], Class::Control).is_ok() {}
        let other = memory.clone();
        let receiver = loom::thread::spawn(move || {
            let mut got = Vec::new();
            b.take(&open(&other), &mut got).unwrap();
            assert_eq!(got, [1]);
        });
        let _room = a.put(&region, &[&[2]], Class::Control);
        receiver.join().unwrap();
    });
}

/// The receiver sleeps only when nothing is there, and whatever comes then rings.
#[test]
fn no_packet_comes_without_being_seen_or_rung_for() {
    loom::model(|| {
        let memory = model(&[(0, 1), (1, 0)]);
        let (mut a, mut b) = linked(&open(&memory));
        let other = memory.clone();
        let sender = loom::thread::spawn(move || {
            let region = open(&other);
            a.put(&region, &[&[1]], Class::Data).unwrap();
            a.rings().unwrap().0.must_ring(region.memory())
        });
        let region = open(&memory);
        let mut got = Vec::new();
        b.rings().unwrap().1.sleep(region.memory());
        let seen = b.take(&region, &mut got).unwrap().is_some();
        let rung = sender.join().unwrap();
        assert!(seen || rung, "it sleeps and nobody woke it");
    });
}

/// A sender that found no room waits, and whatever is freed then rings.
#[test]
fn no_room_comes_without_being_seen_or_rung_for() {
    loom::model(|| {
        let memory = model(&[(0, 1), (1, 0)]);
        let (mut a, mut b) = linked(&open(&memory));
        let region = open(&memory);
        a.put(&region, &[&[1]], Class::Data).unwrap();
        let other = memory.clone();
        let receiver = loom::thread::spawn(move || {
            let region = open(&other);
            let mut got = Vec::new();
            b.take(&region, &mut got).unwrap();
            b.rings().unwrap().1.must_ring(region.memory())
        });
        // As if the ring had one slot: there is room once the receiver has taken the packet.
        let (tx, _) = a.rings().unwrap();
        tx.want_room(region.memory());
        let at = RINGS + STRIDE + ring::TAIL;
        let room = memory.load32(at, Ordering::Acquire) == 1;
        let rung = receiver.join().unwrap();
        assert!(room || rung, "it waits and nobody told it");
    });
}

/// A peer begins anew while the other end polls and takes: never a packet of the old rings, never blame.
#[test]
fn a_peer_that_begins_anew_is_never_taken_for_corrupt() {
    loom::model(|| {
        let memory = model(&[(0, 1), (1, 0)]);
        let region = open(&memory);
        let (mut a, mut b) = linked(&region);
        b.put(&region, &[&[1]], Class::Data).unwrap();
        let mut got = Vec::new();
        a.take(&region, &mut got).unwrap();
        let other = memory.clone();
        let peer = loom::thread::spawn(move || {
            let region = open(&other);
            region.attach(1, 1)
        });
        if a.take(&region, &mut got).is_err() {
            assert!(!a.corrupt(&region, NOW), "it has only begun anew");
        }
        let generation = peer.join().unwrap();
        let mut b = Link::new(1, 0, generation);
        a.poll(&region, NOW);
        a.poll(&region, NOW);
        b.poll(&region, NOW);
        a.poll(&region, NOW);
        assert!(a.is_up() && b.is_up());
        assert_eq!(a.take(&region, &mut got), Ok(None));
    });
}

/// Both ends handshake at once: whoever sees the link up uses rings that both have reset.
#[test]
fn a_link_is_up_only_when_both_have_reset() {
    loom::model(|| {
        let memory = model(&[(0, 1), (1, 0)]);
        let region = open(&memory);
        let (a, b) = (region.attach(0, 1), region.attach(1, 1));
        // What an earlier incarnation would have left there.
        for (from, to) in [(0, 1), (1, 0)] {
            let at = RINGS + (from * 2 + to) * STRIDE;
            memory.store32(at + ring::HEAD, 7, Ordering::Relaxed);
            memory.store32(at + ring::TAIL, 7, Ordering::Relaxed);
        }
        let other = memory.clone();
        let peer = loom::thread::spawn(move || {
            let region = open(&other);
            let mut link = Link::new(1, 0, b);
            link.poll(&region, NOW);
            let up = link.poll(&region, NOW) == LinkEvent::CameUp || link.is_up();
            if up {
                link.put(&region, &[&[9]], Class::Data).unwrap();
            }
            up
        });
        let mut link = Link::new(0, 1, a);
        link.poll(&region, NOW);
        link.poll(&region, NOW);
        let mut got = Vec::new();
        if link.is_up() {
            link.take(&region, &mut got).unwrap();
        }
        let sent = peer.join().unwrap();
        link.poll(&region, NOW);
        if link.is_up() {
            link.take(&region, &mut got).unwrap();
        }
        assert_eq!(got.len(), usize::from(sent && link.is_up()));
        assert_eq!(region.peer(0).state, PeerState::Ready);
    });
}

/// One end loses the link and begins anew, with its generation, while the other polls and takes: never a packet of the old
/// rings, never blame, and the link comes up.
#[test]
fn an_end_that_begins_anew_is_never_taken_for_corrupt() {
    loom::model(|| {
        let memory = model(&[(0, 1), (1, 0)]);
        let region = open(&memory);
        let (mut a, mut b) = linked(&region);
        b.put(&region, &[&[1]], Class::Data).unwrap();
        let mut got = Vec::new();
        a.take(&region, &mut got).unwrap();
        let other = memory.clone();
        let peer = loom::thread::spawn(move || {
            let region = open(&other);
            b.corrupt(&region, NOW);
            b.poll(&region, RETRY_MIN);
            b
        });
        let mut blamed = false;
        if a.take(&region, &mut got).is_err() {
            blamed = a.corrupt(&region, NOW);
        }
        a.poll(&region, NOW);
        let mut b = peer.join().unwrap();
        assert!(!blamed, "it has only begun anew");
        // The first of these looks may be the one that finds the link lost.
        for later in 1..4 {
            a.poll(&region, RETRY_MAX * later);
            b.poll(&region, RETRY_MAX * later);
        }
        assert!(a.is_up() && b.is_up());
        assert_eq!(a.take(&region, &mut got), Ok(None));
        a.put(&region, &[&[2]], Class::Data).unwrap();
        assert_eq!(b.take(&region, &mut got), Ok(Some(1)));
        assert_eq!(got, [1, 2]);
    });
}
