//! Every engine under any sequence of events, and along the paths that the fuzzers' corpora hold.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking; the module is shared with the fuzzers"
)]

mod operations;

use std::path::PathBuf;

use proptest::prelude::*;

/// Runs a target on its fuzzer's corpus, which must not be empty.
fn replay(target: &str, run: fn(&[u8])) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let files: Vec<_> = std::fs::read_dir(folder.join(target)).unwrap().collect();
    assert!(!files.is_empty());
    for file in files {
        let path = file.unwrap().path();
        eprintln!("{}", path.display());
        run(&std::fs::read(path).unwrap());
    }
}

#[test]
fn the_corpus_breaks_no_rule() {
    replay("detector", operations::detector::run);
    replay("instance", operations::instance::run);
    replay("recovery", operations::recovery::run);
    replay("morph", operations::morph::run);
}

/// A row that no events reach is wrong, or tests nothing.
#[test]
fn every_row_of_the_instances_table_is_reached() {
    let rows = kmp_proto::instance::TRANSITIONS.iter().copied().flatten();
    let mut missing: Vec<_> = rows.map(|row| (row.state, row.event, row.next)).collect();
    let mut random = 1u64;
    for _ in 0..200_000 {
        let bytes: Vec<u8> = (0..200).map(|_| pseudo_random(&mut random)).collect();
        let steps = operations::instance::steps(&bytes);
        missing.retain(|step| !steps.contains(step));
        if missing.is_empty() {
            return;
        }
    }
    panic!("not reached: {missing:#?}");
}

/// Returns the low byte of the next SplitMix64 number.
fn pseudo_random(state: &mut u64) -> u8 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (mixed ^ (mixed >> 31)) as u8
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_events_leave_the_detector_within_its_rules(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        operations::detector::run(&bytes);
    }

    #[test]
    fn any_events_leave_an_instance_within_its_rules(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        operations::instance::run(&bytes);
    }

    #[test]
    fn any_events_leave_a_recovery_within_its_rules(
        bytes in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        operations::recovery::run(&bytes);
    }

    #[test]
    fn any_events_leave_a_morph_within_its_rules(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        operations::morph::run(&bytes);
    }
}
