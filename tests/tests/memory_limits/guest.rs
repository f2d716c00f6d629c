//! The guest, and its results.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use kmorph_backends::kernel_image::synthetic;
use kmorph_tests::initramfs::Initramfs;
use kmorph_tests::{DEADLINE, kernels, program};
use serde::de::DeserializeOwned;

const INIT: &str = include_str!("init.sh");
const APPLETS: [&str; 28] = [
    "cat", "chmod", "echo", "grep", "head", "ifconfig", "kill", "ls", "mkdir", "mount", "nc",
    "pidof", "poweroff", "printf", "rm", "sed", "seq", "sh", "sleep", "sort", "tail", "touch",
    "tr", "true", "uniq", "wc", "[", "find",
];
/// Prefix of the line that begins the results of a name.
const FOUND: &str = "== ";
/// Name of the last results.
const END: &str = "end";

/// Results of a guest, by name.
pub(crate) struct Found(BTreeMap<String, Vec<String>>);

impl Found {
    /// Boots Debian's kernel of this series and waits until the guest has powered itself off.
    pub(crate) fn by_guest(series: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let _guard = Guard::of(dir.path());
        let image = dir.path().join("image.cpio");
        pack(dir.path(), &image);
        let lines = Guest::boot(series, &image).lines();
        let mut found = BTreeMap::<String, Vec<String>>::new();
        let mut name = String::new();
        for line in &lines {
            match line.strip_prefix(FOUND) {
                Some(begun) => {
                    name = begun.to_owned();
                    found.entry(name.clone()).or_default();
                }
                None => found.entry(name.clone()).or_default().push(line.clone()),
            }
        }
        let all = lines.join("\n");
        assert!(
            found.contains_key(END),
            "the guest has not finished:\n{all}"
        );
        println!("{all}");
        Self(found)
    }

    /// Returns the lines of the results `name`.
    pub(crate) fn lines(&self, name: &str) -> &[String] {
        let found = self.0.get(name);
        found.unwrap_or_else(|| panic!("nothing was found out about {name}"))
    }

    /// Asserts that some line of `name` contains this text.
    pub(crate) fn has(&self, name: &str, text: &str) {
        let lines = self.lines(name);
        let has = lines.iter().any(|line| line.contains(text));
        assert!(has, "{text:?} is not in {lines:#?}");
    }

    /// Returns the JSON at the end of the results `name`.
    pub(crate) fn json<T: DeserializeOwned>(&self, name: &str) -> T {
        let lines = self.lines(name);
        let begin = lines.iter().position(|line| line.starts_with(['{', '[']));
        let text = lines[begin.expect("it is JSON")..].join("\n");
        let mut values = serde_json::Deserializer::from_str(&text).into_iter();
        values.next().expect("it is not empty").unwrap()
    }

    /// Returns the number after `name` in the results `about`.
    pub(crate) fn number(&self, about: &str, name: &str) -> u64 {
        let lines = self.lines(about).iter();
        let words = lines.filter_map(|line| line.split_once(' '));
        let mut number = words.filter(|(first, _)| *first == name).map(|(_, n)| n);
        number.next().unwrap().parse().unwrap()
    }
}

fn pack(dir: &Path, image: &Path) {
    let tree = Initramfs::new(dir.join("tree"), &APPLETS);
    for name in ["kmorphd", "kmorphctl", "kmorph-agent", "kmorph-kv"] {
        tree.add_program(&program(name));
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/memory_limits/delegated.c");
    let helper = dir.join("delegated");
    let built = Command::new("cc")
        .arg("-o")
        .arg(&helper)
        .arg(source)
        .status();
    assert!(built.expect("cc runs").success());
    tree.add_program(&helper);
    let kernel = dir.join("kernel");
    std::fs::write(&kernel, synthetic("6.1.0-test")).unwrap();
    tree.add(&kernel, "kernel");
    tree.set_init(INIT);
    tree.pack(image);
}

/// Removes the directory and kills a QEMU that names it, even if this test is killed.
struct Guard(Child);

impl Guard {
    fn of(dir: &Path) -> Self {
        let mut guard = Command::new(program("kmorph-test-guard"));
        let started = guard.arg(dir).stdin(Stdio::piped()).spawn();
        Self(started.expect("the guard starts"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

struct Guest {
    qemu: Child,
    said: Receiver<String>,
}

impl Guest {
    fn boot(series: &str, image: &Path) -> Self {
        let mut qemu = Command::new("qemu-system-x86_64")
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-machine", "q35,usb=off", "-accel", "tcg", "-smp", "2"])
            .args(["-m", "768M", "-serial", "stdio"])
            .args(["-append", "console=ttyS0 quiet loglevel=1 panic=-1"])
            .arg("-kernel")
            .arg(kernels::debian(series))
            .arg("-initrd")
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU is installed");
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { qemu, said }
    }

    /// Returns the guest's whole output.
    fn lines(&mut self) -> Vec<String> {
        let begun = Instant::now();
        let mut lines = Vec::new();
        loop {
            let left = DEADLINE.saturating_sub(begun.elapsed());
            match self.said.recv_timeout(left) {
                Ok(line) => lines.push(line),
                Err(RecvTimeoutError::Disconnected) => return lines,
                Err(RecvTimeoutError::Timeout) => {
                    panic!(
                        "the guest has not ended in {DEADLINE:?}:\n{}",
                        lines.join("\n")
                    )
                }
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
