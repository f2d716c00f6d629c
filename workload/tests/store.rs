//! The store against a plain map, through handovers of both kinds in the middle.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::time::Duration;

use kmorph_workload::arena::ArenaError;
use kmorph_workload::handover::message::StateDigest;
use kmorph_workload::store::{Expiry, Store, TimeToLive};
use proptest::prelude::*;

const CAPACITY: u64 = 4 << 20;
const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
enum Op {
    Set(u16, Vec<u8>, Option<u16>),
    SetKeep(u16, Vec<u8>),
    Append(u16, Vec<u8>),
    Remove(u16),
    Expire(u16, u16),
    Persist(u16),
    Later(u16),
    Sweep,
    Flush,
    MapElsewhere,
    CopyInRounds,
    FreezeAndResume,
}

fn op() -> impl Strategy<Value = Op> {
    let key = || 0u16..200;
    let value = || {
        prop_oneof![
            8 => proptest::collection::vec(any::<u8>(), 0..200),
            1 => proptest::collection::vec(any::<u8>(), 0..8000),
        ]
    };
    prop_oneof![
        20 => (key(), value(), proptest::option::of(1u16..500))
            .prop_map(|(k, v, t)| Op::Set(k, v, t)),
        4 => (key(), value()).prop_map(|(k, v)| Op::SetKeep(k, v)),
        8 => (key(), value()).prop_map(|(k, v)| Op::Append(k, v)),
        8 => key().prop_map(Op::Remove),
        4 => (key(), 0u16..500).prop_map(|(k, t)| Op::Expire(k, t)),
        2 => key().prop_map(Op::Persist),
        4 => (1u16..300).prop_map(Op::Later),
        1 => Just(Op::Sweep),
        1 => Just(Op::Flush),
        2 => Just(Op::MapElsewhere),
        2 => Just(Op::CopyInRounds),
        1 => Just(Op::FreezeAndResume),
    ]
}

#[derive(Default)]
struct Model {
    now: u64,
    keys: HashMap<Vec<u8>, (Vec<u8>, Option<u64>)>,
}

impl Model {
    fn live(&mut self, key: &[u8]) -> Option<&mut (Vec<u8>, Option<u64>)> {
        let expired = |(_, at): &(Vec<u8>, Option<u64>)| at.is_some_and(|at| at <= self.now);
        if self.keys.get(key).is_some_and(expired) {
            self.keys.remove(key);
        }
        self.keys.get_mut(key)
    }
}

/// Copies what `old` holds, then what it wrote meanwhile, and hands over.
fn copy_in_rounds(mut old: Store, mut meanwhile: impl FnMut(&mut Store)) -> Store {
    let mut new = Store::awaiting(old.capacity()).unwrap();
    old.track_dirty().unwrap();
    let mut first = true;
    while let Some((offset, bytes)) = old.read_dirty(64 * 1024).unwrap() {
        new.apply(offset, bytes).unwrap();
        if std::mem::take(&mut first) {
            meanwhile(&mut old);
        }
    }
    let frozen = old.freeze().unwrap();
    while let Some((offset, bytes)) = old.read_dirty(64 * 1024).unwrap() {
        new.apply(offset, bytes).unwrap();
    }
    drop(old);
    take_over(&mut new, frozen);
    new
}

fn take_over(new: &mut Store, frozen: StateDigest) {
    new.check_header().unwrap();
    new.check_settled().unwrap();
    assert!(new.verify_content(LONG).unwrap().is_complete());
    assert_eq!(new.state().unwrap(), frozen);
    new.claim().unwrap();
}

fn name(key: u16) -> Vec<u8> {
    format!("key:{key}").into_bytes()
}

