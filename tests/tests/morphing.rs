//! Morphs of a live instance, and the failures that may occur in a morph.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use kmorph_control_api::{
    ErrorCode, EventKind, InstanceState, MorphPhase, MorphStatus, OperationState,
};
use kmorph_tests::resp::{Client, Steady};
use kmorph_tests::{Events, Host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const MORPH: &str = "/v1/instances/web/morph";

fn prepare(host: &Host) {
    let body = json!({ "kernel": host.kernel("6.12.0-b"), "auto_validate": false });
    host.control().succeed("POST", MORPH, Some(&body));
}

fn validate(host: &Host) {
    host.control()
        .succeed("POST", &format!("{MORPH}/validate"), None);
}

fn commit(host: &Host) -> kmorph_control_api::Operation {
    host.control().operate(
        "POST",
        &format!("{MORPH}/commit"),
        Some(&json!({ "force": true })),
    )
}

fn serves(port: u16, key: &str, value: &str) {
    assert_eq!(
        Client::connect(port).unwrap().call(&["GET", key]).unwrap(),
        value
    );
}

#[test]
fn a_client_keeps_its_connection_and_its_data() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    let mut client = Client::connect(port).unwrap();
    client.call(&["SET", "k", "v"]).unwrap();
    let steady = Steady::start(port, Duration::from_millis(1));
    for (count, release) in ["6.12.0-b", "6.12.1-c", "6.12.2-d"].iter().enumerate() {
        let ended = host.control().morph("web", &host.kernel(release));
        assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
        let now = host.control().instance("web");
        assert_eq!(now.summary.kernel_release, *release);
        assert_eq!(now.summary.generation, count as u64 + 2);
    }
    let seen = steady.stop();
    assert_eq!((seen.failed, seen.wrong), (0, 0), "{seen:?}");
    assert!(seen.answered > 0);
    assert_eq!(client.call(&["GET", "k"]).unwrap(), "v");
}

#[test]
fn new_connections_are_never_refused_while_it_is_morphed() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    let over = AtomicBool::new(false);
    let [answered, refused] = [(); 2].map(|()| AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                let answer = Client::connect(port).and_then(|mut client| client.call(&["PING"]));
                let count = if answer.is_ok() { &answered } else { &refused };
                count.fetch_add(1, Relaxed);
            }
        });
        for release in ["6.12.0-b", "6.12.1-c", "6.12.2-d"] {
            let ended = host.control().morph("web", &host.kernel(release));
            assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
        }
        over.store(true, Relaxed);
    });
    assert_eq!(refused.load(Relaxed), 0);
    assert!(answered.load(Relaxed) > 0);
}

/// Returns the process of this name in the generation that runs from `run_dir`.
fn process_of(run_dir: &Path, name: &str) -> Pid {
    let wanted = run_dir.as_os_str().as_encoded_bytes();
    let found = std::fs::read_dir("/proc").unwrap().flatten().find(|entry| {
        let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
        let environ = read("environ");
        read("comm").trim_ascii_end() == name.as_bytes()
            && environ.windows(wanted.len()).any(|part| part == wanted)
    });
    let pid = found.unwrap().file_name().to_str().unwrap().parse();
    Pid::from_raw(pid.unwrap())
}

#[test]
fn a_phase_that_takes_too_long_is_rolled_back_from() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    host.control()
        .set_policy("web", &json!({ "morph_timeout_s": 1.0 }));
    prepare(&host);
    let new = process_of(&host.path("run/instances/web/2"), "kmorph-kv");
    kill(new, Signal::SIGSTOP).unwrap();
    let ended = host
        .control()
        .operate("POST", &format!("{MORPH}/validate"), None);
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let now = host.control().wait("the source kernel to serve alone", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Running).then_some(now)
    });
    assert_eq!(now.summary.generation, 1);
    serves(port, "k", "v");
}

#[test]
fn in_rounds_the_data_is_copied_while_it_changes() {
    let host = Host::in_rounds();
    let port = host.spawn_kv("web");
    let mut client = Client::connect(port).unwrap();
    let value = "x".repeat(100_000);
    for key in 0..100 {
        client.call(&["SET", &format!("k{key}"), &value]).unwrap();
    }
    let writer = Steady::start(port, Duration::from_micros(200));
    let ended = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    let result: MorphStatus = serde_json::from_value(ended.result.unwrap()).unwrap();
    assert_eq!(result.mode.as_deref(), Some("rounds"));
    assert!(
        result.sent_bytes >= 10_000_000 && result.rounds >= 2,
        "{result:?}"
    );
    // The client's connection breaks once, with an error.
    host.control().wait("the client to go on", || {
        let connected = Client::connect(port).unwrap().call(&["PING"]).is_ok();
        connected.then_some(())
    });
    let seen = writer.stop();
    assert!(seen.failed <= 1 && seen.wrong == 0, "{seen:?}");
    let mut client = Client::connect(port).unwrap();
    for key in 0..100 {
        assert_eq!(client.call(&["GET", &format!("k{key}")]).unwrap(), value);
    }
}

