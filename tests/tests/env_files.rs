//! `--env-file`: read at each start of a generation, present in the workload's environment, and absent from the
//! journal.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kmorph_control_api::{ErrorCode, InstanceState, InstanceStatus};
use kmorph_tests::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const FIRST: &str = "correct horse battery staple";
const SECOND: &str = "another value, = and all";

/// The host, and the files of a test.
struct Ground {
    host: Host,
    file: PathBuf,
    /// File into which the workload writes its value.
    told: PathBuf,
    spawn: Value,
}

impl Ground {
    fn new() -> Self {
        let host = Host::new();
        let (file, told) = (host.path("env"), host.path("told"));
        let kernel = host.kernel("6.1.0-test");
        let line = format!(
            "printf %s \"$PASSWORD\" >{0}.new && mv {0}.new {0}; exec sleep 3600",
            told.display()
        );
        let spawn = json!({
            "name": "web",
            "kernel": kernel,
            "workload": { "program": "/bin/sh", "args": ["-c", line], "env_file": file },
        });
        Self {
            host,
            file,
            told,
            spawn,
        }
    }

    fn write(&self, value: &str, mode: u32) {
        let _ = fs::remove_file(&self.file);
        fs::write(&self.file, format!("# the database\nPASSWORD={value}\n")).unwrap();
        fs::set_permissions(&self.file, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn wait_until_told(&self, value: &str) {
        self.host.control().wait(value, || {
            (fs::read_to_string(&self.told).ok()? == value).then_some(())
        });
    }

    fn kill(&self) -> InstanceStatus {
        let before = self.host.control().instance("web");
        kill(Pid::from_raw(before.processes["agent"]), Signal::SIGKILL).unwrap();
        before
    }
}

#[test]
fn it_is_read_at_each_start_and_kept_nowhere() {
    let ground = Ground::new();
    ground.write(FIRST, 0o600);
    let control = ground.host.control();
    control.succeed("POST", "/v1/instances", Some(&ground.spawn));
    ground.wait_until_told(FIRST);
    let shown = control.instance("web").workload.unwrap();
    assert_eq!(shown.env_file.as_deref(), ground.file.to_str());
    assert!(shown.env.is_empty());
    ground.write(SECOND, 0o600);
    ground.kill();
    ground.wait_until_told(SECOND);
    for secret in [FIRST, SECOND] {
        let keeping = files_with(&ground.host.path("state"), secret);
        assert!(keeping.is_empty(), "{secret:?} is in {keeping:?}");
    }
}

#[test]
fn a_start_without_a_good_file_fails_and_says_why() {
    let ground = Ground::new();
    let control = ground.host.control();
    ground.write(FIRST, 0o644);
    for (what, code) in [
        ("other users can read", ErrorCode::InvalidRequest),
        ("No such file", ErrorCode::NotFound),
    ] {
        let refused = control
            .request("POST", "/v1/instances", Some(&ground.spawn))
            .refusal();
        assert_eq!(refused.code, code);
        assert!(refused.message.contains(what), "{}", refused.message);
        assert!(!refused.message.contains(FIRST), "{}", refused.message);
        let _ = fs::remove_file(&ground.file);
    }
    let all: Vec<Value> = control.get("/v1/instances");
    assert!(all.is_empty(), "{all:?}");
    ground.write(FIRST, 0o600);
    control.succeed("POST", "/v1/instances", Some(&ground.spawn));
    ground.wait_until_told(FIRST);
    fs::remove_file(&ground.file).unwrap();
    ground.kill();
    // Recoveries fail until the quarantine; then the file exists again, and an operator starts the instance.
    let status = control.wait("a quarantine", || {
        let now = control.instance("web");
        (now.summary.state == InstanceState::Quarantined).then_some(now)
    });
    let reason = status.reason.unwrap_or_default();
    assert!(reason.contains("environment file"), "{reason}");
    ground.write(SECOND, 0o600);
    control.succeed("POST", "/v1/instances/web/recover", None);
    ground.wait_until_told(SECOND);
}

/// Returns the files below a directory that contain this text.
fn files_with(dir: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_with(&path, text));
        } else if let Ok(bytes) = fs::read(&path)
            && bytes
                .windows(text.len())
                .any(|part| part == text.as_bytes())
        {
            found.push(path);
        }
    }
    found
}
