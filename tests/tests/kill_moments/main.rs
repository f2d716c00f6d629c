//! Kills daemon, source and target, alone and in pairs, at moments spread over a whole morph and over a whole recovery;
//! then starts, kills and restarts the daemon.
//!
//! At every moment: an acknowledged write is only lost by the death of the kernel that held it, no kernel is recovered
//! that was not killed, and the published port answers.
//!
//! `KMORPH_KILL_MOMENTS` sets the number of moments (default: 100); `make test-kills` tries 1,000.

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

/// Number of moments in CI.
const MOMENTS: usize = 100;
/// Number of concurrent hosts: most of a trial is waiting.
const HOSTS: usize = 6;
/// Number of trials on one host before a fresh host replaces it.
const TRIALS_OF_A_HOST: usize = 8;

/// The victims, in turns. The daemon's death leaves the most work behind.
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

/// Returns blow `number`. Four of five hit a morph, the fifth hits a recovery. The golden ratio spreads the moments
/// over 1.25 times the length of the morph or recovery, so that any few consecutive moments are spread as well.
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

/// The steps of a morph that commits, named as in its transition table.
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
