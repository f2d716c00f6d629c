//! `kmorphctl vmcore analyze`: what it says of sound, damaged and foreign files, and how it ends.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{Ended, ctl};

fn golden(name: &str) -> PathBuf {
    let vmcore = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmcore");
    vmcore.join("tests/golden").join(name)
}

/// There is no daemon, and none is needed.
fn analyze(file: &Path, words: &[&str]) -> Ended {
    let words = [&["vmcore", "analyze", file.to_str().unwrap()], words].concat();
    ctl(Path::new("/nonexistent/kmorphd.sock"), &words)
}

#[test]
fn a_directory_is_refused_once() {
    let dir = tempfile::tempdir().unwrap();
    let ended = analyze(dir.path(), &[]);
    assert_eq!(ended.code, 7);
    assert_eq!(ended.stderr.matches("cannot read").count(), 1, "{ended:?}");
    assert!(ended.stderr.contains("it is a directory"), "{ended:?}");
}

#[test]
fn a_sound_file_is_told_in_words_json_and_as_its_log() {
    let file = golden("linux-6.12.kdump-lzo");
    let words = analyze(&file, &[]);
    assert_eq!(words.code, 0, "{words:?}");
    assert!(
        words.stdout.contains("\nPanic: sysrq triggered crash\n"),
        "{words:?}"
    );
    assert!(
        words
            .stdout
            .contains("\n    sysrq_handle_crash+0x1a/0x20\n"),
        "{words:?}"
    );
    assert!(words.stdout.contains("\nChecksum: holds\n"), "{words:?}");
    let json = analyze(&file, &["--output-format", "json"]);
    let report: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(report["kernel"]["release"], "6.12.95+deb12-cloud-amd64");
    assert_eq!(report["file"]["packings"], serde_json::json!(["lzo"]));
    assert_eq!(report["crash"]["events"][0]["kind"], "panic");
    let log = analyze(&file, &["--log"]);
    assert_eq!(report["log"]["text"], log.stdout);
    let log = analyze(&file, &["--log", "--output-format", "json"]);
    let log: Value = serde_json::from_str(&log.stdout).unwrap();
    assert_eq!(log, serde_json::json!({ "log": report["log"] }));
}

#[test]
fn a_damaged_file_ends_with_7_after_all_that_can_be_said() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("core");
    let mut bytes = std::fs::read(golden("linux-6.12.kdump-lzo")).unwrap();
    let last = bytes.len() - 9;
    bytes[last] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let ended = analyze(&file, &[]);
    assert_eq!(ended.code, 7);
    assert!(ended.stdout.contains("\nChecksum: broken\n"), "{ended:?}");
    assert!(ended.stderr.contains("is damaged"), "{ended:?}");
    // The log is told all the same, and a scan says the same.
    let log = analyze(&file, &["--log"]);
    assert_eq!(log.code, 7);
    assert!(log.stdout.contains("sysrq triggered crash"), "{log:?}");
    assert!(log.stderr.contains("is damaged"), "{log:?}");
    assert_eq!(analyze(&file, &["--scan"]).code, 7);
}

#[test]
fn a_file_that_was_cut_ends_with_7_whatever_is_asked_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("core");
    let bytes = std::fs::read(golden("linux-6.12.kdump-lzo")).unwrap();
    for end in [bytes.len() - 1, bytes.len() * 9 / 10] {
        std::fs::write(&file, &bytes[..end]).unwrap();
        for words in [&[][..], &["--log"], &["--scan"]] {
            let ended = analyze(&file, words);
            assert_eq!(ended.code, 7, "{end}, {words:?}: {ended:?}");
        }
        let ended = analyze(&file, &[]);
        let line = "\nComplete: no: the file ends before its memory\n";
        assert!(ended.stdout.contains(line), "{ended:?}");
    }
}

#[test]
fn what_cannot_be_read_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("core");
    let whole = std::fs::read(golden("linux-6.1.kdump-zstd")).unwrap();
    let mut no_pages = whole.clone();
    // The number of pages in the sub-header.
    no_pages[4096 + 96..4096 + 104].fill(0xff);
    for (bytes, expected) in [
        (&b"#!/bin/sh\n"[..], "not a vmcore"),
        (&whole[..5000], "truncated"),
        (&no_pages, "damaged at byte 4192"),
        (&[], "not a vmcore"),
    ] {
        std::fs::write(&file, bytes).unwrap();
        let ended = analyze(&file, &[]);
        assert_eq!((ended.code, ended.stdout.as_str()), (7, ""), "{ended:?}");
        assert!(ended.stderr.contains(expected), "{ended:?}");
    }
    let missing = analyze(Path::new("/no/such/core"), &["--output-format", "json"]);
    assert_eq!(missing.code, 7);
    let error: Value = serde_json::from_str(&missing.stderr).unwrap();
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("/no/such/core")
    );
}

/// It is refused before drgn is asked, which need not be installed.
#[test]
fn an_image_of_another_build_is_refused_by_its_build_id() {
    let core = golden("linux-6.12.kdump-lzo");
    let json = analyze(&core, &["--output-format", "json"]);
    let report: Value = serde_json::from_str(&json.stdout).unwrap();
    let wanted = report["kernel"]["build_id"].as_str().unwrap();
    let ended = analyze(&core, &["--vmlinux", "/bin/sh"]);
    assert_eq!(ended.code, 7, "{ended:?}");
    assert!(ended.stdout.contains("\nPanic: sysrq triggered crash\n"));
    for text in ["the image of another kernel", wanted] {
        assert!(ended.stderr.contains(text), "no {text} in {ended:?}");
    }
}

#[test]
fn a_fifo_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let core = golden("linux-6.12.kdump-lzo");
    for ended in [
        analyze(&fifo, &[]),
        analyze(&core, &["--vmlinux", fifo.to_str().unwrap()]),
    ] {
        assert_eq!(ended.code, 7, "{ended:?}");
        assert!(ended.stderr.contains("is a FIFO"), "{ended:?}");
    }
}
