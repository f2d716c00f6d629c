//! Instances that die or hang are healed; instances that cannot be healed are left alone.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use kmorph_control_api::{
    HealthReport, HeartbeatStatus, InstanceState, RecoveryOutcome, RecoveryRecord,
};
use kmorph_tests::Host;
use kmorph_tests::resp::Client;
use kmp_proto::detector::OVERLOAD_SAMPLES;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use serde_json::json;

fn last_recovery(host: &Host, instance: &str) -> RecoveryRecord {
    let path = format!("/v1/recoveries?instance={instance}");
    host.control().wait("the recovery to end", || {
        let all: Vec<RecoveryRecord> = host.control().get(&path);
        all.into_iter()
            .next_back()
            .filter(|r| r.outcome != RecoveryOutcome::Running)
    })
}

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn a_killed_instance_comes_back_on_the_same_port() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    signal(host.agent("web"), Signal::SIGKILL);
    let now = host.successor_of("web", 1);
    assert_eq!((now.summary.generation, now.summary.recoveries), (2, 1));
    let record = last_recovery(&host, "web");
    assert_eq!(record.outcome, RecoveryOutcome::Recovered);
    assert!(
        record.evidence.iter().any(|e| e.contains("signal 9")),
        "{record:?}"
    );
    assert_eq!(record.fence.as_deref(), Some("processes_gone"));
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
}

/// Returns the locked memory of a process, KiB.
fn locked_kib(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with("VmLck:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn who_watches_and_who_answers_are_never_paged_out() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root may lock any amount of memory");
        return;
    }
    let host = Host::new();
    host.spawn_kv("web");
    assert!(locked_kib(host.daemon_pid()) > 0);
    let now = host.control().instance("web");
    assert!(locked_kib(now.processes["agent"]) > 0);
    let workload = std::fs::read_to_string(format!(
        "/proc/{0}/task/{0}/children",
        now.processes["agent"]
    ));
    let workload: i32 = workload.unwrap().trim().parse().unwrap();
    assert_eq!(locked_kib(workload), 0, "its memory is its own affair");
}

#[test]
fn a_connection_made_while_it_heals_is_not_refused() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    signal(host.agent("web"), Signal::SIGKILL);
    // At whatever moment the connection arrives, the daemon holds the socket.
    let mut client = Client::connect(port).unwrap();
    let answer = client.call(&["PING"]);
    // The connection may have reached the instance that died; then it fails, and the next one works.
    if answer.is_err() {
        host.successor_of("web", 1);
        assert_eq!(
            Client::connect(port).unwrap().call(&["PING"]).unwrap(),
            "PONG"
        );
    }
}

#[test]
fn a_hung_instance_is_judged_after_its_timeout_and_not_before() {
    let host = Host::new();
    host.spawn_kv("web");
    signal(host.agent("web"), Signal::SIGSTOP);
    host.successor_of("web", 1);
    let record = last_recovery(&host, "web");
    assert!(record.evidence[0].contains("silent for 1."), "{record:?}");
    assert!(
        record.evidence.iter().any(|e| e.contains("stopped")),
        "{record:?}"
    );
}

#[test]
fn a_pause_shorter_than_the_timeout_is_forgiven() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    signal(agent, Signal::SIGSTOP);
    host.control().wait("a suspicion", || {
        (host.control().instance("web").summary.state == InstanceState::Unresponsive).then_some(())
    });
    signal(agent, Signal::SIGCONT);
    host.control().wait("it to be well again", || {
        (host.control().instance("web").summary.state == InstanceState::Running).then_some(())
    });
    assert_eq!(host.agent("web"), agent);
    assert_eq!(host.control().instance("web").summary.recoveries, 0);
}

