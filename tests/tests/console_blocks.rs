//! Runs the console blocks of README and docs verbatim, against a daemon in a directory of its own, and compares the
//! output where a block shows output. Figures differ from run to run: a word with a digit matches any other word with a
//! digit.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kmorph_tests::{Host, program};

/// Blocks that are not run: page, first command, and reason.
const NOT_RUN: [(&str, &str, &str); 10] = [
    (
        "cli.md",
        "kmorphctl spawn web --kernel=/boot/vmlinuz-6.8.0",
        "is interrupted by Ctrl-C",
    ),
    (
        "cli.md",
        "kmorphctl status web",
        "shows a moment that cannot be held",
    ),
    (
        "kernels.md",
        "make new-kernel SUITE=sid",
        "fetches a kernel and takes ten minutes",
    ),
    (
        "multikernel.md",
        "kerf init --cpus=4-15 --memory=16GB",
        "needs a multikernel kernel",
    ),
    (
        "multikernel.md",
        "kerf kill web --force",
        "needs a multikernel kernel",
    ),
    (
        "operations.md",
        "apt install ./target/deb/kmorph-runtime_0.1.0_amd64.deb",
        "installs a package",
    ),
    (
        "vmcore.md",
        "kmorphctl policy set vmcore web on",
        "embedded captures no memory",
    ),
    (
        "vmcore.md",
        "kmorphctl vmcore capture web --output=web.core",
        "embedded captures no memory",
    ),
    (
        "vmcore.md",
        "kmorphctl doctor",
        "embedded captures no memory",
    ),
    (
        "vmcore.md",
        "kmorphctl vmcore analyze /var/crash/web.core",
        "needs that vmcore",
    ),
];

/// A command with the output that the page shows.
#[derive(Debug)]
struct Step {
    command: String,
    shown: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

/// Returns the blocks of a page.
fn blocks(page: &Path) -> Vec<Vec<Step>> {
    let text = std::fs::read_to_string(page).unwrap();
    let mut blocks = Vec::new();
    let mut open: Option<Vec<Step>> = None;
    for line in text.lines() {
        match &mut open {
            None if line == "```console" => open = Some(Vec::new()),
            None => {}
            Some(_) if line == "```" => blocks.extend(open.take()),
            Some(steps) => match line.strip_prefix("$ ").or(line.strip_prefix("# ")) {
                Some(command) => steps.push(Step {
                    command: command.to_owned(),
                    shown: Vec::new(),
                }),
                None => {
                    let step = steps.last_mut().expect("a block begins with a command");
                    step.shown.push(line.to_owned());
                }
            },
        }
    }
    assert!(open.is_none(), "{page:?} has a block without an end");
    blocks
}

/// Returns the blocks of a page that are run.
fn runnable(name: &str) -> Vec<Vec<Step>> {
    let page = match name {
        "README.md" => root().join(name),
        _ => root().join("docs").join(name),
    };
    let left_out = |steps: &Vec<Step>| {
        let first = &steps[0].command;
        NOT_RUN
            .iter()
            .any(|(page, command, _)| *page == name && command == first)
    };
    blocks(&page)
        .into_iter()
        .filter(|steps| !left_out(steps))
        .collect()
}

/// Environment in which a page's commands run.
struct Scene {
    host: Host,
    /// Port in place of the page's port.
    port: u16,
}

impl Scene {
    fn new() -> Self {
        let host =
            Host::prepare("[defaults]\nheartbeat_timeout_s = 30.0\n[pool]\nshare_cpus = true\n");
        let place = host.path("place");
        for dir in ["target", "scripts", "home", "kernels"] {
            std::fs::create_dir_all(place.join(dir)).unwrap();
        }
        let built = program("kmorphd").parent().unwrap().to_owned();
        std::os::unix::fs::symlink(built, place.join("target/release")).unwrap();
        let mut fetched = String::from("#!/bin/sh\n");
        for (series, release) in [
            ("6.1", "6.1.0-56-cloud-amd64"),
            ("6.12", "6.12.9-cloud-amd64"),
        ] {
            let image = host.kernel(release);
            fetched.push_str(&format!("echo {series} {release} {}\n", image.display()));
        }
        let script = place.join("scripts/fetch-kernels");
        std::fs::write(&script, fetched).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&script, executable).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        Self { host, port }
    }