#[test]
fn in_rounds_a_rollback_keeps_what_was_written_meanwhile() {
    let host = Host::in_rounds();
    let port = host.spawn_kv("web");
    let mut client = Client::connect(port).unwrap();
    client.call(&["SET", "k", "1"]).unwrap();
    prepare(&host);
    client.call(&["SET", "k", "2"]).unwrap();
    validate(&host);
    client.call(&["SET", "k", "3"]).unwrap();
    host.control()
        .succeed("POST", &format!("{MORPH}/rollback"), None);
    assert_eq!(client.call(&["GET", "k"]).unwrap(), "3");
    let ended = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    serves(port, "k", "3");
}

#[test]
fn a_prepared_morph_waits_longer_than_a_phase_may_take() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    host.control()
        .set_policy("web", &json!({ "morph_timeout_s": 4.0 }));
    prepare(&host);
    let prepared = Instant::now();
    host.control().wait("the time of a phase to pass", || {
        (prepared.elapsed() > Duration::from_secs(5)).then_some(())
    });
    validate(&host);
    let ended = commit(&host);
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    serves(port, "k", "v");
}

#[test]
fn a_validated_morph_expires() {
    let host = Host::with(
        "[morph]\nexpiry_s = 1.0\n[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\n\
         share_memory = true\nmemory_mib = 65536\n",
    );
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    let body = json!({ "kernel": host.kernel("6.12.0-b"), "auto_validate": true });
    host.control().succeed("POST", MORPH, Some(&body));
    let status: MorphStatus = host.control().get(MORPH);
    assert!(status.expires_at.is_some(), "{status:?}");
    host.control().wait("the morph to expire", || {
        (host.control().request("GET", MORPH, None).status == 404).then_some(())
    });
    assert_eq!(host.running("web").summary.generation, 1);
    serves(port, "k", "v");
}

#[test]
fn a_morph_that_is_begun_without_a_budget_has_that_of_the_configuration() {
    let host = Host::with(
        "[morph]\ndowntime_budget_ms = 0.001\n[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\n\
         share_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    host.spawn_kv("web");
    let begin = |budget: serde_json::Value| {
        let kernel = host.kernel("6.12.0-b");
        let body = json!({
            "kernel": kernel, "auto_validate": true, "auto_commit": true, "downtime_budget_us": budget,
        });
        host.control().operate("POST", MORPH, Some(&body))
    };
    let error = begin(serde_json::Value::Null).error.unwrap();
    assert_eq!(error.code, ErrorCode::OverBudget, "{error:?}");
    assert!(error.message.contains("1µs"), "{error:?}");
    let ended = begin(json!(60_000_000));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
}

#[test]
fn a_morph_that_nobody_decides_about_is_rolled_back_when_it_is_over_its_budget() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    let body = json!({
        "kernel": host.kernel("6.12.0-b"), "auto_validate": true, "auto_commit": true,
        "downtime_budget_us": 1,
    });
    let ended = host.control().operate("POST", MORPH, Some(&body));
    let error = ended.error.unwrap();
    assert_eq!(error.code, ErrorCode::OverBudget, "{error:?}");
    assert!(error.message.contains("rolled back"), "{error:?}");
    assert_eq!(host.running("web").summary.generation, 1);
    serves(port, "k", "v");
    // An operator decides step by step, and may change the budget.
    let body = json!({
        "kernel": host.kernel("6.12.0-b"), "auto_validate": true, "downtime_budget_us": 1,
    });
    host.control().succeed("POST", MORPH, Some(&body));
    let path = format!("{MORPH}/commit");
    let refused = host.control().operate("POST", &path, Some(&json!({})));
    assert_eq!(refused.error.unwrap().code, ErrorCode::OverBudget);
    let larger = json!({ "downtime_budget_us": 60_000_000 });
    host.control().succeed("POST", &path, Some(&larger));
    serves(port, "k", "v");
}

#[test]
fn an_instance_is_ended_by_force_in_the_middle_of_a_morph() {
    let host = Host::new();
    host.spawn_kv("web");
    prepare(&host);
    let path = "/v1/instances/web";
    let refused = host.control().request("DELETE", path, None).refusal();
    assert_eq!(refused.code, ErrorCode::WrongState);
    host.control()
        .succeed("DELETE", &format!("{path}?force=true"), None);
    let left = std::fs::read_dir(host.path("run/instances"))
        .unwrap()
        .count();
    assert_eq!(left, 0, "neither side is left");
}