#[test]
fn an_instance_that_keeps_crashing_is_quarantined_and_recovers_when_asked() {
    let host = Host::new();
    host.spawn_bare("web");
    host.spawn_bare("db");
    let survivor = std::path::PathBuf::from(host.control().instance("db").run_dir);
    let detail = host.control().wait("quarantine", || {
        let now = host.control().instance("web");
        match now.summary.state {
            InstanceState::Quarantined => return Some(now),
            InstanceState::Running => {
                // The agent may be gone already.
                let _ = kill(Pid::from_raw(now.processes["agent"]), Signal::SIGKILL);
            }
            _ => {}
        }
        None
    });
    assert!(detail.reason.unwrap().contains("in a row"));
    // The survivors learn that no successor follows.
    host.control().wait("the last topology", || {
        let text = std::fs::read(survivor.join("topology.json")).ok()?;
        let told: serde_json::Value = serde_json::from_slice(&text).unwrap();
        (told["failed_instance"] == "web" && told["new_generation"] == 0).then_some(())
    });
    host.control()
        .succeed("POST", "/v1/instances/web/recover", None);
    let healed = host.control().instance("web");
    assert_eq!(healed.summary.state, InstanceState::Running, "{healed:?}");
}

#[test]
fn without_auto_heal_a_failed_instance_waits_for_its_operator() {
    let mut host = Host::new();
    host.spawn_bare("web");
    host.control()
        .set_policy("web", &json!({ "auto_heal": false }));
    signal(host.agent("web"), Signal::SIGKILL);
    host.control().wait("it to fail", || {
        (host.control().instance("web").summary.state == InstanceState::Failed).then_some(())
    });
    // The state shown is still on its way to the journal. Once this change is written, every earlier decision is as
    // well.
    host.control()
        .set_policy("web", &json!({ "auto_heal": false }));
    let before = host.control().instance("web");
    host.restart_by_kill();
    let after = host.control().instance("web");
    assert_eq!(after.summary.state, InstanceState::Failed, "{after:?}");
    assert_eq!(after.reason, before.reason);
    host.control()
        .succeed("POST", "/v1/instances/web/recover", None);
    assert_eq!(host.successor_of("web", 1).summary.generation, 2);
}

#[test]
fn a_fence_ends_what_the_workload_left_behind() {
    let host = Host::new();
    let script = host.path("daemonise.sh");
    let marker = host.path("escaped.pid");
    let text = format!(
        "#!/bin/sh\n(setsid env -i /bin/sh -c 'echo $$ > {0}; exec tail -f {0} >/dev/null' &)\nexec sleep 600\n",
        marker.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let body = json!({ "name": "web", "kernel": host.kernel("6.1.0-a"), "workload": { "program": script } });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let escaped = host.control().wait("the escaped process", || {
        std::fs::read_to_string(&marker)
            .ok()?
            .trim()
            .parse::<i32>()
            .ok()
    });
    signal(host.agent("web"), Signal::SIGKILL);
    host.successor_of("web", 1);
    // The certificate states the proof: the kernel's cgroup if available, otherwise scans.
    let log = host.log();
    assert!(
        log.contains("proof: cgroup_empty") || log.contains("proof: scans_empty"),
        "{log}"
    );
    // Gone, or an unreaped zombie; in either case, the process does not run any more.
    let stat = std::fs::read_to_string(format!("/proc/{escaped}/stat")).unwrap_or_default();
    assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
}

#[test]
fn survivors_are_told_the_new_topology() {
    let host = Host::new();
    host.spawn_bare("web");
    host.spawn_bare("db");
    let run_dir = std::path::PathBuf::from(host.control().instance("db").run_dir);
    signal(host.agent("web"), Signal::SIGKILL);
    host.successor_of("web", 1);
    let topology: serde_json::Value = host.control().wait("the topology", || {
        let text = std::fs::read(run_dir.join("topology.json")).ok()?;
        Some(serde_json::from_slice(&text).unwrap())
    });
    assert_eq!(topology["failed_instance"], "web");
    assert_eq!(topology["new_generation"], 2);
    let names: Vec<_> = topology["instances"]
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["name"].clone())
        .collect();
    assert_eq!(names, ["db", "web"]);
}

