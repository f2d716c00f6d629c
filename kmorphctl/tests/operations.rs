//! Following long work: how it ends, and how the waiting ends before it.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::{Ended, FakeDaemon, Reply, command, operation, status};

/// Longest time for the program to do what it is about to do.
const DEADLINE: Duration = Duration::from_secs(30);

/// A daemon whose operation is under way when asked first and then becomes `end`.
fn ending(kind: &'static str, end: Value) -> FakeDaemon {
    FakeDaemon::start(move |request| {
        let line = request.line.as_str();
        if line.starts_with("GET /v1/operations/op-7?wait_ms=30000&seen=1") {
            Reply::ok(operation(kind, "running", 2))
        } else if line.starts_with("GET /v1/operations/op-7?wait_ms=30000&seen=2") {
            Reply::ok(end.clone())
        } else if line.starts_with("GET /v1/instances/web") {
            Reply::ok(status("web", "running"))
        } else {
            Reply::ok(operation(kind, "running", 1))
        }
    })
}

fn failed(kind: &str, code: &str) -> Value {
    let mut failed = operation(kind, "failed", 3);
    failed["error"] = json!({ "code": code, "message": "no luck", "next_step": "try less" });
    failed
}

#[test]
fn spawn_sends_what_was_typed_and_waits_until_the_instance_runs() {
    let daemon = ending("spawn", operation("spawn", "succeeded", 3));
    let ended = daemon.ctl(
        "spawn web --kernel=/boot/vmlinuz --kernel-cmdline=quiet --memory=1GiB --cpus=2 \
         --publish 127.0.0.1:6379:6379 --heartbeat-timeout=1 --env A=b --workload kmorph-kv \
         -- --port 6379",
    );
    assert_eq!(ended.code, 0, "{ended:?}");
    let wanted = "Instance: web (generation 2)\nRunning kernel: 6.9.0\n\
                  Published: 127.0.0.1:6379 -> 6379\n";
    assert_eq!(ended.stdout, wanted);
    assert_eq!(
        daemon.body("POST /v1/instances"),
        json!({
            "name": "web", "kernel": "/boot/vmlinuz", "kernel_cmdline": "quiet",
            "initramfs": null, "cpus": 2, "memory_bytes": 1_073_741_824u64,
            "workload": { "program": "kmorph-kv", "args": ["--port", "6379"],
                          "env": { "A": "b" } },
            "publish": [{ "address": "127.0.0.1", "host_port": 6379, "port": 6379 }],
            "monitor": true, "heartbeat_timeout_s": 1.0,
        })
    );
}

#[test]
fn a_program_without_a_path_is_looked_for_and_one_that_is_not_there_is_said_to() {
    let daemon = ending("spawn", operation("spawn", "succeeded", 3));
    let bin = daemon.dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let server = bin.join("server");
    std::fs::write(&server, "").unwrap();
    let spawn = || {
        let program = Path::new(env!("CARGO_BIN_EXE_kmorphctl"));
        let output = command(program, &daemon.socket())
            .env("PATH", format!("/nonexistent:{}", bin.display()))
            .args(["spawn", "web", "--kernel=/k", "--workload=server"])
            .output()
            .unwrap();
        support::Ended::of(&output)
    };
    let ended = spawn();
    assert_eq!(ended.code, 4, "not executable: {ended:?}");
    let looked = format!(
        "program \"server\" not found in PATH (/nonexistent:{})",
        bin.display()
    );
    assert!(ended.stderr.contains(&looked), "{ended:?}");
    assert!(daemon.lines().is_empty(), "the daemon was not asked");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&server, executable).unwrap();
    spawn();
    let body = daemon.body("POST /v1/instances");
    assert_eq!(body["workload"]["program"], json!(server));
}

