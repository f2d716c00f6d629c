//! dtc's own test suite: libkerf compiles each source to the same bytes as dtc, or refuses the source like dtc.
//!
//! The suite is not part of this repository. `DTC_SUITE` is the directory `tests` of dtc's source:
//! `DTC_SUITE=… cargo test -p libkerf --test suite -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::path::Path;
use std::process::Command;

use libkerf::dtb;
use libkerf::dts::{self, DtsFault};

/// Result of one source.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    SameBytes,
    RefusedByBoth,
    /// The source uses a part of the language that libkerf documents as unsupported.
    Outside(String),
    Differs(String),
}

fn outcome(path: &Path) -> Outcome {
    let theirs = Command::new("dtc")
        .args(["-q", "-q", "-I", "dts", "-O", "dtb"])
        .arg(path.file_name().unwrap())
        .current_dir(path.parent().unwrap())
        .output()
        .expect("dtc is installed by scripts/setup");
    let theirs = theirs.status.success().then_some(theirs.stdout);
    let bytes = std::fs::read(path).unwrap();
    let Ok(text) = String::from_utf8(bytes) else {
        return Outcome::Outside("not UTF-8".to_owned());
    };
    match (dts::read(&text), theirs) {
        (Err(error), _)
            if matches!(
                error.fault,
                DtsFault::Unsupported(..) | DtsFault::KerfText | DtsFault::TooLarge(_)
            ) =>
        {
            Outcome::Outside(error.to_string())
        }
        (Err(_), None) => Outcome::RefusedByBoth,
        (Err(error), Some(_)) => Outcome::Differs(format!("dtc reads it: {error}")),
        (Ok(_), None) => Outcome::Differs("dtc refuses it".to_owned()),
        (Ok(tree), Some(theirs)) => match dtb::write(&tree) {
            Ok(ours) if ours == theirs => Outcome::SameBytes,
            Ok(_) => Outcome::Differs("the bytes differ".to_owned()),
            Err(error) => Outcome::Differs(format!("not written: {error}")),
        },
    }
}

#[test]
#[ignore = "needs the source of dtc, which DTC_SUITE names"]
fn dtcs_own_suite_gives_the_same_bytes_or_is_refused_by_both() {
    let suite = std::env::var_os("DTC_SUITE").expect("DTC_SUITE names the tests of dtc's source");
    let mut sources: Vec<_> = std::fs::read_dir(suite)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "dts"))
        .collect();
    sources.sort();
    let (mut same, mut refused, mut outside, mut differing) = (0, 0, 0, Vec::new());
    for path in &sources {
        let name = path.file_name().unwrap().display();
        match outcome(path) {
            Outcome::SameBytes => same += 1,
            Outcome::RefusedByBoth => refused += 1,
            Outcome::Outside(why) => {
                println!("outside: {name}: {why}");
                outside += 1;
            }
            Outcome::Differs(why) => differing.push(format!("{name}: {why}")),
        }
    }
    println!(
        "{} sources: {same} give the same bytes, {refused} are refused by both, {outside} are \
         outside what is read, {} differ",
        sources.len(),
        differing.len()
    );
    assert!(!sources.is_empty());
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}
