//! The engines together, as in a daemon: a morph between two kernels, a failure detector for each, and a recovery of
//! whatever fails, over a network with loss, delay and duplication, and with death of each part at any moment. While
//! faults occur, the runs check safety; then all faults end, and the world must settle: one kernel serves, the right
//! one.
//!
//! Every run follows from its seed: `SIM_SEED=<seed>` repeats one run, `SIM_RUNS=<count>` sets the number of runs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "simulation/faults.rs"]
mod faults;
#[path = "simulation/kernels.rs"]
mod kernels;
#[path = "simulation/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use faults::{Faults, STEPS, Strike};
use kernels::{NEW, OLD};
use kmp_proto::morph::Outcome;
use world::World;

/// Default number of seeds.
const RUNS: u64 = 3000;

/// Runs one world; a failure prints how to repeat the run.
fn run(seed: u64, faults: Faults) -> World {
    let mut world = World::new(seed, faults);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    if let Err(panic) = ended {
        eprintln!("SIM_SEED={seed} fails, with {:?}", world.faults);
        resume_unwind(panic);
    }
    world
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn name(world: &World) -> &'static str {
    match world.outcome().unwrap() {
        Outcome::Committed => "committed",
        Outcome::CommittedButFailed(_) => "committed but failed",
        Outcome::RolledBack(_) => "rolled back",
        Outcome::SourceFailed { .. } => "source failed",
        Outcome::OperatorActionNeeded { .. } => "operator",
    }
}

#[test]
fn without_faults_the_new_kernel_serves() {
    let world = run(1, Faults::none());
    assert_eq!((name(&world), world.current()), ("committed", Some(NEW)));
    assert!(u64::try_from(world.steps()).unwrap() < STEPS);
}

#[test]
fn whatever_goes_wrong_one_kernel_serves_in_the_end_and_never_two() {
    if let Some(seed) = number("SIM_SEED") {
        run(seed, Faults::from_seed(seed));
        return;
    }
    let mut ends = BTreeMap::new();
    for seed in 0..number("SIM_RUNS").unwrap_or(RUNS) {
        let world = run(seed, Faults::from_seed(seed));
        *ends.entry(name(&world)).or_insert(0) += 1;
    }
    // The faults only test something if every end occurs.
    eprintln!("{ends:?}");
    assert_eq!(ends.len(), 4, "{ends:?}");
}

#[test]
fn the_daemon_may_die_at_every_step_and_once_more_at_every_later_one() {
    for first in 0..usize::try_from(STEPS).unwrap() {
        for second in first..=usize::try_from(STEPS).unwrap() {
            for seed in 0..4 {
                let strikes = [first, second].map(|step| (step, Strike::KillDaemon));
                let faults = Faults {
                    strikes: strikes.to_vec(),
                    ..Faults::none()
                };
                let world = run(seed, faults);
                // No kernel has died, so the workload's state has survived.
                let expected = match name(&world) {
                    "committed" => NEW,
                    "rolled back" => OLD,
                    other => panic!("{other} at {first}, {second}, seed {seed}"),
                };
                assert_eq!(world.current(), Some(expected));
            }
        }
    }
}

#[test]
fn each_kernel_may_die_at_every_step() {
    for strike in [Strike::KillSource, Strike::KillTarget, Strike::KillServing] {
        for step in 0..usize::try_from(STEPS).unwrap() {
            for seed in 0..4 {
                let faults = Faults {
                    strikes: vec![(step, strike)],
                    ..Faults::none()
                };
                let world = run(seed, faults);
                if strike == Strike::KillTarget {
                    assert_ne!(name(&world), "source failed", "at {step}, seed {seed}");
                }
            }
        }
    }
}