#[test]
fn a_workload_that_ends_is_started_again_by_its_agent() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    let agent = host.agent("web");
    let children = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
    let workload = children.split_whitespace().next().unwrap().parse().unwrap();
    signal(workload, Signal::SIGKILL);
    host.control().wait("another process", || {
        let now = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
        (!now.trim().is_empty() && now != children).then_some(())
    });
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
    assert_eq!(host.agent("web"), agent);
    // The kernel continued, but the data is lost: the failure is recorded and counted, with its cause.
    let recorded = host.control().wait("the failure to be recorded", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        all.into_iter().next()
    });
    assert_eq!(recorded.cause, "workload_failed");
    assert_eq!(
        (recorded.failed_generation, recorded.new_generation),
        (1, Some(1))
    );
    assert!(recorded.evidence[0].contains("signal: 9"), "{recorded:?}");
    assert_eq!(host.control().instance("web").summary.workload_failures, 1);
    let metrics = host.control().request("GET", "/metrics", None).body;
    let counted = "kmorph_instance_workload_failures_total{instance=\"web\"} 1";
    assert!(metrics.contains(counted), "{metrics}");
}

#[test]
fn one_that_is_being_recovered_can_be_terminated() {
    let host = Host::new();
    // A program that starts only once: the successor never becomes healthy, and its recovery lasts for the whole start
    // timeout.
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"), "workload": kmorph_tests::starts_once(),
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    signal(host.agent("web"), Signal::SIGKILL);
    host.control().wait("a recovery", || {
        let now = host.control().instance("web");
        let successor = now.summary.generation > 1 && now.processes.contains_key("agent");
        (successor && now.summary.state == InstanceState::Recovering).then_some(())
    });
    host.control().succeed("DELETE", "/v1/instances/web", None);
    let all: Vec<serde_json::Value> = host.control().get("/v1/instances");
    assert!(all.is_empty(), "{all:?}");
    assert!(!host.path("run/instances/web").exists());
}

/// An agent of `embedded` reports the pressure of the whole machine.
#[test]
fn what_the_whole_machine_suffers_makes_no_instance_degraded() {
    let host = Host::with_hostile_agents(
        "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": ["pressed"] },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    host.control().wait("many heartbeats", || {
        let now: HeartbeatStatus = host.control().get("/v1/instances/web/heartbeat");
        (now.answered > 4 * u64::from(OVERLOAD_SAMPLES)).then_some(())
    });
    let health: HealthReport = host.control().get("/v1/instances/web/health");
    assert_eq!(health.state, InstanceState::Running);
    assert_eq!(health.metrics.unwrap().cpu_pressure_percent, Some(100.0));
}

#[test]
fn without_monitoring_silence_is_not_judged_and_an_end_still_is() {
    let host = Host::new();
    for (name, monitor) in [("web", false), ("eye", true)] {
        let body = json!({
            "name": name, "kernel": host.kernel("6.1.0-a"), "monitor": monitor,
            "heartbeat_timeout_s": 0.5,
        });
        host.control().succeed("POST", "/v1/instances", Some(&body));
    }
    let shown = |name| -> HeartbeatStatus {
        host.control()
            .get(&format!("/v1/instances/{name}/heartbeat"))
    };
    assert!(!shown("web").monitored && shown("eye").monitored);
    let agent = host.agent("web");
    // A policy change does not start a watch either.
    host.control()
        .set_policy("web", &json!({ "heartbeat_timeout_s": 0.3 }));
    signal(agent, Signal::SIGSTOP);
    // After two recoveries of the watched instance, the other one would have been healed as well.
    for generation in 1..=2 {
        signal(host.running("eye").processes["agent"], Signal::SIGSTOP);
        host.successor_of("eye", generation);
    }
    let web = host.control().instance("web");
    assert_eq!((web.processes["agent"], web.summary.generation), (agent, 1));
    // The silence is shown, but has no consequence.
    assert_eq!(web.summary.state, InstanceState::Unresponsive, "{web:?}");
    signal(agent, Signal::SIGKILL);
    host.successor_of("web", 1);
    let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
    assert_eq!(all.len(), 1, "{all:?}");
    assert!(!shown("web").monitored, "nor is its successor watched");
}
