//! A model check of commit, fence and adoption: the real engines of a morph, of a recovery and of an instance, between
//! a daemon that dies and is replaced, its journal, a network that loses, doubles and reorders, and kernels that die.
//! Every interleaving is explored up to a bound; docs/reliability.md says to which, and what is simplified.
//!
//! | file | contents |
//! |---|---|
//! | `arena`, `machines` | the real engines, each state of which has a number |
//! | `kernel` | a kernel with its agent |
//! | `world` | the state of the model, its journal and its network |
//! | `shell`, `restart` | what the daemon does around its engines |
//! | `steps`, `model` | the steps that are possible, and what they do |
//! | `rules`, `explore` | what must hold, and the search |
//! | `bound` | how far the search goes, and the deliberate faults |

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "model/arena.rs"]
mod arena;
#[path = "model/bound.rs"]
mod bound;
#[path = "model/explore.rs"]
mod explore;
#[path = "model/kernel.rs"]
mod kernel;
#[path = "model/machines/mod.rs"]
mod machines;
#[path = "model/model.rs"]
mod model;
#[path = "model/restart.rs"]
mod restart;
#[path = "model/rules.rs"]
mod rules;
#[path = "model/shell.rs"]
mod shell;
#[path = "model/steps.rs"]
mod steps;
#[path = "model/world.rs"]
mod world;

use std::collections::BTreeSet;

use arena::{Arena, Machine};
use bound::{Bound, Mutation};
use explore::explore;
use kmp_proto::transition::Transition;
use kmp_proto::{instance, morph, recovery};
use model::Model;

/// A number from the environment.
fn number(variable: &str) -> Option<u8> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Explores to a bound, prints how far that was, and fails on a counterexample.
fn check(bound: Bound) {
    let mut model = Model::new(bound);
    match explore(&mut model) {
        Ok(explored) => eprintln!("{bound:?}: {explored}"),
        Err(found) => panic!("{bound:?}: {}:\n{}", found.rule, found.path),
    }
    let rows = morph::TRANSITIONS.iter().copied().flatten();
    told("morph", &model.morphs, rows);
    told("recovery", &model.recoveries, recovery::TRANSITIONS.iter());
    let rows = instance::TRANSITIONS.iter().copied().flatten();
    told("instance", &model.instances, rows);
}

/// Prints how much of an engine's table was explored.
fn told<'a, M: Machine>(name: &str, arena: &Arena<M>, rows: impl Iterator<Item = &'a Transition>) {
    let pairs = rows
        .filter(|row| row.state != "–")
        .map(|row| (row.state, row.event));
    let pairs: BTreeSet<_> = pairs.collect();
    let tried: BTreeSet<_> = arena.tried().collect();
    let missing: BTreeSet<_> = pairs.difference(&tried).copied().collect();
    let (states, taken) = (arena.len(), pairs.len() - missing.len());
    eprintln!(
        "{name}: {states} states, {taken} of {} pairs of state and event in its table",
        pairs.len()
    );
    eprintln!("  not: {missing:?}");
}

/// The rule that the model finds broken with these mutations.
fn found(bound: Bound, mutations: &[Mutation]) -> Option<&'static str> {
    let found = explore(&mut Model::new(bound.with(mutations))).err()?;
    eprintln!("{mutations:?}: {}:\n{}", found.rule, found.path);
    Some(found.rule)
}

#[test]
fn two_faults_keep_the_rules() {
    check(Bound::new(2, 1, true));
}

#[test]
fn one_fault_in_two_morphs_keeps_the_rules() {
    check(Bound::new(1, 2, true));
}

/// `make model`.
#[test]
#[ignore = "takes minutes and gigabytes"]
fn as_far_as_asked_for() {
    let faults = number("KMP_MODEL_FAULTS").unwrap_or(3);
    let morphs = number("KMP_MODEL_MORPHS").unwrap_or(1);
    check(Bound::new(faults, morphs, true));
}

/// A model that finds nothing proves nothing: each deliberate fault around the engines breaks a rule.
#[test]
fn each_mutation_has_a_counterexample() {
    let (one, two) = (Bound::new(2, 1, true), Bound::new(1, 2, false));
    let not_fenced = "the resources of a kernel that was not fenced are reclaimed";
    let ended = "a morph or a sweep ends the kernel that serves";
    let source = "the source of a committed morph serves";
    let dead = "the instance counts as serving, and its kernel does not serve";
    for (mutation, bound, rule) in [
        (Mutation::FenceNotDone, one, not_fenced),
        (Mutation::ReclaimedEarly, one, not_fenced),
        (
            Mutation::OlderIncarnation,
            one,
            "a kernel obeys an older daemon",
        ),
        (
            Mutation::GenerationReused,
            two,
            "a generation's number is used twice",
        ),
        (Mutation::RecordForgotten, one, ended),
        (Mutation::ServeBeforeRecord, one, ended),
        (Mutation::RecordDenied, one, source),
        (Mutation::ResumeAfterRecord, one, source),
        (Mutation::LeaseWhileHolding, one, source),
        (Mutation::ForgottenSessions, two, source),
        (Mutation::VerdictNotRepeated, one, dead),
        (Mutation::FailedMorphForgotten, one, dead),
    ] {
        assert_eq!(found(bound, &[mutation]), Some(rule), "{mutation:?}");
    }
}

/// The counterexamples above are the shortest, and most rules break before two generations serve. That rule breaks too.
#[test]
fn without_a_safeguard_two_generations_serve() {
    let bound = Bound {
        only: Some(rules::TWO_SERVE),
        ..Bound::new(1, 1, false)
    };
    for mutation in [Mutation::ResumeAfterRecord, Mutation::LeaseWhileHolding] {
        let rule = found(bound, &[mutation]);
        assert_eq!(rule, Some(rules::TWO_SERVE), "{mutation:?}");
    }
}