fn change(store: &mut Store, model: &mut Model, op: Op) {
    let now = model.now;
    match op {
        Op::Set(key, value, ttl) => {
            let at = ttl.map(|ttl| now + u64::from(ttl));
            let expiry = at.map_or(Expiry::Never, Expiry::At);
            store.set(&name(key), &value, expiry, now).unwrap();
            model.keys.insert(name(key), (value, at));
        }
        Op::SetKeep(key, value) => {
            store.set(&name(key), &value, Expiry::Keep, now).unwrap();
            let at = model.live(&name(key)).and_then(|(_, at)| *at);
            model.keys.insert(name(key), (value, at));
        }
        Op::Append(key, tail) => {
            let len = store.append(&name(key), &tail, now).unwrap();
            model.live(&name(key));
            let entry = model.keys.entry(name(key)).or_default();
            entry.0.extend(tail);
            assert_eq!(len, entry.0.len() as u64);
        }
        Op::Remove(key) => {
            let had = model.live(&name(key)).is_some();
            assert_eq!(store.remove(&name(key), now).unwrap(), had);
            model.keys.remove(&name(key));
        }
        Op::Expire(key, ttl) => {
            let at = now + u64::from(ttl);
            let had = store.set_expiry(&name(key), Expiry::At(at), now).unwrap();
            let entry = model.live(&name(key));
            assert_eq!(had, entry.is_some());
            if let Some(entry) = entry {
                entry.1 = Some(at);
            }
        }
        Op::Persist(key) => {
            let had = store.set_expiry(&name(key), Expiry::Never, now).unwrap();
            let taken = model.live(&name(key)).and_then(|entry| entry.1.take());
            assert_eq!(had, taken.is_some());
        }
        Op::Sweep => {
            store.expire_some(u64::MAX, now).unwrap();
            model.keys.retain(|_, (_, at)| at.is_none_or(|at| at > now));
            assert_eq!(store.keys().unwrap(), model.keys.len() as u64);
        }
        Op::Flush => {
            store.flush().unwrap();
            model.keys.clear();
        }
        Op::Later(millis) => model.now += u64::from(millis),
        Op::MapElsewhere | Op::CopyInRounds | Op::FreezeAndResume => unreachable!(),
    }
}

fn run(ops: Vec<Op>) {
    let mut store = Store::create(CAPACITY).unwrap();
    let mut model = Model {
        now: 1_000_000,
        ..Model::default()
    };
    for op in ops {
        let now = model.now;
        match op {
            Op::MapElsewhere => {
                let fd = store.fd().try_clone_to_owned().unwrap();
                let mut new = Store::open(fd, store.capacity()).unwrap();
                let frozen = store.freeze().unwrap();
                take_over(&mut new, frozen);
                assert!(matches!(store.resume(), Err(ArenaError::NotOwner(_))));
                assert!(matches!(store.flush(), Err(ArenaError::NotOwner(_))));
                store = new;
            }
            Op::CopyInRounds => {
                store = copy_in_rounds(store, |old| {
                    old.set(b"key:7", b"meanwhile", Expiry::Never, now).unwrap();
                    old.remove(b"key:8", now).unwrap();
                });
                model.keys.insert(name(7), (b"meanwhile".to_vec(), None));
                model.keys.remove(&name(8));
            }
            Op::FreezeAndResume => {
                store.freeze().unwrap();
                let refused = store.set(b"x", b"y", Expiry::Never, now);
                assert!(matches!(refused, Err(ArenaError::NotOwner(_))));
                store.resume().unwrap();
            }
            other => change(&mut store, &mut model, other),
        }
    }
    compare(&store, &mut model);
}