    /// Replaces the page's paths and port by those of this scene.
    fn here(&self, text: &str) -> String {
        let place = self.host.path("place");
        text.replace("/srv/", &format!("{}/", place.display()))
            .replace("6379:6379", &format!("{}:6379", self.port))
            .replace("-p 6379", &format!("-p {}", self.port))
            .replace(
                "/boot/vmlinuz-",
                &format!("{}/vmlinuz-", self.host.path("").display()).replace("//", "/"),
            )
    }

    /// Replaces this scene's paths and port by the page's, which are those of a daemon that runs as root.
    fn there(&self, text: &str) -> String {
        let dir = self.host.path("").display().to_string();
        let dir = dir.trim_end_matches('/');
        text.replace(&format!("{dir}/run"), "/run/kmorph")
            .replace(&format!("{dir}/state"), "/var/lib/kmorph")
            .replace(&format!("{dir}/place"), "/srv")
            .replace(&format!("{dir}/vmlinuz-"), "/boot/vmlinuz-")
            .replace(&self.port.to_string(), "6379")
    }

    /// Runs the steps in one shell; returns the output and exit status of each.
    fn run(&self, steps: &[&Step]) -> Vec<(String, i32)> {
        let mark = "@@ended";
        let mut script = format!(
            "make() {{ :; }}\n\
             kmorphctl() {{\n\
               case \"$1 $2 $*\" in\n\
                 *--config=*) command kmorphctl \"$@\" ;;\n\
                 'daemon start '*) command kmorphctl \"$@\" --config={config} ;;\n\
                 'morph web '*) command kmorphctl \"$@\" --downtime-budget-ms=60000 ;;\n\
                 *) command kmorphctl \"$@\" ;;\n\
               esac\n\
             }}\n",
            config = self.host.config_path().display()
        );
        for step in steps {
            let command = self.here(&step.command);
            script.push_str(&format!(
                "{{ {command}\n}} 2>&1\nstatus=$?; echo; echo {mark} $status\n"
            ));
        }
        let place = self.host.path("place");
        let path = std::env::var("PATH").unwrap();
        let output = Command::new("bash")
            .args(["-c", &script])
            .current_dir(&place)
            .env_clear()
            .env(
                "PATH",
                format!("{}:{path}", place.join("target/release").display()),
            )
            .env("HOME", place.join("home"))
            .env("KMORPH_SOCKET", self.host.path("run/kmorphd.sock"))
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut ended = Vec::new();
        let mut written = String::new();
        for line in text.lines() {
            match line.strip_prefix(mark) {
                Some(status) => {
                    ended.push((self.there(&written), status.trim().parse().unwrap()));
                    written.clear();
                }
                None => written.push_str(&format!("{line}\n")),
            }
        }
        assert_eq!(ended.len(), steps.len(), "{text}\n{output:?}");
        ended
    }
}

/// Returns the words of a line, with every word that has a digit replaced by `N`, and without the units that follow.
fn shape(line: &str) -> Vec<&str> {
    const UNITS: [&str; 8] = ["s", "ms", "µs", "B", "KiB", "MiB", "GiB", "bytes"];
    let mut words = Vec::new();
    for word in line.split_whitespace() {
        // redis-cli prints quotes only on a terminal.
        let bare = word.trim_matches(|c: char| ",;()\"".contains(c));
        let number = bare.contains(|c: char| c.is_ascii_digit()) && !bare.starts_with('/');
        let unit = words.last() == Some(&"N") && UNITS.contains(&bare);
        match (number, unit) {
            (true, _) => words.push("N"),
            (_, true) => {}
            _ => words.push(bare),
        }
    }
    words
}