#[test]
fn step_by_step_each_step_waits_for_the_next() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "1"])
        .unwrap();
    prepare(&host);
    let early = host
        .control()
        .request("POST", &format!("{MORPH}/commit"), Some(&json!({})));
    assert_eq!(early.refusal().code, ErrorCode::WrongState);
    validate(&host);
    let status: MorphStatus = host.control().get(MORPH);
    assert_eq!(status.phase, MorphPhase::Committable);
    assert!(status.checks.iter().all(|c| c.passed) && !status.checks.is_empty());
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "2"])
        .unwrap();
    assert_eq!(commit(&host).state, OperationState::Succeeded);
    serves(port, "k", "2");
    assert_eq!(host.control().instance("web").summary.morphs, 1);
}

#[test]
fn a_rollback_leaves_the_old_kernel_serving() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    prepare(&host);
    validate(&host);
    host.control()
        .succeed("POST", &format!("{MORPH}/rollback"), None);
    let now = host.control().instance("web");
    assert_eq!(
        (now.summary.generation, now.summary.state),
        (1, InstanceState::Running)
    );
    assert_eq!(now.summary.kernel_release, "6.1.0-a");
    serves(port, "k", "v");
    // The target leaves nothing behind, and another morph may follow.
    let ended = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    serves(port, "k", "v");
}

#[test]
fn a_second_morph_is_refused_while_one_is_under_way() {
    let host = Host::new();
    host.spawn_kv("web");
    prepare(&host);
    let body = json!({ "kernel": host.kernel("6.12.0-b") });
    let refusal = host.control().request("POST", MORPH, Some(&body)).refusal();
    assert_eq!(refusal.code, ErrorCode::WrongState);
}

#[test]
fn a_new_kernel_that_dies_is_rolled_back_from() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    prepare(&host);
    let run_dir = host.path("run/instances/web/2");
    let pid = agent_below(&run_dir);
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let now = host.control().wait("the rollback", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Running).then_some(now)
    });
    assert_eq!(now.summary.generation, 1);
    serves(port, "k", "v");
}

#[test]
fn an_old_kernel_that_dies_before_the_commit_is_recovered() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    prepare(&host);
    let pid = agent_below(&host.path("run/instances/web/1"));
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let now = host.successor_of("web", 2);
    assert_eq!(now.summary.kernel_release, "6.1.0-a");
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
}

#[test]
fn the_end_of_the_old_kernel_is_no_failure() {
    let host = Host::new();
    host.spawn_kv("web");
    let events = Events::follow(host.control());
    let ended = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    events.wait("the end of the morph", |event| {
        assert_ne!(event.kind, EventKind::Detector, "{event:?}");
        event.kind == EventKind::InstanceState && event.message == "running"
    });
}

#[test]
fn a_bare_instance_morphs_too() {
    let host = Host::new();
    host.spawn_bare("web");
    let ended = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    assert_eq!(
        host.control().instance("web").summary.kernel_release,
        "6.12.0-b"
    );
}

#[test]
fn a_workload_that_takes_no_part_keeps_its_kernel_and_the_reason_is_told() {
    let host = Host::new();
    let body: Value = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/sleep", "args": ["600"] },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let ended = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert_eq!(ended.state, OperationState::Failed);
    let error = ended.error.unwrap();
    for said in [
        "does not support morphs",
        "the source offers none, the target none",
    ] {
        assert!(error.message.contains(said), "{error:?}");
    }
    assert_eq!(error.code, ErrorCode::Incompatible);
    let morph: MorphStatus = serde_json::from_value(ended.result.unwrap()).unwrap();
    assert_eq!(morph.provider, None);
    let [other] = &morph.other_providers[..] else {
        panic!("{morph:?}");
    };
    assert_eq!(other.provider, "cooperative");
    assert!(other.reason.contains("source kernel: "), "{other:?}");
    assert!(other.reason.contains("target kernel: "), "{other:?}");
    let now = host.control().instance("web");
    assert_eq!(
        (now.summary.generation, now.summary.state),
        (1, InstanceState::Running)
    );
}

/// Returns the agent that was started with the configuration in `run_dir`.
fn agent_below(run_dir: &std::path::Path) -> i32 {
    let config = run_dir.join("agent.json");
    let wanted = config.as_os_str().as_encoded_bytes();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_str().unwrap_or("").parse::<i32>() else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.split(|b| *b == 0).any(|word| word == wanted) {
            return pid;
        }
    }
    panic!("no agent runs from {run_dir:?}");
}
