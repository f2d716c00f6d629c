//! The configuration of the C project of the same name becomes kmorphd's.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::path::Path;

use serde_json::Value;
use support::{Ended, ctl};

/// As somebody would have it: the keys that arming takes, and some more.
const UPSTREAM: &str = "# /etc/kmorph/kmorph.conf of the file server\n\n\
    kernel = /boot/vmlinuz-6.12.9\ncpus = 4-7\nmemory = 2GB\n\
    # slower than the default: the machine swaps\nprobe_interval = 200ms\n\
    dump = /var/crash/predecessor.vmcore\nconsole = ttyS0\nconsole_login = /bin/sh\n";

fn import(dir: &Path, text: &[u8], words: &[&str]) -> Ended {
    let file = dir.join("kmorph.conf");
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let mut all = vec!["import-upstream-config", file];
    all.extend_from_slice(words);
    ctl(&dir.join("no-daemon"), &all)
}

#[test]
fn the_configuration_goes_to_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let ended = import(dir.path(), UPSTREAM.as_bytes(), &[]);
    assert_eq!(ended.code, 0, "{ended:?}");
    for line in [
        "backend = \"multikernel\"",
        "heartbeat_timeout_s = 1.0",
        "memory_mib = 2048",
        "dir = \"/var/crash\"",
        "#   kerf init --cpus=4,5,6,7 --memory=2176MB",
        "#   kmorphctl spawn successor --kernel=/boot/vmlinuz-6.12.9 --cpus=4",
    ] {
        assert!(
            ended.stdout.lines().any(|said| said == line),
            "{line}: {ended:?}"
        );
    }
    assert!(ended.stdout.contains("#   line 9, console: "), "{ended:?}");
}

#[test]
fn a_file_is_written_whole_and_none_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("kmorphd.conf");
    let output = format!("--output={}", to.display());
    let ended = import(dir.path(), UPSTREAM.as_bytes(), &[&output]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stdout.contains("Not taken over:"), "{ended:?}");
    let text = std::fs::read_to_string(&to).unwrap();
    assert!(text.contains("memory_mib = 2048"), "{text}");
    let again = import(dir.path(), b"memory = 1GB\n", &[&output]);
    assert_eq!(again.code, 5, "{again:?}");
    assert_eq!(std::fs::read_to_string(&to).unwrap(), text);
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 2, "the two files, nothing else");
}

#[test]
fn programs_are_told_what_became_of_each_key() {
    let dir = tempfile::tempdir().unwrap();
    let words = ["--output-format=json"];
    let ended = import(dir.path(), UPSTREAM.as_bytes(), &words);
    let said: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(said["not_taken_over"][0]["key"], "console", "{said:#}");
    assert_eq!(said["taken_over"][0]["line"], 3, "{said:#}");
    assert_eq!(said["spawn_command"][1], "spawn", "{said:#}");
    assert!(said["toml"].as_str().unwrap().contains("memory_mib"));
}

#[test]
fn every_faulty_line_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let to = format!("--output={}", dir.path().join("out").display());
    let bad = b"kernel = /k\nmemory = lots\nprobe_timeouts = 0\nbogus = 1\njust a word\n";
    let ended = import(dir.path(), bad, &[&to]);
    assert_eq!(ended.code, 7, "{ended:?}");
    for place in [
        "kmorph.conf:2: memory: ",
        "kmorph.conf:3: probe_timeouts: ",
        "kmorph.conf:4: ",
        "kmorph.conf:5: ",
        "nothing was written",
    ] {
        assert!(ended.stderr.contains(place), "{place}: {ended:?}");
    }
    assert!(!dir.path().join("out").exists());
    let many = "x\n".repeat(1000);
    let ended = import(dir.path(), many.as_bytes(), &[]);
    assert!(ended.stderr.contains("and 980 more"), "{ended:?}");
    let too_large = vec![b'#'; (1 << 20) + 1];
    assert_eq!(import(dir.path(), &too_large, &[]).code, 7);
    let missing = ctl(dir.path(), &["import-upstream-config", "/nonexistent/file"]);
    assert_eq!(missing.code, 7, "{missing:?}");
}
