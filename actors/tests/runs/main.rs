//! Runs of the real actors in one process, with a simulated machine, a clock that the test moves, and a seed for
//! everything else. The same seed gives the same run, line by line.
//!
//! To run a seed that breaks a rule again, with its log:
//! `KMORPH_RUN_SEED=<seed> cargo test -p kmorph-actors --test runs one -- --nocapture`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod agent;
mod backend;
mod commands;
mod coverage;
mod daemon;
mod dice;
mod machine;
mod ports;
mod prompts;
mod rules;
mod run;
mod scripts;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use coverage::Coverage;
use tempfile::TempDir;

/// Default number of seeds (`KMORPH_RUN_SEEDS`). So many seeds must reach everything that `coverage` counts.
const SEEDS: u64 = 10_000;

fn run_in(dir: &Path, seed: u64, logs: bool) -> run::Outcome {
    let dir = dir.join(seed.to_string());
    std::fs::create_dir(&dir).unwrap();
    let outcome = run::run(seed, &dir, logs);
    std::fs::remove_dir_all(&dir).unwrap();
    outcome
}

/// Creates a directory, in memory if possible: a run writes its journal a thousand times.
fn directory() -> TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory.or_else(|_| tempfile::tempdir()).unwrap()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Returns the message of a panic.
fn said(payload: &dyn std::any::Any) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or_default()
}

#[test]
fn whatever_happens_nothing_acknowledged_is_lost_and_everything_comes_to_rest() {
    let first = number("KMORPH_RUN_FIRST").unwrap_or(0);
    let seeds = number("KMORPH_RUN_SEEDS").unwrap_or(SEEDS);
    let dir = directory();
    let next = AtomicU64::new(first);
    let (failed, coverage) = (Mutex::new(Vec::new()), Mutex::new(Coverage::default()));
    be_quiet_about_panics_that_were_asked_for();
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds {
                return;
            }
            let outcome = run_in(dir.path(), seed, false);
            coverage.lock().unwrap().add(outcome.coverage);
            if !outcome.broken.is_empty() {
                failed.lock().unwrap().push((seed, outcome.broken));
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    #[expect(
        clippy::disallowed_methods,
        reason = "each run has one of these threads to itself"
    )]
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let coverage = coverage.into_inner().unwrap();
    println!("{coverage}");
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "{} of {seeds}: {failed:#?}",
        failed.len()
    );
    let missing = coverage.missing();
    assert!(
        seeds < SEEDS || missing.is_empty(),
        "in {seeds} runs there was none with:\n{}",
        missing.join("\n")
    );
}

/// Silences only the panics that runs ask for.
fn be_quiet_about_panics_that_were_asked_for() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = said(panic.payload());
        if !text.starts_with("asked to by the run") {
            tell(panic);
        }
    }));
}

/// Seeds that once showed a fault, with the fault.
const FOUND: [(u64, &str); 4] = [
    (
        178,
        "the fence of a generation that no instance owned was tried once",
    ),
    (183, "the same"),
    (
        7581,
        "the target of a morph was left when the actor of its instance panicked",
    ),
    (9118, "the same"),
];

#[test]
fn what_was_found_stays_mended() {
    let dir = directory();
    for (seed, fault) in FOUND {
        let broken = run_in(dir.path(), seed, false).broken;
        assert!(broken.is_empty(), "seed {seed} ({fault}): {broken:#?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let dir = directory();
    for seed in 0..10 {
        let first = run_in(dir.path(), seed, true).lines;
        let second = run_in(dir.path(), seed, true).lines;
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
    let outcome = run_in(dir.path(), seed, true);
    for line in &outcome.lines {
        println!("{line}");
    }
    assert!(outcome.broken.is_empty(), "{:#?}", outcome.broken);
}
