//! Makes kernels fail in many ways, and compares what `kmorphctl vmcore analyze`, drgn and crash report of each vmcore. `make
//! test-failures` runs this program, and writes the table in `docs/vmcore.md`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod kinds;

use std::path::Path;
use std::process::Command;

use kinds::{FAILURES, Failure};
use kmorph_tests::crashed_guest::CrashedGuest;
use kmorph_tests::dumps::{crash, vmlinux, written};
use kmorph_tests::program;
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::writer::Output;
use serde::Deserialize;
use serde_json::Value;

/// Kernels of the guests.
const SERIES: [&str; 2] = ["6.1", "6.12"];
/// Kernels that Debian 12's crash can read.
const CRASH_READS: [&str; 1] = ["6.1"];
/// The page with the table.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/vmcore.md");
const TABLE_BEGINS: &str = "<!-- table of make test-failures -->\n";
const TABLE_ENDS: &str = "<!-- end of the table -->\n";

/// First digits of addresses in modules on x86-64 (Documentation/arch/x86/x86_64/mm.rst).
const MODULES: &str = "0xffffffffc";

/// One tool's report of the CPU that panicked.
#[derive(Debug, Deserialize)]
struct Crashed {
    cpu: Option<u32>,
    #[serde(default)]
    comm: String,
    /// Functions, innermost first; `None` for a function without a name.
    #[serde(default)]
    stack: Vec<Option<String>>,
}

impl Crashed {
    fn functions(&self) -> Vec<String> {
        let named = self.stack.iter().flatten();
        named.map(|name| plain(name).to_owned()).collect()
    }
}

/// The name of a function without the offset of a reader or the suffix of the compiler.
fn plain(name: &str) -> &str {
    let name = name.split('+').next().unwrap_or(name);
    name.split('.').next().unwrap_or(name)
}

