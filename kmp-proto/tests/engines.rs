//! Every engine under any sequence of events, and along the paths that the fuzzers have kept.

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

/// Runs what the fuzzers' corpus holds for a target; it is never empty.
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

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, cases: 2000, ..ProptestConfig::default()
    })]

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
