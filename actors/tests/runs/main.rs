//! Runs of the real actors in one process: a simulated machine below them, a clock that the test moves, and everything
//! else from a seed. The same seed gives the same run, line by line.
//!
//! A seed that breaks a rule is run again, with its log, by
//! `KMORPH_RUN_SEED=<seed> cargo test -p kmorph-actors --test runs one -- --nocapture`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod agent;
mod daemon;
mod dice;
mod machine;
mod run;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;

/// Seeds of the short form.
const SEEDS: u64 = 200;

fn run_in(dir: &Path, seed: u64) -> run::Outcome {
    let dir = dir.join(seed.to_string());
    std::fs::create_dir(&dir).unwrap();
    let outcome = run::run(seed, &dir);
    std::fs::remove_dir_all(&dir).unwrap();
    outcome
}

/// In memory where that can be had: a run writes its journal a thousand times.
fn directory() -> TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory.or_else(|_| tempfile::tempdir()).unwrap()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn whatever_happens_nothing_acknowledged_is_lost_and_everything_comes_to_rest() {
    let first = number("KMORPH_RUN_FIRST").unwrap_or(0);
    let seeds = number("KMORPH_RUN_SEEDS").unwrap_or(SEEDS);
    let dir = directory();
    let next = AtomicU64::new(first);
    let failed = Mutex::new(Vec::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds {
                return;
            }
            let outcome = run_in(dir.path(), seed);
            if !outcome.broken.is_empty() {
                failed.lock().unwrap().push((seed, outcome.broken));
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "{} of {seeds}: {failed:#?}",
        failed.len()
    );
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let dir = directory();
    for seed in 0..10 {
        let first = run_in(dir.path(), seed).lines;
        let second = run_in(dir.path(), seed).lines;
        let differ = first
            .iter()
            .zip(&second)
            .position(|(one, other)| one != other);
        if let Some(at) = differ {
            panic!("seed {seed}, line {at}:\n{}\n{}", first[at], second[at]);
        }
        assert_eq!(first.len(), second.len(), "seed {seed}");
    }
}

#[test]
fn one() {
    let Some(seed) = number("KMORPH_RUN_SEED") else {
        return;
    };
    let dir = directory();
    let outcome = run_in(dir.path(), seed);
    for line in &outcome.lines {
        println!("{line}");
    }
    assert!(outcome.broken.is_empty(), "{:#?}", outcome.broken);
}
