//! The stop of the daemon: at once, or after the operations in progress.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use kmorph_control_api::{DaemonStatus, ErrorCode, InstanceState, Operation, OperationState};
use kmorph_tests::{Host, program};
use serde_json::json;

/// Starts a daemon with a spawn in progress: its agent answers once the returned file exists.
fn spawning() -> (Host, Operation, PathBuf) {
    let host = Host::with_hostile_agents(
        "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    let ready = host.path("ready");
    let body = json!({
        "name": "late", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": ["late", ready] },
    });
    let begun = host.control().request("POST", "/v1/instances", Some(&body));
    (host, begun.ok(), ready)
}

fn stop(host: &Host, words: &[&str]) -> Child {
    let mut command = Command::new(program("kmorphctl"));
    command
        .args(["daemon", "stop"])
        .args(words)
        .env("KMORPH_SOCKET", host.path("run/kmorphd.sock"));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.spawn().unwrap()
}

fn operation(host: &Host, id: &str) -> Operation {
    host.control().get(&format!("/v1/operations/{id}"))
}

#[test]
fn a_graceful_stop_lets_what_is_under_way_end_and_begins_nothing() {
    let (mut host, spawn, ready) = spawning();
    let mut stopping = stop(&host, &["--graceful"]);
    host.control().wait("the daemon to be stopping", || {
        let now: DaemonStatus = host.control().get("/v1/daemon");
        now.stopping.then_some(())
    });
    let body = json!({ "name": "more", "kernel": host.kernel("6.1.0-a") });
    let refused = host.control().request("POST", "/v1/instances", Some(&body));
    let refused = refused.refusal();
    assert_eq!(refused.code, ErrorCode::Busy);
    assert!(refused.message.contains("stopping"), "{refused:?}");
    assert!(stopping.try_wait().unwrap().is_none(), "it did not wait");
    assert_eq!(operation(&host, &spawn.id).state, OperationState::Running);
    std::fs::write(&ready, "").unwrap();
    assert!(host.daemon_ended().success());
    assert!(stopping.wait().unwrap().success());
    host.start();
    let ended = operation(&host, &spawn.id);
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    assert_eq!(host.running("late").summary.generation, 1);
}

#[test]
fn another_stop_waits_for_nothing_and_what_was_begun_runs_on() {
    let (mut host, spawn, ready) = spawning();
    let agent = host.control().wait("its process", || {
        let reply = host.control().request("GET", "/v1/instances/late", None);
        let now: kmorph_control_api::InstanceStatus = (reply.status == 200).then(|| reply.ok())?;
        now.processes.get("agent").copied()
    });
    assert!(stop(&host, &[]).wait().unwrap().success());
    assert!(host.daemon_ended().success());
    host.start();
    let ended = operation(&host, &spawn.id);
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let now = host.control().instance("late");
    assert_eq!(now.summary.state, InstanceState::Starting);
    std::fs::write(&ready, "").unwrap();
    assert_eq!(host.running("late").processes["agent"], agent);
}