/// Returns true if `written` matches the page. A line `…` matches any number of lines.
fn agrees(shown: &[String], written: &str) -> bool {
    let written: Vec<_> = written.lines().filter(|l| !l.trim().is_empty()).collect();
    let mut rest = written.as_slice();
    let mut any = false;
    for line in shown.iter().filter(|line| !line.trim().is_empty()) {
        if line == "…" {
            any = true;
            continue;
        }
        let wanted = shape(line);
        let at = rest.iter().position(|line| shape(line) == wanted);
        match at {
            Some(at) if at == 0 || any => rest = &rest[at + 1..],
            _ => return false,
        }
        any = false;
    }
    any || rest.is_empty()
}

fn check(name: &str, prepare: impl FnOnce(&Scene)) {
    let scene = Scene::new();
    prepare(&scene);
    let blocks = runnable(name);
    let steps: Vec<&Step> = blocks.iter().flatten().collect();
    assert!(!steps.is_empty(), "{name} has nothing that is run");
    for step in &steps {
        // Creates the file that `cat` shows.
        if let Some(file) = step.command.strip_prefix("cat ") {
            let text = scene.here(&step.shown.join("\n"));
            std::fs::write(scene.host.path("place").join(file), text + "\n").unwrap();
        }
    }
    for (step, (written, status)) in steps.iter().zip(scene.run(&steps)) {
        let fails = step
            .shown
            .first()
            .is_some_and(|line| line.starts_with("error:"));
        let command = &step.command;
        assert_eq!(
            status != 0,
            fails,
            "{name}: {command} ended with {status}:\n{written}"
        );
        let shown = step.shown.join("\n");
        assert!(
            step.shown.is_empty() || agrees(&step.shown, &written),
            "{name}: {command} shows\n{shown}\n--- and writes\n{written}"
        );
    }
}

#[test]
fn the_commands_of_the_readme_do_what_it_says() {
    check("README.md", |_| {});
}

#[test]
fn the_commands_of_the_page_of_kmorphctl_do_what_it_says() {
    check("cli.md", |scene| {
        for release in ["6.8.0", "6.9.0"] {
            scene.host.kernel(release);
        }
        let place = scene.host.path("place");
        for dir in [
            ".local/share/bash-completion/completions",
            ".zfunc",
            ".config/fish/completions",
        ] {
            std::fs::create_dir_all(place.join("home").join(dir)).unwrap();
        }
        let policies = "[instance.web]\nheartbeat_timeout_s = 0.01\nauto_heal = true\nmorph_timeout_s = 60.0\n";
        std::fs::write(place.join("policies.toml"), policies).unwrap();
    });
}

#[test]
fn the_commands_of_the_page_on_operation_do_what_it_says() {
    check("operations.md", |scene| {
        let config = scene.host.config_path();
        let started = Command::new(program("kmorphctl"))
            .args(["daemon", "start", "--config"])
            .arg(&config)
            .env("KMORPH_SOCKET", scene.host.path("run/kmorphd.sock"))
            .output()
            .unwrap();
        assert!(started.status.success(), "{started:?}");
    });
}

#[test]
fn every_block_is_run_or_named_as_one_that_is_not() {
    let run = ["README.md", "cli.md", "operations.md"];
    let docs = std::fs::read_dir(root().join("docs")).unwrap().flatten();
    let pages = docs.map(|entry| entry.file_name().into_string().unwrap());
    for name in pages.filter(|name| name.ends_with(".md") && !run.contains(&name.as_str())) {
        let unnamed = runnable(&name);
        assert!(unnamed.is_empty(), "{name}: {unnamed:?}");
    }
    for (name, command, why) in NOT_RUN {
        let page = root().join("docs").join(name);
        let there = blocks(&page)
            .iter()
            .any(|steps| steps[0].command == command);
        assert!(there, "{name} has no block any more that {why}: {command}");
    }
}

#[test]
fn words_with_digits_are_alike_and_others_are_not() {
    let shown = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(agrees(
        &shown("Downtime: 3.01 ms (freeze 475 µs)"),
        "Downtime: 12 µs (freeze 1.5 ms)\n"
    ));
    assert!(agrees(&shown("a 1\n…\nz"), "a 2\nb\nc\nz\n"));
    assert!(!agrees(&shown("a 1\nz"), "a 2\nb\nz\n"));
    assert!(!agrees(&shown("a 1"), "a 2\nmore\n"));
    assert!(!agrees(&shown("a 1\nz"), "a 2\n"));
}
