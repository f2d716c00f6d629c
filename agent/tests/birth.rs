//! How the daemon's backends start a process: it is on record, tagged and in its cgroup before it is its program.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use kmorph_launch::birth::{Birth, closed_path, heard, record_path};

const TAG: u64 = (1 << 62) + 7;

fn birth(run_dir: &Path) -> Birth {
    Birth {
        run_dir: run_dir.to_owned(),
        role: "qemu".to_owned(),
        tag: Some(TAG),
        cgroup: None,
    }
}

/// Starts what becomes `program`, and hears whether it was born.
fn start(birth: &Birth, program: &[&str]) -> (Child, std::io::Result<()>) {
    let (mut told, tell) = std::io::pipe().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kmorph-agent"));
    command
        .args(birth.words())
        .arg("--exec")
        .args(program)
        .stdin(tell)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    drop(command);
    let mut text = Vec::new();
    told.read_to_end(&mut text).unwrap();
    (child, heard(&text))
}

#[test]
fn a_process_is_on_record_and_tagged_before_it_is_its_program() {
    let dir = tempfile::tempdir().unwrap();
    let record = record_path(dir.path(), "qemu");
    std::fs::write(&record, "").unwrap();
    let script = "cat /proc/self/limits; cat; echo $$ $(ps -o sid= -p $$)";
    let (child, born) = start(&birth(dir.path()), &["sh", "-c", script]);
    born.unwrap();
    let pid = child.id();
    let recorded = std::fs::read_to_string(record).unwrap();
    let fields: Vec<&str> = recorded.split_whitespace().collect();
    assert_eq!(fields[0], pid.to_string());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let tag = text
        .lines()
        .find(|line| line.starts_with("Max realtime timeout"));
    assert!(tag.unwrap().contains(&TAG.to_string()), "{text}");
    // Its input is empty, and it leads a session of its own under the pid of its birth.
    let last: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(last, [pid.to_string(), pid.to_string()]);
}

#[test]
fn a_spawn_that_was_closed_or_is_gone_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ran = dir.path().join("ran");
    let ran_word = ran.to_str().unwrap();
    let refused = |why: &str| {
        let (child, born) = start(&birth(dir.path()), &["touch", ran_word]);
        let reason = born.unwrap_err().to_string();
        assert!(reason.contains(why), "{reason}");
        assert!(!child.wait_with_output().unwrap().status.success());
        assert!(!ran.exists());
    };
    // Its run directory holds no record to write: the generation was released meanwhile.
    refused("No such file");
    std::fs::write(record_path(dir.path(), "qemu"), "").unwrap();
    std::fs::write(closed_path(dir.path()), "").unwrap();
    refused("closed this spawn");
}

#[test]
fn a_cgroup_that_is_gone_is_entered_by_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(record_path(dir.path(), "qemu"), "").unwrap();
    let gone = Birth {
        cgroup: Some(dir.path().join("gone")),
        ..birth(dir.path())
    };
    let (child, born) = start(&gone, &["true"]);
    assert!(
        born.unwrap_err()
            .to_string()
            .contains("entering the cgroup")
    );
    child.wait_with_output().unwrap();
    let record = std::fs::read(record_path(dir.path(), "qemu")).unwrap();
    assert!(record.is_empty());
}

/// The next daemon finds it by its record.
#[test]
fn a_daemon_that_died_meanwhile_does_not_hear_it() {
    let dir = tempfile::tempdir().unwrap();
    let record = record_path(dir.path(), "qemu");
    std::fs::write(&record, "").unwrap();
    let (told, tell) = std::io::pipe().unwrap();
    drop(told);
    let mut command = Command::new(env!("CARGO_BIN_EXE_kmorph-agent"));
    command
        .args(birth(dir.path()).words())
        .args(["--exec", "echo", "here"]);
    let child = command.stdin(tell).stdout(Stdio::piped()).spawn().unwrap();
    drop(command);
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"here\n");
    let recorded = std::fs::read_to_string(record).unwrap();
    assert!(recorded.starts_with(&format!("{pid} ")), "{recorded}");
}
