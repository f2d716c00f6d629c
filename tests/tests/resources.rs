//! The pool assigns, takes back and refuses resources, and instances run on the resources assigned to them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::Path;

use kmorph_control_api::{DaemonStatus, ErrorCode, RecoveryOutcome, RecoveryRecord, ReloadReport};
use kmorph_tests::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Memory of one instance, bytes; the pool has slightly more than twice as much.
const INSTANCE_BYTES: u64 = 64 << 20;
const POOL: &str =
    "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nmemory_mib = 150\n";

fn request(host: &Host, name: &str) -> Value {
    let kernel = host.kernel("6.1.0-a");
    json!({ "name": name, "kernel": kernel, "memory_bytes": INSTANCE_BYTES })
}

fn spawn(host: &Host, name: &str) {
    let body = request(host, name);
    host.control().succeed("POST", "/v1/instances", Some(&body));
}

/// Asserts that the pool lacks the resources for a request.
fn refused(host: &Host, path: &str, body: &Value) {
    let error = host.control().request("POST", path, Some(body)).refusal();
    assert_eq!(error.code, ErrorCode::InsufficientResources, "{error:?}");
}

#[test]
fn a_spawn_and_a_morph_that_the_pool_cannot_give_are_refused() {
    let host = Host::with(POOL);
    spawn(&host, "a");
    spawn(&host, "b");
    refused(&host, "/v1/instances", &request(&host, "c"));
    let morph = json!({ "kernel": host.kernel("6.12.0-b"), "auto_validate": true });
    refused(&host, "/v1/instances/a/morph", &morph);
    assert_eq!(host.running("a").summary.generation, 1);
    // Another instance can use the resources of a terminated one.
    host.control()
        .succeed("DELETE", "/v1/instances/b?force=true", None);
    spawn(&host, "c");
    host.control()
        .succeed("DELETE", "/v1/instances/c?force=true", None);
    host.control()
        .succeed("POST", "/v1/instances/a/morph", Some(&morph));
}

#[test]
fn a_cpu_that_is_not_shared_is_given_once() {
    let host = Host::with("[pool]\ncpus = [0]\nshare_memory = true\nmemory_mib = 65536\n");
    spawn(&host, "a");
    refused(&host, "/v1/instances", &request(&host, "b"));
    let two = json!({ "name": "b", "kernel": host.kernel("6.1.0-a"), "cpus": 2 });
    refused(&host, "/v1/instances", &two);
    let now: DaemonStatus = host.control().get("/v1/daemon");
    assert_eq!(now.instances, 1, "a name that was refused is free");
    host.control()
        .succeed("DELETE", "/v1/instances/a?force=true", None);
    spawn(&host, "b");
}

#[test]
fn a_recovery_uses_what_the_failed_generation_had() {
    let host = Host::with(POOL);
    spawn(&host, "a");
    spawn(&host, "b");
    for generation in 1..4 {
        kill(Pid::from_raw(host.agent("a")), Signal::SIGKILL).unwrap();
        host.successor_of("a", generation);
    }
    refused(&host, "/v1/instances", &request(&host, "c"));
}

#[test]
fn an_instance_is_confined_to_its_cpus_and_its_memory() {
    let host = Host::with(POOL);
    spawn(&host, "a");
    let now = host.control().instance("a");
    let proc = Path::new("/proc").join(host.agent("a").to_string());
    let status = std::fs::read_to_string(proc.join("status")).unwrap();
    let allowed = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .unwrap();
    assert_eq!(now.summary.cpus.len(), 1);
    assert_eq!(allowed.trim(), now.summary.cpus[0].to_string());
    let limits = std::fs::read_to_string(proc.join("limits")).unwrap();
    let data = limits
        .lines()
        .find(|line| line.starts_with("Max data size"))
        .unwrap();
    assert!(data.contains(&INSTANCE_BYTES.to_string()), "{data}");
}

#[test]
fn so_many_recoveries_run_at_once_and_no_more() {
    const INSTANCES: usize = 4;
    let host = Host::with(
        "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n\
         [limits]\nrecoveries = 1\n",
    );
    let names: Vec<_> = (0..INSTANCES).map(|n| format!("i{n}")).collect();
    names.iter().for_each(|name| spawn(&host, name));
    for name in &names {
        kill(Pid::from_raw(host.agent(name)), Signal::SIGKILL).unwrap();
    }
    let records = host.control().wait("every recovery to end", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries");
        let ended = |r: &RecoveryRecord| r.outcome == RecoveryOutcome::Recovered;
        (all.len() == INSTANCES && all.iter().all(ended)).then_some(all)
    });
    // Timestamps in one format, whose text order is the order of time.
    let mut spans: Vec<_> = records
        .iter()
        .map(|r| (r.started_at.clone(), r.ended_at.clone().unwrap()))
        .collect();
    spans.sort();
    for pair in spans.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "two at once: {pair:?}");
    }
}

#[test]
fn a_reload_changes_the_pool() {
    let host = Host::with(POOL);
    spawn(&host, "a");
    spawn(&host, "b");
    refused(&host, "/v1/instances", &request(&host, "c"));
    host.configure(&POOL.replace("150", "300"));
    let report: ReloadReport = host
        .control()
        .request("POST", "/v1/daemon/reload", None)
        .ok();
    assert_eq!(report.applied, ["pool.memory_mib"]);
    spawn(&host, "c");
    host.configure(&POOL.replace("150", "400"));
    kill(Pid::from_raw(host.daemon_pid()), Signal::SIGHUP).unwrap();
    host.control().wait("the signal to be heeded", || {
        let now: DaemonStatus = host.control().get("/v1/daemon");
        (now.pool.memory_bytes == 400 << 20).then_some(())
    });
}