fn compare(store: &Store, model: &mut Model) {
    let now = model.now;
    assert!(store.verify_content(LONG).unwrap().is_complete());
    for key in (0u16..200).map(name) {
        let expected = model.live(&key).cloned();
        let value = store.get(&key, now).unwrap().map(<[u8]>::to_vec);
        assert_eq!(value, expected.as_ref().map(|(value, _)| value.clone()));
        let ttl = match expected {
            None => TimeToLive::NoKey,
            Some((_, None)) => TimeToLive::Never,
            Some((_, Some(at))) => TimeToLive::Millis(at - now),
        };
        assert_eq!(store.time_to_live(&key, now).unwrap(), ttl);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn the_store_is_a_map_whoever_owns_it(ops in proptest::collection::vec(op(), 1..300)) {
        run(ops);
    }
}

#[test]
fn a_table_that_grows_during_a_scan_loses_no_key() {
    let mut store = Store::create(64 << 20).unwrap();
    let set = |store: &mut Store, n: u32| {
        let key = format!("k{n}");
        store.set(key.as_bytes(), b"v", Expiry::Never, 0).unwrap();
    };
    (0..6000).for_each(|n| set(&mut store, n));
    let mut seen = std::collections::HashSet::new();
    let (mut cursor, mut more) = (0, 6000);
    loop {
        let visit = |key: &[u8]| {
            seen.insert(key.to_vec());
        };
        cursor = store.scan(cursor, 200, 0, visit).unwrap();
        if cursor == 0 {
            break;
        }
        if more < 100_000 {
            (more..more + 2000).for_each(|n| set(&mut store, n));
            more += 2000;
        }
    }
    for n in 0..6000 {
        assert!(seen.contains(format!("k{n}").as_bytes()), "k{n}");
    }
    assert_eq!(store.keys().unwrap(), u64::from(more));
    assert!(store.verify_content(LONG).unwrap().is_complete());
}

#[test]
fn a_full_arena_refuses_and_keeps_what_it_has() {
    let mut store = Store::create(1 << 20).unwrap();
    let mut n = 0u32;
    let full = loop {
        match store.set(format!("k{n}").as_bytes(), &[7; 1000], Expiry::Never, 0) {
            Ok(()) => n += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, ArenaError::Full));
    assert!(n > 800, "{n} keys");
    let error = store.append(b"k0", &[1; 500_000], 0).unwrap_err();
    assert!(matches!(error, ArenaError::Full));
    assert_eq!(store.get(b"k0", 0).unwrap(), Some(&[7; 1000][..]));
    assert!(store.verify_content(LONG).unwrap().is_complete());
    store.flush().unwrap();
    store.set(b"k", &[7; 100_000], Expiry::Never, 0).unwrap();
}

#[test]
fn a_flipped_bit_anywhere_in_use_is_found_or_harmless_and_never_panics() {
    let mut old = Store::create(1 << 20).unwrap();
    for n in 0..300u32 {
        let key = format!("key:{n}");
        old.set(key.as_bytes(), &[1; 100], Expiry::Never, 0)
            .unwrap();
    }
    old.track_dirty().unwrap();
    let frozen = old.freeze().unwrap();
    let mut pages = Vec::new();
    while let Some((offset, bytes)) = old.read_dirty(4096).unwrap() {
        pages.push((offset, bytes.to_vec()));
    }
    let mut found = 0;
    for flip in 0..1500usize {
        let mut new = Store::awaiting(1 << 20).unwrap();
        for (at, (offset, bytes)) in pages.iter().enumerate() {
            let mut bytes = bytes.clone();
            if at == flip % pages.len() {
                let bit = flip.wrapping_mul(7919) % (bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            new.apply(*offset, &bytes).unwrap();
        }
        let checked = new
            .check_header()
            .and_then(|()| new.check_settled())
            .and_then(|()| new.verify_content(LONG));
        found += u32::from(checked.is_err());
        // What the walk does not see lies in free memory or in the allocator's own words.
        if checked.is_ok() && new.state().unwrap() == frozen && new.claim().is_ok() {
            for n in 0..300u32 {
                let key = format!("key:{n}");
                assert_eq!(new.get(key.as_bytes(), 0).unwrap(), Some(&[1; 100][..]));
            }
            for n in 0..300u32 {
                let _ = new.remove(format!("key:{n}").as_bytes(), 0);
            }
            let _ = new.set(b"another", &[2; 5000], Expiry::Never, 0);
        }
    }
    assert!(found > 500, "{found} of 1500 flips found");
}
