//! The demo on the embedded backend, and on the multikernel one where that can be emulated: it happens
//! as told, and leaves nothing behind.
//!
//! Uses the programs beside it, as `cargo build --workspace` makes them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn demo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kmorph-demo"));
    command.stdin(Stdio::null());
    command
}

/// The directory that the demo's daemon was given.
fn directory(text: &str) -> &str {
    let (_, rest) = text.split_once("KMORPH_SOCKET=").unwrap();
    rest.split_once("/run/kmorphd.sock").unwrap().0
}

/// Processes that name `dir` in their command line or environment.
fn processes_of(dir: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let names = |path: &Path, name: &str| {
        let text = std::fs::read(path.join(name)).unwrap_or_default();
        text.windows(dir.len()).any(|part| part == dir.as_bytes())
    };
    entries
        .map(|entry| entry.path())
        .filter(|path| names(path, "cmdline") || names(path, "environ"))
        .map(|path| path.display().to_string())
        .collect()
}

fn leaves_nothing(dir: &str) {
    assert!(!Path::new(dir).exists(), "{dir} is left");
    assert_eq!(processes_of(dir), Vec::<String>::new());
}

#[test]
fn it_happens_as_told() {
    let output = demo().output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    let lines = [
        "$ kmorphctl daemon start",
        "Running kernel: 6.1.0-demo",
        "$ kill -KILL ",
        "ended by signal 9",
        "$ kill -STOP ",
        "it executes nothing: stopped",
        "$ kmorphctl morph web ",
        "Morphed: web (generation 3 -> 4)",
        "Running kernel: 6.12.0-demo",
        "All 512 values are there.",
        "| to the verdict",
        "It all happened as told",
    ];
    has_in_order(&text, &lines);
    assert!(!text.contains('\x1b'), "styled without a terminal:\n{text}");
    leaves_nothing(directory(&text));
}

fn has_in_order(text: &str, lines: &[&str]) {
    let mut rest = text;
    for line in lines {
        let (_, after) = rest
            .split_once(line)
            .unwrap_or_else(|| panic!("{line:?} is not where it should be in:\n{text}"));
        rest = after;
    }
}

#[test]
fn it_happens_as_told_beside_an_emulated_kernel() {
    if !kmorph_emulated_kernel::Process::is_possible() {
        return;
    }
    let output = demo().arg("--backend=multikernel").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    let lines = [
        "No such kernel is booted here",
        "$ kmorph-emulated-kernel under ",
        "Running kernel: 6.1.0-demo",
        "told `panic web`",
        "its kernel panicked",
        "told `hang web`",
        "silent for ",
        "$ kmorphctl morph web ",
        "Morphed: web (generation 3 -> 4)",
        "Running kernel: 6.12.0-demo",
        "All 128 values are there.",
        "It all happened as told",
    ];
    has_in_order(&text, &lines);
    leaves_nothing(directory(&text));
}

#[test]
fn interrupted_it_takes_everything_with_it() {
    let mut backends = vec!["embedded"];
    if kmorph_emulated_kernel::Process::is_possible() {
        backends.push("multikernel");
    }
    for backend in backends {
        interrupted(backend);
    }
}

fn interrupted(backend: &str) {
    let mut child = demo()
        .args(["--backend", backend])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("A client now") {
        assert!(
            said.read_line(&mut text).unwrap() > 0,
            "it ended early:\n{text}"
        );
    }
    let dir = directory(&text).to_owned();
    assert!(!processes_of(&dir).is_empty());
    kill(
        Pid::from_raw(i32::try_from(child.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let mut errors = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{errors}");
    assert!(errors.contains("Interrupted"), "{errors}");
    leaves_nothing(&dir);
}

#[test]
fn where_no_kernel_can_be_emulated_it_says_what_to_do() {
    let demo = env!("CARGO_BIN_EXE_kmorph-demo");
    // Where it could be, another device is put in place of FUSE's.
    let mut command = match kmorph_emulated_kernel::Process::obstacle() {
        Some(_) => Command::new(demo),
        None => {
            let script = "mount --bind /dev/null /dev/fuse && exec \"$0\" \"$@\"";
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", script, demo]);
            command
        }
    };
    let output = command.arg("--backend=multikernel").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(9), "{errors}");
    assert!(output.stdout.is_empty());
    has_in_order(
        &errors,
        &["cannot be emulated here: ", "hint: as root", demo],
    );
}

#[test]
fn make_refuses_who_is_not_root_before_it_builds() {
    let output = Command::new("make")
        .args(["-C", concat!(env!("CARGO_MANIFEST_DIR"), "/..")])
        .args(["demo", "BACKEND=multikernel", "USER_ID=1000", "CARGO=false"])
        .env("LC_ALL", "C")
        .env_remove("MAKEFLAGS")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(!said.contains("Building"), "{said}");
    has_in_order(
        &errors,
        &["cannot be emulated here: ", "root", "make demo-build"],
    );
    // make has an exit status of its own; the recipe's is in its words.
    assert!(errors.contains("Error 9"), "{errors}");
}
