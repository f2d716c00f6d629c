//! The rules in `docs/libkerf.md` are the rules of the crate. After a change of the rules,
//! `UPDATE=1 cargo test -p libkerf --test document` rewrites the table.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::path::PathBuf;

use libkerf::check::{Rule, Severity, Stance};

const START: &str = "<!-- rules: written by libkerf/tests/document.rs -->\n";
const END: &str = "<!-- end of rules -->\n";

fn table() -> String {
    let stance = |stance| match stance {
        Stance::Refuses => "refuses",
        Stance::Warns => "warns",
        Stance::Takes => "-",
    };
    let mut table = String::from(
        "| rule | what breaks it | libkerf | kernel | kerf |\n|---|---|---|---|---|\n",
    );
    for rule in Rule::ALL {
        let ours = match rule.severity() {
            Severity::Error => "refuses",
            Severity::Warning => "warns",
        };
        let (kernel, kerf) = (stance(rule.kernel()), stance(rule.kerf()));
        table += &format!(
            "| `{}` | {} | {ours} | {kernel} | {kerf} |\n",
            rule.id(),
            rule.what()
        );
    }
    table
}

#[test]
fn the_documented_rules_are_those_that_are_enforced() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/libkerf.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(START).expect("the table's start");
    let (written, after) = rest.split_once(END).expect("the table's end");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, [before, START, &table(), END, after].concat()).unwrap();
        return;
    }
    assert_eq!(
        written,
        table(),
        "UPDATE=1 cargo test -p libkerf --test document writes it anew"
    );
}
