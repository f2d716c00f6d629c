//! A failed spawn reports the reason at once, and leaves nothing behind.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::time::{Duration, Instant};

use kmorph_control_api::{ErrorCode, Operation, OperationState, RecoveryRecord};
use kmorph_tests::Host;
use serde_json::{Value, json};

/// Far below the 30 s that an instance has until its first healthy answer.
const AT_ONCE: Duration = Duration::from_secs(15);

fn spawn(host: &Host, workload: &Value) -> Operation {
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"), "workload": workload,
        "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": 6379 }],
    });
    host.control().operate("POST", "/v1/instances", Some(&body))
}

/// Asserts that no directory, row or recovery record is left, and that the name and the whole pool are free again.
fn nothing_is_left(host: &Host) {
    let all: Vec<Value> = host.control().get("/v1/instances");
    assert!(all.is_empty(), "{all:?}");
    assert!(!host.path("run/instances/web").exists());
    let recoveries: Vec<RecoveryRecord> = host.control().get("/v1/recoveries");
    assert!(recoveries.is_empty(), "{recoveries:?}");
    let pool: Value = host.control().get("/v1/daemon");
    assert_eq!(
        pool["pool"]["memory_free_bytes"],
        pool["pool"]["memory_bytes"]
    );
    let journal = rusqlite::Connection::open(host.path("state/journal.sqlite")).unwrap();
    for table in ["instance", "generation"] {
        let sql = format!("SELECT count(*) FROM {table}");
        let rows: i64 = journal.query_row(&sql, [], |row| row.get(0)).unwrap();
        assert_eq!(rows, 0, "{table}");
    }
}

#[test]
fn a_program_that_ends_before_the_instance_is_healthy_fails_the_spawn() {
    let mut host = Host::new();
    let programs = [
        (json!({ "program": "/bin/false" }), "exit status: 1"),
        (json!({ "program": "/bin/true" }), "ended by itself"),
        (
            json!({ "program": "/bin/sh", "args": ["-c", "echo no such database >&2; exit 7"] }),
            "exit status: 7",
        ),
        (
            json!({ "program": "/bin/sh", "args": ["-c", "kill -9 $$"] }),
            "signal: 9",
        ),
        (json!({ "program": "/etc/passwd" }), "Permission denied"),
    ];
    for (program, words) in programs {
        let begun = Instant::now();
        let ended = spawn(&host, &program);
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
        let error = ended.error.unwrap();
        assert_eq!(error.code, ErrorCode::StartFailed, "{error}");
        assert!(error.message.contains(words), "{words}: {error}");
        if words == "exit status: 7" {
            let hint = error.next_step.unwrap();
            assert!(hint.contains("no such database"), "{hint}");
        }
        nothing_is_left(&host);
    }
    host.restart_by_kill();
    nothing_is_left(&host);
    host.spawn_kv("web");
}

#[test]
fn a_spawn_that_fails_while_the_daemon_dies_leaves_nothing_either() {
    let mut host = Host::new();
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"), "workload": { "program": "/bin/false" },
    });
    for _ in 0..5 {
        let begun: Operation = host
            .control()
            .request("POST", "/v1/instances", Some(&body))
            .ok();
        host.control().wait("the spawn to be undone", || {
            let now: Operation = host.control().get(&format!("/v1/operations/{}", begun.id));
            let undone = now.state != OperationState::Running || now.progress.step == "fencing";
            undone.then_some(())
        });
        host.restart_by_kill();
        host.control().wait("it to be gone", || {
            let all: Vec<Value> = host.control().get("/v1/instances");
            all.is_empty().then_some(())
        });
        nothing_is_left(&host);
    }
}

#[test]
fn what_was_written_for_a_generation_that_does_not_start_is_removed() {
    let host = Host::prepare("[pool]\nshare_cpus = true\n");
    // The agent will be missing when it is needed; by then, the backend has written its configuration.
    let agent = host.path("agent");
    std::fs::copy(kmorph_tests::program("kmorph-agent"), &agent).unwrap();
    let config = std::fs::read_to_string(host.config_path()).unwrap();
    std::fs::write(host.config_path(), format!("{config}agent = {agent:?}\n")).unwrap();
    let mut host = host;
    host.start();
    std::fs::remove_file(&agent).unwrap();
    let body = json!({ "name": "web", "kernel": host.kernel("6.1.0-a") });
    let ended = host.control().operate("POST", "/v1/instances", Some(&body));
    let text = ended.error.unwrap().message;
    assert!(text.contains("No such file"), "{text}");
    nothing_is_left(&host);
}

#[test]
fn what_no_kernel_would_start_is_refused_with_what_is_allowed() {
    let host = Host::new();
    let kernel = host.kernel("6.1.0-a");
    let refusal = |workload: Value| {
        let body = json!({ "name": "web", "kernel": kernel, "workload": workload });
        host.control()
            .request("POST", "/v1/instances", Some(&body))
            .refusal()
    };
    let many = vec!["x"; 100_000];
    let error = refusal(json!({ "program": "/bin/sleep", "args": many }));
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    assert!(error.message.contains("takes 4096"), "{error}");
    let long = "x".repeat(200_000);
    let error = refusal(json!({ "program": "/bin/sleep", "env": { "A": long } }));
    assert!(error.message.contains("131071"), "{error}");
    let half = "x".repeat(100_000);
    let env = json!({ "A": half, "B": half, "C": half });
    let error = refusal(json!({ "program": "/bin/sleep", "env": env }));
    assert!(error.message.contains("196608"), "{error}");
    let error = refusal(json!({ "program": "/no/such/program" }));
    assert_eq!(error.code, ErrorCode::NotFound);
    assert!(error.message.contains("\"/no/such/program\""), "{error}");
    nothing_is_left(&host);
    // A valid request starts the instance.
    let env = json!({ "A": half });
    let ended = spawn(
        &host,
        &json!({ "program": "/bin/sleep", "args": ["1000"], "env": env }),
    );
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
}

#[test]
fn a_policy_that_the_backend_cannot_keep_is_refused() {
    let host = Host::new();
    host.spawn_bare("web");
    let patch = json!({ "vmcore": "on" });
    let refused = host
        .control()
        .request("PATCH", "/v1/instances/web/policy", Some(&patch));
    let set = json!({ "instance": { "web": {
        "heartbeat_timeout_s": 1.0, "auto_heal": true, "morph_timeout_s": 60.0, "vmcore": "required",
    } } });
    let import = host.control().request("PUT", "/v1/policies", Some(&set));
    for refused in [refused, import] {
        let error = refused.refusal();
        assert_eq!(error.code, ErrorCode::WrongState);
        assert!(error.message.contains("web: vmcore"), "{error}");
        assert!(
            error.message.contains("embedded captures no memory"),
            "{error}"
        );
    }
    let config = "[defaults]\nheartbeat_timeout_s = 1.0\nvmcore = \"on\"\n";
    host.configure(config);
    let error = host
        .control()
        .request("POST", "/v1/daemon/reload", None)
        .refusal();
    assert!(error.message.contains("defaults.vmcore"), "{error}");
    let other = Host::prepare(config);
    let said = other.refused_start(&["--check".as_ref()]);
    assert!(said.contains("line 3, column 10"), "{said}");
}
