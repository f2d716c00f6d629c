//! kmorphctl against a real daemon: each of its commands, as typed by a user.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::process::{Command, Output, Stdio};

use kmorph_tests::{Host, program};

/// Exit codes of `docs/cli.md`.
const DONE: i32 = 0;
const NOT_FOUND: i32 = 4;
const WRONG_STATE: i32 = 5;
const REFUSED: i32 = 7;

fn kmorphctl(host: &Host, words: &[&str]) -> Output {
    Command::new(program("kmorphctl"))
        .args(words)
        .env("KMORPH_SOCKET", host.path("run/kmorphd.sock"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs a command, and returns its output; its errors if it must fail.
fn ends_with(host: &Host, code: i32, words: &[&str]) -> String {
    let output = kmorphctl(host, words);
    let [out, err] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert_eq!(output.status.code(), Some(code), "{words:?}: {out}{err}");
    if code == DONE { out } else { err }
}

/// Runs a command that must succeed and print every wanted text.
fn says(host: &Host, words: &[&str], wanted: &[&str]) {
    let out = ends_with(host, DONE, words);
    for text in wanted {
        assert!(out.contains(text), "{words:?}: {text:?} is not in:\n{out}");
    }
}

fn spawned() -> Host {
    let host = Host::new();
    let kernel = format!("--kernel={}", host.kernel("6.1.0-a").display());
    let words = [
        "spawn",
        "web",
        &kernel,
        "--workload=kmorph-kv",
        "--publish=0:6379",
    ];
    says(&host, &words, &["web", "6.1.0-a"]);
    host
}

#[test]
fn an_instance_is_looked_at() {
    let host = spawned();
    says(&host, &["list"], &["web", "RUNNING"]);
    says(&host, &["list", "--verbose"], &["web", "RUNNING"]);
    says(
        &host,
        &["status", "web"],
        &["Status: RUNNING", "Generation: 1"],
    );
    says(&host, &["heartbeat", "web"], &["web", "monitoring"]);
    says(&host, &["health", "web"], &["web", "healthy"]);
    says(
        &host,
        &["ping", "web", "--count", "2", "--interval", "0.01"],
        &["web"],
    );
    says(&host, &["daemon", "status"], &["embedded"]);
    says(&host, &["operation", "list"], &["op-1", "web"]);
    says(&host, &["operation", "show", "op-1"], &["op-1"]);
    says(
        &host,
        &["events", "--since-id=0", "--count=1"],
        &["started"],
    );
    for words in [&["status", "db"][..], &["operation", "show", "op-99"]] {
        ends_with(&host, NOT_FOUND, words);
    }
    let refused = ends_with(&host, WRONG_STATE, &["operation", "cancel", "op-1"]);
    assert!(refused.contains("nothing to cancel"), "{refused}");
}

#[test]
fn a_morph_is_made_step_by_step_and_undone() {
    let host = spawned();
    let kernel = format!("--kernel={}", host.kernel("6.12.0-b").display());
    says(&host, &["morph", "prepare", "web", &kernel], &["web"]);
    says(
        &host,
        &["morph", "status", "web"],
        &["6.12.0-b", "State provider: cooperative"],
    );
    says(&host, &["morph", "validate", "web"], &["passed"]);
    says(&host, &["morph", "rollback", "web"], &["web"]);
    says(&host, &["status", "web"], &["6.1.0-a", "Generation: 1"]);
    ends_with(&host, NOT_FOUND, &["morph", "status", "web"]);
    says(&host, &["morph", "prepare", "web", &kernel], &["web"]);
    says(&host, &["morph", "validate", "web"], &["passed"]);
    says(
        &host,
        &["morph", "commit", "web", "--force"],
        &["6.12.0-b", "Downtime"],
    );
    ends_with(&host, REFUSED, &["morph", "web", "--kernel=/etc/hostname"]);
}

#[test]
fn a_recovery_is_asked_for_and_shown() {
    let host = spawned();
    says(&host, &["recover", "web"], &["web"]);
    says(
        &host,
        &["recovery-log", "--instance=web", "--since=5m"],
        &["operator", "recovered"],
    );
    says(&host, &["terminate", "web"], &["web"]);
    ends_with(&host, NOT_FOUND, &["status", "web"]);
}

#[test]
fn policies_are_shown_set_written_and_read() {
    let host = spawned();
    says(
        &host,
        &["policy", "set", "heartbeat-timeout", "web", "7"],
        &["web"],
    );
    says(
        &host,
        &["policy", "set", "auto-heal", "web", "disabled"],
        &["web"],
    );
    says(
        &host,
        &["policy", "set", "morph-timeout", "web", "30"],
        &["web"],
    );
    says(&host, &["policy", "set", "vmcore", "web", "off"], &["web"]);
    let refused = ends_with(
        &host,
        WRONG_STATE,
        &["policy", "set", "vmcore", "web", "on"],
    );
    assert!(refused.contains("captures no memory"), "{refused}");
    let file = host.path("policies.toml");
    let output = format!("--output={}", file.display());
    ends_with(&host, DONE, &["policy", "export", &output]);
    let text = std::fs::read_to_string(&file).unwrap();
    for line in [
        "[instance.web]",
        "heartbeat_timeout_s = 7.0",
        "auto_heal = false",
        "morph_timeout_s = 30.0",
        "vmcore = \"off\"",
    ] {
        assert!(text.contains(line), "{line:?} is not in:\n{text}");
    }
    let name = file.to_str().unwrap();
    std::fs::write(&file, text.replace("7.0", "9.0")).unwrap();
    ends_with(&host, DONE, &["policy", "import", name]);
    says(&host, &["policy", "show", "--instance=web"], &["9"]);
    std::fs::write(&file, text.replace("7.0", "0.01")).unwrap();
    let refused = ends_with(&host, REFUSED, &["policy", "import", name]);
    assert!(refused.contains("heartbeat_timeout_s"), "{refused}");
    says(&host, &["daemon", "reload"], &[]);
}

#[test]
fn what_is_imported_from_the_c_project_is_sound_for_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (
        dir.path().join("kmorph.conf"),
        dir.path().join("kmorphd.conf"),
    );
    let upstream = "kernel = /boot/vmlinuz\ncpus = 1-3\nmemory = 3GB\nprobe_interval = 100ms\n\
                    probe_timeouts = 9\ndump = /var/crash/core\ndevices = 0000:09:00.0\n";
    std::fs::write(&from, upstream).unwrap();
    let import = Command::new(program("kmorphctl"))
        .arg("import-upstream-config")
        .arg(&from)
        .arg("--output")
        .arg(&to)
        .output()
        .unwrap();
    assert!(import.status.success(), "{import:?}");
    let check = Command::new(program("kmorphd"))
        .arg("--check")
        .arg("--config")
        .arg(&to)
        .output()
        .unwrap();
    let text = std::fs::read_to_string(&to).unwrap();
    assert!(check.status.success(), "{check:?}: {text}");
    for line in [
        "heartbeat_timeout_s = 0.9",
        "memory_mib = 3072",
        "dir = \"/var/crash\"",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}