#[test]
#[ignore = "needs drgn, crash and Debian's debug symbols: make test-failures"]
fn the_reports_of_each_failure_agree() {
    let only = std::env::var("KMORPH_TEST_FAILURES").unwrap_or_default();
    let mut table = String::new();
    let mut wrong = Vec::new();
    for failure in FAILURES
        .iter()
        .filter(|failure| failure.what.contains(&only))
    {
        for series in SERIES {
            match compared(failure, series) {
                Ok(row) => {
                    println!("{row}");
                    table += &row;
                    table.push('\n');
                }
                Err(why) => {
                    println!("{}, {series}: {why}", failure.what);
                    wrong.push(format!("{}, {series}: {why}", failure.what));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    if only.is_empty() {
        write_table(&table);
    }
}

fn write_table(rows: &str) {
    let page = std::fs::read_to_string(PAGE).unwrap();
    let (before, rest) = page.split_once(TABLE_BEGINS).unwrap();
    let (_, after) = rest.split_once(TABLE_ENDS).unwrap();
    let head = "| failure | Linux | panic | cause | CPU, task | calls that agree | read by |\n\
                |---|---|---|---|---|---|---|\n";
    let page = format!("{before}{TABLE_BEGINS}{head}{rows}{TABLE_ENDS}{after}");
    std::fs::write(PAGE, page).unwrap();
}

/// Makes a kernel fail and has each tool read its vmcore. Returns the row of the table, or the difference.
fn compared(failure: &Failure, series: &'static str) -> Result<String, String> {
    let plan = failure.plan(series);
    let guest = CrashedGuest::new(&plan);
    guest.dump("elf");
    let (core, _) = written(&guest, "core", Output::Kdump(Compression::Zlib), 31);
    let report = analysed(&core);
    let console = || std::fs::read_to_string(guest.path("console")).unwrap_or_default();
    let (panic, cause) = (
        text(&report["crash"]["panic"]),
        text(&report["crash"]["cause"]),
    );
    contains("the panic", &panic, failure.panic)?;
    contains("the cause", &cause, failure.cause)
        .map_err(|why| format!("{why}\nof {}\n{}", report["crash"]["events"], console()))?;
    let ours = of_event(&report);
    if let Some(expected) = failure.comm {
        same("the task", &ours.comm, &expected.to_owned())?;
    }
    let theirs = by_drgn(&core, series);
    same("drgn's CPU", &theirs.cpu, &ours.cpu)?;
    same("drgn's task", &theirs.comm, &ours.comm)?;
    let calls = agreeing("drgn", &ours, &theirs)?;
    let mut read_by = "analyze, drgn".to_owned();
    if CRASH_READS.contains(&series) {
        let commands = &["sys", "bt"];
        match crash(&guest, &plan, &core, commands) {
            Ok(said) => {
                agrees_with_crash(&said, &ours, &panic, &cause)?;
                read_by += ", crash";
            }
            Err(of_ours) => match crash(&guest, &plan, &guest.path("elf"), commands) {
                Ok(_) => return Err(format!("crash reads QEMU's dump, not ours: {of_ours}")),
                Err(_) => read_by += " (crash reads neither this dump nor QEMU's)",
            },
        }
    }
    let cause = if cause.is_empty() {
        "-".to_owned()
    } else {
        without_directories(&cause)
    };
    Ok(format!(
        "| {} | {series} | {panic} | {} | {}, {} | {calls} | {read_by} |",
        failure.what,
        cause.replace('|', "\\|"),
        ours.cpu.unwrap(),
        ours.comm,
    ))
}

fn agrees_with_crash(said: &str, ours: &Crashed, panic: &str, cause: &str) -> Result<(), String> {
    let theirs = of_crash(said);
    same("crash's CPU", &theirs.cpu, &ours.cpu)?;
    same("crash's task", &theirs.comm, &ours.comm)?;
    in_common(ours, &theirs).map_err(|why| format!("crash: {why}\n{said}"))?;
    names_the_panic(said, panic, cause)
}

/// The text with only the file names of absolute paths: a module is built in another directory on each machine.
fn without_directories(text: &str) -> String {
    let words = text.split(' ').map(|word| match word.rsplit_once('/') {
        Some((directories, file)) if directories.starts_with('/') => file,
        _ => word,
    });
    words.collect::<Vec<_>>().join(" ")
}

fn analysed(core: &Path) -> Value {
    let ran = Command::new(program("kmorphctl"))
        .args(["vmcore", "analyze", "--output-format", "json"])
        .arg(core)
        .output()
        .unwrap();
    assert!(ran.status.success(), "{ran:?}");
    serde_json::from_slice(&ran.stdout).unwrap()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The event that is the cause, or else the panic.
fn of_event(report: &Value) -> Crashed {
    let crash = &report["crash"];
    let told = [&crash["cause"], &crash["panic"]];
    let told = told.into_iter().find_map(Value::as_str).unwrap_or_default();
    let events = crash["events"].as_array().unwrap();
    let tells = |event: &&Value| text(&event["title"]).contains(told) && !event["cpu"].is_null();
    let event = events.iter().rev().find(tells);
    let event = event.or_else(|| events.iter().rev().find(|event| !event["cpu"].is_null()));
    let event = event.unwrap_or_else(|| panic!("no event has a CPU: {crash:#}"));
    let mut stack = Vec::new();
    let calls = event["call_trace"].as_array().unwrap();
    stack.extend(calls.iter().map(|call| call.as_str().map(str::to_owned)));
    Crashed {
        cpu: event["cpu"]
            .as_u64()
            .and_then(|cpu| u32::try_from(cpu).ok()),
        comm: text(&event["comm"]),
        stack,
    }
}

fn by_drgn(core: &Path, series: &str) -> Crashed {
    let python = std::env::var_os("KMORPH_DRGN_PYTHON").expect("make test-failures sets it");
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/failures/drgn_crashed.py"
    );
    let ran = Command::new(python)
        .arg(script)
        .arg(core)
        .arg(vmlinux(series))
        .output();
    let ran = ran.unwrap();
    assert!(ran.status.success(), "{ran:?}");
    serde_json::from_slice(&ran.stdout).unwrap()
}

/// crash prints `PID: 1  TASK: ffff…  CPU: 0  COMMAND: "init"`, and `#2 [ffff…] name at ffff…` of each call.
fn of_crash(said: &str) -> Crashed {
    let line = said
        .lines()
        .find(|line| line.starts_with("PID: "))
        .expect(said);
    let after = |word: &str| line.split(word).nth(1).unwrap().split_whitespace().next();
    let calls = said
        .lines()
        .filter(|line| line.trim_start().starts_with('#'));
    let name = |line: &str| {
        line.split("] ")
            .nth(1)?
            .split(' ')
            .next()
            .map(str::to_owned)
    };
    Crashed {
        cpu: after("CPU: ").and_then(|cpu| cpu.parse().ok()),
        comm: after("COMMAND: ").unwrap().trim_matches('"').to_owned(),
        stack: calls.map(name).collect(),
    }
}

fn contains(what: &str, said: &str, expected: Option<&str>) -> Result<(), String> {
    let agrees = match expected {
        Some(expected) => said.contains(expected),
        None => said.is_empty(),
    };
    agrees
        .then_some(())
        .ok_or_else(|| format!("{what} is {said:?}, not {expected:?}"))
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, said: &T, expected: &T) -> Result<(), String> {
    (said == expected)
        .then_some(())
        .ok_or_else(|| format!("{what} is {said:?}, not {expected:?}"))
}

/// The last trace of an event. For a stall the kernel writes several, and the last one is the CPU's own.
fn last_trace(calls: &[String]) -> &[String] {
    let ends = calls
        .iter()
        .enumerate()
        .filter(|(_, call)| *call == "</TASK>");
    let mut begins = ends.map(|(at, _)| at + 1).filter(|at| *at < calls.len());
    &calls[begins.next_back().unwrap_or(0)..]
}

/// Counts our calls that the other tool has too, in the same order. Not compared are calls that the kernel marks as
/// guesses, calls in a module, for which the other tool has no symbols, and entry code, which each tool shows
/// differently. Where the other tool's stack ends in the module, the comparison ends there too.
fn agreeing(other: &str, ours: &Crashed, theirs: &Crashed) -> Result<usize, String> {
    let (ours, theirs) = (ours.functions(), theirs.functions());
    let ends_in_module = theirs.last().is_some_and(|call| call.starts_with(MODULES));
    let mut left = theirs.iter();
    let mut count = 0;
    let comparable: Vec<_> = last_trace(&ours)
        .iter()
        .filter(|call| is_comparable(call))
        .collect();
    for call in &comparable {
        if left.any(|other| other == *call) {
            count += 1;
        } else if ends_in_module {
            break;
        } else {
            return Err(format!(
                "{other} has no {call}:\nours {ours:?}\ntheirs {theirs:?}"
            ));
        }
    }
    if count == 0 && !ends_in_module && !comparable.is_empty() {
        return Err(format!(
            "{other} and we have no call in common:\nours {ours:?}\ntheirs {theirs:?}"
        ));
    }
    Ok(count)
}

/// crash 8 follows no unwind tables: it leaves out calls, and takes stale values on the stack for calls. At least one of our
/// calls must be in its stack.
fn in_common(ours: &Crashed, theirs: &Crashed) -> Result<(), String> {
    let (ours, theirs) = (ours.functions(), theirs.functions());
    let comparable: Vec<_> = last_trace(&ours)
        .iter()
        .filter(|call| is_comparable(call))
        .collect();
    let common = comparable.iter().any(|call| theirs.contains(call));
    if common || comparable.is_empty() {
        return Ok(());
    }
    Err(format!(
        "no call in common:\nours {ours:?}\ntheirs {theirs:?}"
    ))
}

fn is_comparable(call: &str) -> bool {
    let not = [
        "? ",
        "<",
        "0x",
        "failing_",
        "entry_",
        "asm_",
        "ret_from",
        "rewind_",
        "dump_stack",
        "end_repeat",
    ];
    !not.iter().any(|begin| call.starts_with(begin))
}

/// Checks the line of the log that crash names as the panic.
fn names_the_panic(said: &str, panic: &str, cause: &str) -> Result<(), String> {
    let line = said
        .lines()
        .find(|line| line.trim_start().starts_with("PANIC: "));
    let line = line.ok_or_else(|| format!("crash names no panic:\n{said}"))?;
    let named = line.contains(panic)
        || (!cause.is_empty() && line.contains(cause))
        || line.contains("Oops: ");
    named
        .then_some(())
        .ok_or_else(|| format!("crash names another panic: {line}"))
}
