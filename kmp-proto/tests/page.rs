//! `docs/kmp.md` against the code: every type, limit, code, record kind, byte table, enumeration and transition table.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::PathBuf;
use std::time::Duration;

use kmp_proto::fence::{Confirmation, FenceMethod};
use kmp_proto::message::*;
use kmp_proto::transition::Transition;
use kmp_proto::wire::{ErrorCode, HEADER_BYTES, MsgType, RECORD_KINDS};
use kmp_proto::{detector, instance, morph, recovery};

fn page_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/kmp.md")
}

fn page() -> String {
    std::fs::read_to_string(page_path()).unwrap()
}

/// Returns the table rows of `text` as trimmed cells.
fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|row| row.split('|').map(str::trim).collect())
        .collect()
}

/// Returns the text below a heading, up to the next heading of that level.
fn section<'a>(page: &'a str, level: &str, name: &str) -> &'a str {
    let heading = format!("\n{level} {name}\n");
    let at = page
        .find(&heading)
        .unwrap_or_else(|| panic!("no heading {name}"));
    let rest = &page[at + heading.len()..];
    let end = ["\n## ", "\n### "]
        .iter()
        .filter_map(|next| rest.find(next))
        .min();
    &rest[..end.unwrap_or(rest.len())]
}

#[test]
fn every_type_is_listed_with_its_limit_and_whether_it_has_a_reply() {
    let page = page();
    let rows = rows(section(&page, "##", "Message types"));
    for msg_type in MsgType::ALL {
        let value = format!("`{:#06x}`", *msg_type as u16);
        let row = rows
            .iter()
            .find(|row| row[0] == value)
            .unwrap_or_else(|| panic!("{msg_type}"));
        assert_eq!(row[1], msg_type.name());
        assert_eq!(row[3] == "bit 15", msg_type.has_reply(), "{msg_type}");
        assert_eq!(row[4], msg_type.payload_limit().to_string(), "{msg_type}");
    }
    let listed = rows.iter().filter(|row| row[0].starts_with("`0x")).count();
    assert_eq!(listed, MsgType::ALL.len());
}

#[test]
fn every_error_code_and_record_kind_is_listed() {
    let page = page();
    let codes = rows(section(&page, "##", "Error codes"));
    for code in ErrorCode::ALL {
        let row = [code.value().to_string(), code.text().to_owned()];
        assert!(codes.iter().any(|r| r[..] == row), "{code}");
    }
    let kinds = rows(section(&page, "##", "Records"));
    for (kind, name) in RECORD_KINDS {
        let kind = kind.to_string();
        assert!(
            kinds.iter().any(|r| r[0] == kind && r[1] == *name),
            "{name}"
        );
    }
}

#[test]
fn every_byte_table_is_the_one_that_is_compiled() {
    let page = page();
    for (heading, layout) in layouts() {
        let mut expected: Vec<_> = layout
            .fields
            .iter()
            .map(|(name, wire, offset)| [offset.to_string(), (*name).into(), (*wire).into()])
            .collect();
        if layout.reserved > 0 {
            expected.push([
                (layout.size - layout.reserved).to_string(),
                "reserved".into(),
                format!("[u8; {}]", layout.reserved),
            ]);
        }
        let rows = rows(section(&page, "###", heading));
        let found = rows.windows(expected.len()).any(|rows| {
            rows.iter()
                .zip(&expected)
                .all(|(row, want)| row.len() == 4 && row[..3] == want[..])
        });
        assert!(found, "{heading}: no table says {layout:?}");
        assert_eq!(layout.size % 8, 0, "records begin at a multiple of 8");
    }
}

#[test]
fn every_message_has_a_section_and_a_byte_table() {
    let page = page();
    for msg_type in MsgType::ALL {
        section(&page, "###", msg_type.name());
        assert!(
            layouts().any(|(heading, _)| heading == msg_type.name()),
            "{msg_type}"
        );
    }
    let header = rows(section(&page, "##", "Frame"));
    assert!(header.iter().any(|r| r[0] == "28" && r[1] == "reserved"));
    assert_eq!(HEADER_BYTES, 32);
}

/// Checks one enumeration: its table has a row for each value, and no other row.
macro_rules! listed {
    ($page:ident: $($name:ident),*) => {$(
        let title = concat!("\n", stringify!($name), ":\n\n");
        let at = $page.find(title).unwrap_or_else(|| panic!("no table {title}"));
        let table = $page[at + title.len()..].split("\n\n").next().unwrap();
        let found: Vec<_> = rows(table).iter().skip(1).map(|r| (r[0].to_owned(), r[1].to_owned())).collect();
        let expected: Vec<_> = $name::ALL
            .iter()
            .map(|v| (v.value().to_string(), v.as_str().to_owned()))
            .collect();
        assert_eq!(found, expected, stringify!($name));
    )*};
}