#[test]
fn relative_paths_are_made_absolute_because_the_daemon_lives_elsewhere() {
    let daemon = ending("spawn", operation("spawn", "succeeded", 3));
    let program = Path::new(env!("CARGO_BIN_EXE_kmorphctl"));
    let output = command(program, &daemon.socket())
        .current_dir(daemon.dir.path())
        .args(["spawn", "web", "--kernel=vmlinuz", "--workload=./server"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let body = daemon.body("POST /v1/instances");
    let dir = daemon.dir.path().to_str().unwrap();
    assert_eq!(body["kernel"], json!(format!("{dir}/vmlinuz")));
    assert_eq!(body["workload"]["program"], json!(format!("{dir}/server")));
}

#[test]
fn a_failed_operation_ends_with_8_or_with_what_its_cause_says() {
    for (code, exit) in [
        ("internal", 8),
        ("wrong_state", 8),
        ("timeout", 8),
        ("insufficient_resources", 9),
        ("bad_kernel_image", 7),
        ("operator_action_needed", 12),
        ("journal_unavailable", 12),
    ] {
        let daemon = ending("spawn", failed("spawn", code));
        let ended = daemon.ctl("spawn web --kernel=/k");
        assert_eq!(ended.code, exit, "{code}");
        let wanted = "error: the spawn of web (op-7) failed: no luck\n  hint: try less\n";
        assert_eq!(ended.stderr, wanted);

        let ended = daemon.ctl("--output-format=json spawn web --kernel=/k");
        assert_eq!(
            (ended.code, &ended.json()["state"]),
            (exit, &json!("failed"))
        );
    }
}

#[test]
fn a_cancelled_operation_did_not_succeed() {
    let daemon = ending("recover", operation("recover", "cancelled", 3));
    let ended = daemon.ctl("recover web");
    assert_eq!(ended.code, 8);
    assert!(
        ended.stderr.contains("was cancelled and undone"),
        "{ended:?}"
    );
}

#[test]
fn not_waiting_prints_the_operation_and_how_to_follow_it() {
    let daemon = ending("terminate", operation("terminate", "succeeded", 3));
    let ended = daemon.ctl("terminate web --force --no-wait");
    assert_eq!(ended.code, 0);
    assert_eq!(ended.stdout, "Started: terminate of web as op-7\n");
    assert!(
        ended.stderr.contains("kmorphctl operation watch op-7"),
        "{ended:?}"
    );
    assert_eq!(daemon.lines(), ["DELETE /v1/instances/web?force=true"]);
}

/// A daemon whose operation never ends; `asked` is told each time somebody waits for it.
fn endless(asked: mpsc::Sender<()>) -> FakeDaemon {
    FakeDaemon::start(move |request| {
        if request.line.contains("wait_ms") {
            let _ = asked.send(());
            return Reply::Silence;
        }
        Reply::ok(operation("morph", "running", 1))
    })
}

#[test]
fn a_wait_that_takes_too_long_leaves_the_operation_running() {
    let (asked, _waits) = mpsc::channel();
    let daemon = endless(asked);
    let ended = daemon.ctl("morph web --kernel=/k --wait-timeout 0.2");
    assert_eq!(ended.code, 10);
    assert!(
        ended.stderr.contains("operation op-7 continues"),
        "{ended:?}"
    );
    assert!(
        ended.stderr.contains("kmorphctl operation watch op-7"),
        "{ended:?}"
    );
    assert!(!daemon.lines().iter().any(|line| line.contains("cancel")));
}

#[test]
fn ctrl_c_leaves_the_operation_running_and_says_how_to_watch_it() {
    let (asked, waits) = mpsc::channel();
    let daemon = endless(asked);
    let program = Path::new(env!("CARGO_BIN_EXE_kmorphctl"));
    let child = command(program, &daemon.socket())
        .args(["morph", "web", "--kernel=/k"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    waits.recv_timeout(DEADLINE).unwrap();
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let ended = Ended::of(&child.wait_with_output().unwrap());
    assert_eq!(ended.code, 130, "{ended:?}");
    assert!(
        ended.stderr.contains("operation op-7 continues"),
        "{ended:?}"
    );
    assert!(
        ended.stderr.contains("kmorphctl operation watch op-7"),
        "{ended:?}"
    );
    assert!(!daemon.lines().iter().any(|line| line.contains("cancel")));
}

#[test]
fn a_daemon_that_goes_away_meanwhile_is_not_taken_for_a_failed_operation() {
    let daemon = FakeDaemon::start(|request| {
        if request.line.contains("wait_ms") {
            return Reply::Raw(Vec::new());
        }
        Reply::ok(operation("morph", "running", 1))
    });
    let ended = daemon.ctl("morph web --kernel=/k");
    assert_eq!(ended.code, 3);
    assert!(
        ended.stderr.contains("while waiting for the morph of web"),
        "{ended:?}"
    );
    assert!(
        ended
            .stderr
            .contains("the daemon finishes or undoes it at its next start"),
        "{ended:?}"
    );
}

#[test]
fn watching_ends_as_the_command_that_began_it_would() {
    let daemon = ending("morph", failed("morph", "incompatible"));
    let ended = daemon.ctl("operation watch op-7");
    assert_eq!(ended.code, 8);
    assert!(
        ended
            .stderr
            .contains("the morph of web (op-7) failed: no luck"),
        "{ended:?}"
    );
}

fn morph(phase: &str) -> Value {
    let mut done = operation("morph", "succeeded", 3);
    done["result"] = json!({
        "instance": "web", "session": 1, "operation": "op-7", "phase": phase,
        "from_generation": 1, "to_generation": 2, "from_kernel": "6.8.0", "to_kernel": "6.9.0",
        "mode": "by_reference", "state_bytes": 4096, "sent_bytes": 0, "rounds": 0,
        "checks": [{ "name": "arena", "passed": true, "duration_us": 5, "detail": "whole" }],
        "downtime_budget_us": 10_000, "estimated_downtime_us": 2000,
        "downtime": { "freeze_us": 100, "final_delta_us": 200, "activate_us": 300,
                      "record_us": 400, "serve_us": 50, "total_us": 1050 },
        "reason": null, "started_at": "2026-01-31T08:00:00.000Z", "ended_at": null,
    });
    done
}

#[test]
fn the_status_of_a_morph_names_its_provider_and_why_the_others_are_not_used() {
    let daemon = FakeDaemon::start(|_| {
        let mut status = morph("committable")["result"].clone();
        status["provider"] = json!("cooperative");
        status["other_providers"] = json!([
            { "provider": "handover", "reason": "target kernel: no memory to map" },
            { "provider": "image", "reason": "possible, but cooperative is preferred" },
        ]);
        Reply::ok(status)
    });
    let shown = daemon.ctl("morph status web").stdout;
    let wanted = "\nState provider: cooperative\n\
                  Not used: handover: target kernel: no memory to map\n\
                  Not used: image: possible, but cooperative is preferred\n\
                  Transfer: by reference\n";
    assert!(shown.contains(wanted), "{shown}");
}

#[test]
fn a_morph_without_auto_commit_stops_validated_and_says_what_is_next() {
    let daemon = ending("morph", morph("committable"));
    let ended = daemon.ctl("morph web --kernel=/k --downtime-budget-ms 2.5");
    assert_eq!(ended.code, 0, "{ended:?}");
    let wanted = "Validation successful (health checks passed)\n  passed: arena (5 µs) whole\n\
                  Estimated downtime: 2.00 ms (budget 10.00 ms)\n";
    assert_eq!(ended.stdout, wanted);
    assert!(
        ended.stderr.contains("kmorphctl morph commit web"),
        "{ended:?}"
    );
    let body = daemon.body("POST /v1/instances/web/morph");
    assert_eq!(body["auto_validate"], json!(true));
    assert_eq!(body["auto_commit"], json!(false));
    assert_eq!(body["downtime_budget_us"], json!(2500));
}

#[test]
fn a_committed_morph_reports_its_downtime() {
    let daemon = ending("morph", morph("committed"));
    let ended = daemon.ctl("morph web --kernel=/k --auto-commit --force");
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(
        ended
            .stdout
            .starts_with("Morphed: web (generation 1 -> 2)\nRunning kernel: 6.9.0\n")
    );
    assert!(
        ended.stdout.contains("Downtime: 1.05 ms (freeze 100 µs"),
        "{ended:?}"
    );
    let body = daemon.body("POST /v1/instances/web/morph");
    assert_eq!(
        (&body["auto_commit"], &body["force"]),
        (&json!(true), &json!(true))
    );
}

#[test]
fn each_step_of_a_morph_asks_for_itself() {
    for (words, line) in [
        (
            "morph validate web",
            "POST /v1/instances/web/morph/validate",
        ),
        (
            "morph commit web --force",
            "POST /v1/instances/web/morph/commit",
        ),
        (
            "morph rollback web",
            "POST /v1/instances/web/morph/rollback",
        ),
        (
            "morph prepare web --kernel=/k",
            "POST /v1/instances/web/morph",
        ),
    ] {
        let daemon = ending("morph", morph("rolled_back"));
        assert_eq!(daemon.ctl(words).code, 0, "{words}");
        assert_eq!(daemon.lines()[0], line, "{words}");
    }
}

#[test]
fn a_capture_sends_an_absolute_path_and_says_what_there_is() {
    let mut end = operation("vmcore_capture", "succeeded", 3);
    end["result"] = json!({
        "name": "web", "generation": 2, "path": "/v/web.core", "bytes": 15_938_355,
        "not_filtered": null, "panic": null, "log_error": null, "frozen_ms": 152.6,
        "total_ms": 801.0,
    });
    let mut panicked = end.clone();
    panicked["result"]["frozen_ms"] = Value::Null;
    panicked["result"]["panic"] = json!("sysrq triggered crash");
    panicked["result"]["not_filtered"] = json!("it has no VMCOREINFO");
    for (end, said) in [
        (
            end,
            "Captured: /v/web.core (15.1 MiB)\nFrozen for: 152.6 ms\n",
        ),
        (
            panicked,
            "Captured: /v/web.core (15.1 MiB)\nNot frozen: web was not executing\n\
             Its kernel's log: sysrq triggered crash\n\
             Some pages that could have been left out are included: it has no VMCOREINFO\n",
        ),
    ] {
        let daemon = ending("vmcore_capture", end);
        let program = Path::new(env!("CARGO_BIN_EXE_kmorphctl"));
        let output = command(program, &daemon.socket())
            .current_dir(daemon.dir.path())
            .args(["vmcore", "capture", "web", "--output=web.core"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), said);
        let dir = daemon.dir.path().to_str().unwrap();
        let body = daemon.body("POST /v1/instances/web/vmcore");
        assert_eq!(body, json!({ "output": format!("{dir}/web.core") }));
    }
}

#[test]
fn a_capture_without_room_ends_with_9() {
    let daemon = ending("vmcore_capture", failed("vmcore_capture", "unavailable"));
    let ended = daemon.ctl("vmcore capture web --output=/v/web.core");
    assert_eq!(ended.code, 9, "{ended:?}");
    assert!(
        ended
            .stderr
            .contains("the vmcore capture of web (op-7) failed: no luck"),
        "{ended:?}"
    );
}

#[test]
fn the_last_self_test_is_told_and_ends_with_how_it_ended() {
    let report = json!({
        "ended_at": "2026-11-26T16:16:08.123Z", "passed": false, "reason": "no room",
        "kernel_path": "/boot/vmlinuz", "kernel_release": null, "panic": null,
        "vmcore_bytes": null, "cpus": null, "log_ms": 51.2, "captured_ms": null,
        "recovered_ms": null,
    });
    for (last, code, said) in [
        (Value::Null, 4, ""),
        (
            report,
            8,
            "no room\nImage: /boot/vmlinuz\nTo the log: 51.2 ms\n",
        ),
    ] {
        let daemon = FakeDaemon::start(move |_| {
            let mut status = support::daemon(7);
            status["last_doctor"] = last.clone();
            Reply::ok(status)
        });
        let ended = daemon.ctl("doctor --last");
        assert_eq!(ended.code, code, "{ended:?}");
        assert!(ended.stdout.ends_with(said), "{ended:?}");
    }
}
