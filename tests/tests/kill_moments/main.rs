//! Daemon, source and target are killed, alone and in pairs, at moments spread over a whole morph and over a whole
//! recovery; then the daemon is started, killed and started again.
//!
//! Whatever the moment: no acknowledged write is lost other than by the death of the kernel that held it, no kernel is
//! recovered that was not killed, and the published port answers.
//!
//! `KMORPH_KILL_MOMENTS` says how many moments are tried (default: 100), `make test-kills` tries 1,000.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod trial;
mod writer;

use std::sync::atomic::{AtomicUsize, Ordering};

use trial::{Blow, Course, Trial, Victim};

/// Moments tried in CI.
const MOMENTS: usize = 100;
/// Hosts that are tried on at a time: most of a trial is waiting.
const HOSTS: usize = 6;
/// Trials on one host before a fresh one takes its place.
const TRIALS_OF_A_HOST: usize = 8;

/// Who is killed, by turns. The daemon's death is the one that leaves most behind.
const VICTIMS: [&[Victim]; 7] = [
    &[Victim::Daemon],
    &[Victim::Daemon, Victim::Source],
    &[Victim::Daemon, Victim::Target],
    &[Victim::Daemon],
    &[Victim::Source],
    &[Victim::Target],
    &[Victim::Source, Victim::Target],
];

fn moments() -> usize {
    let asked = std::env::var("KMORPH_KILL_MOMENTS").ok();
    asked.map_or(MOMENTS, |n| {
        n.parse().expect("KMORPH_KILL_MOMENTS is a number")
    })
}

/// The `number`-th of `count` blows. Four of five fall into a morph, the fifth into a recovery. Moments are spread over
/// 1.25 times the length of what they fall into, by the golden ratio, so that any few of them are spread too.
fn blow(number: usize) -> Blow {
    const GOLDEN: f64 = 0.618_033_988_749_895;
    let part = (number as f64 * GOLDEN).fract() * 1.25;
    if number % 5 == 4 {
        return Blow {
            course: Course::Recovery,
            victims: &[Victim::Daemon],
            part,
        };
    }
    Blow {
        course: Course::Morph,
        victims: VICTIMS[number % VICTIMS.len()],
        part,
    }
}

#[test]
fn whoever_is_killed_whenever_nothing_acknowledged_is_lost() {
    let (count, next) = (moments(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..HOSTS.min(count) {
            scope.spawn(|| {
                let mut trial = None;
                let mut done = 0;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    if done % TRIALS_OF_A_HOST == 0 {
                        trial = Some(Trial::prepare());
                    }
                    done += 1;
                    trial
                        .as_mut()
                        .expect("it was just made")
                        .run(number, blow(number));
                }
            });
        }
    });
}

/// The steps of a morph that commits, by the names of its transition table.
const STEPS: [&str; 16] = [
    "Prepare(source)",
    "Prepare(target)",
    "Negotiate(source)",
    "Chosen",
    "Round",
    "Validate",
    "Committable",
    "Freeze",
    "Round(last)",
    "Activate",
    "WriteCommitRecord",
    "Serve",
    "Retire",
    "Fence(source)",
    "Phase",
    "Finished(Committed)",
];

#[test]
fn a_daemon_that_dies_before_any_step_of_a_morph_is_followed_by_one_that_loses_nothing() {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..HOSTS / 2 {
            scope.spawn(|| {
                let mut trial = Trial::prepare();
                while let Some(step) = STEPS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    trial.run_at_step(step);
                }
            });
        }
    });
}