#[test]
fn every_code_that_ends_a_connection_is_named() {
    let page = page();
    let codes = section(&page, "##", "Error codes");
    let ending: Vec<_> = ErrorCode::ALL
        .iter()
        .filter(|code| code.ends(Channel::Heartbeat))
        .map(|code| code.value().to_string())
        .collect();
    let (last, others) = ending.split_last().unwrap();
    let sentence = format!("Codes {} and {last} end the connection", others.join(", "));
    assert!(codes.contains(&sentence), "{sentence}");
    assert!(codes.contains("Code 5 never ends one."));
}

#[test]
fn every_bound_of_a_transfer_is_the_one_in_force() {
    let page = page();
    let text = section(&page, "###", "MORPH_TRANSFER_STATE");
    assert_eq!(STATE_CHUNK_MAX_BYTES, 65_536);
    assert!(text.contains("at most **65,536** bytes"));
}

#[test]
fn every_enumeration_lists_exactly_its_values() {
    let page = page();
    listed!(page: PeerRole, Channel, Health, WorkloadState, FailureCause, RecoveryOutcome,
        FenceMethod, Confirmation, ChunkEncoding, CaptureStatus, Side, StateProvider, TransferOp, TransferMode,
        CheckResult, CommitStep, StepStatus, RollbackStatus);
}

const KMP: (&str, &str) = ("../docs/kmp.md", "###");
const INSTANCES: (&str, &str) = ("../docs/instances.md", "##");

/// Compares the last table of a section with a machine's rows, in their order. `UPDATE_PAGE=1` rewrites the table.
fn assert_machine((path, level): (&str, &str), heading: &str, machine: &[Transition]) {
    const HEAD: &str = "| state | event | guard | next | effects |\n|---|---|---|---|---|\n";
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    let page = std::fs::read_to_string(&path).unwrap();
    let text = section(&page, level, heading);
    let at = text.find(HEAD).unwrap() + HEAD.len();
    let printed = text[at..].split("\n\n").next().unwrap().trim_end();
    let rows: Vec<_> = machine.iter().map(ToString::to_string).collect();
    let rows = rows.join("\n");
    if std::env::var_os("UPDATE_PAGE").is_some() {
        let (old, new) = (format!("{HEAD}{printed}"), format!("{HEAD}{rows}"));
        std::fs::write(path, page.replacen(&old, &new, 1)).unwrap();
    } else {
        assert_eq!(printed, rows, "{heading}");
    }
}

#[test]
fn every_transition_table_is_the_one_that_the_engines_are_held_to() {
    assert_machine(KMP, "Failure detector", detector::TRANSITIONS);
    assert_machine(KMP, "Recovery", recovery::TRANSITIONS);
    assert_machine(KMP, "Morph", &morph::TRANSITIONS.concat());
    assert_machine(INSTANCES, "States", &instance::TRANSITIONS.concat());
}

#[test]
fn every_bound_of_the_machines_is_the_one_in_force() {
    let page = page();
    let bounds = rows(section(&page, "##", "State machines"));
    let seconds = |time: Duration| format!("{} s", time.as_secs());
    let ms = |time: Duration| format!("{} ms", time.as_millis());
    let asked = morph::REQUEST_ATTEMPTS;
    let heartbeat = format!(
        "a tenth of the timeout, {low} to {}; {low} until the first healthy answer. From {} on, up to {} less: \
         the probes of many instances go out together",
        seconds(detector::INTERVAL_MAX),
        ms(detector::GRID_INTERVAL_MIN),
        ms(detector::PROBE_GRID),
        low = ms(detector::INTERVAL_MIN),
    );
    for (bound, value) in [
        (
            "one step between freeze",
            seconds(morph::FROZEN_STEP_TIMEOUT),
        ),
        ("retire", seconds(morph::FROZEN_STEP_TIMEOUT)),
        (
            "validated, until",
            format!("{}, configurable", seconds(morph::EXPIRY)),
        ),
        (
            "serve, or the source's rollback, is answered",
            seconds(morph::REQUEST_TIMEOUT),
        ),
        (
            "serve, or the source's rollback, may be refused",
            format!("{asked} times, {} apart", ms(morph::REQUEST_RETRY)),
        ),
        (
            "a fence in a morph",
            format!(
                "{} times, {} apart",
                morph::FENCE_ATTEMPTS,
                seconds(morph::FENCE_RETRY)
            ),
        ),
        (
            "a fence in a recovery",
            format!(
                "{} times, {} apart",
                recovery::FENCE_ATTEMPTS,
                ms(recovery::FENCE_RETRY)
            ),
        ),
        ("rounds before", morph::ROUNDS_MAX.to_string()),
        ("time between", heartbeat),
    ] {
        let row = bounds.iter().find(|row| row[0].starts_with(bound)).unwrap();
        assert_eq!(row[1], value, "{bound}");
    }
}
