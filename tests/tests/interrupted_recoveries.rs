//! A recovery interrupted by the death of the daemon: the next daemon finishes the recovery on its own, even if an
//! operator requested it.
//!
//! Requires a debug build of the daemon: a release build cannot be made to die at an exact step.

#![cfg(debug_assertions)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};

use kmorph_control_api::{InstanceState, InstanceStatus, RecoveryOutcome, RecoveryRecord};
use kmorph_tests::{DEADLINE, Host, kernels};
use kmorph_vmcore::{Completeness, Dump};
use kmp_proto::recovery::CRASH_LOOP_FAILURES;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

const RECOVER: &str = "/v1/instances/web/recover";

fn in_state(host: &Host, state: InstanceState) -> InstanceStatus {
    host.control().wait("the state to change", || {
        let now = host.control().instance("web");
        (now.summary.state == state).then_some(now)
    })
}

fn end_agent(host: &Host) {
    kill(Pid::from_raw(host.agent("web")), Signal::SIGKILL).unwrap();
}

fn ask_to_recover(host: &Host) {
    // The daemon may die before it answers.
    let _ = host.control().try_request("POST", RECOVER, None);
}

fn last_recovery(host: &Host) -> RecoveryRecord {
    host.control().wait("the recovery to end", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        let last = all.into_iter().next_back();
        last.filter(|record| record.outcome != RecoveryOutcome::Running)
    })
}

#[test]
fn a_recovery_that_an_operator_asked_for_goes_on_from_every_step() {
    let mut host = Host::new();
    host.spawn_bare("web");
    // Without a request, the daemon leaves a failed instance alone.
    let patch = json!({ "auto_heal": false });
    host.control().set_policy("web", &patch);
    for step in ["Fence", "Reclaim", "Respawn"] {
        end_agent(&host);
        let failed = in_state(&host, InstanceState::Failed).summary.generation;
        let died = host.die_before(step, DEADLINE, ask_to_recover);
        assert!(died, "the recovery did not come to {step}");
        host.start();
        host.successor_of("web", failed);
        assert_eq!(last_recovery(&host).cause, "operator", "{step}");
    }
    // A running instance is replaced as well.
    let before = host.running("web").summary.generation;
    assert!(host.die_before("Fence", DEADLINE, ask_to_recover));
    host.start();
    host.successor_of("web", before);
}

#[test]
fn a_recovery_that_waits_for_its_turn_is_not_forgotten() {
    let config = "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\n\
                  share_memory = true\nmemory_mib = 65536\n[limits]\nrecoveries = 1\n";
    let mut host = Host::with(config);
    // The successor of `slow` never becomes healthy, so its recovery occupies the only slot.
    let body = json!({
        "name": "slow", "kernel": host.kernel("6.1.0-a"), "workload": kmorph_tests::starts_once(),
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    host.spawn_bare("web");
    let patch = json!({ "auto_heal": false });
    host.control().set_policy("web", &patch);
    end_agent(&host);
    in_state(&host, InstanceState::Failed);
    kill(Pid::from_raw(host.agent("slow")), Signal::SIGKILL).unwrap();
    host.control().wait("the turn to be taken", || {
        let now = host.control().instance("slow").summary;
        (now.state == InstanceState::Recovering && now.generation > 1).then_some(())
    });
    let accepted = host.control().request("POST", RECOVER, None);
    assert_eq!(accepted.status, 202, "{accepted:?}");
    assert_eq!(host.control().instance("web").summary.generation, 1);
    host.restart_by_kill();
    host.control().succeed("DELETE", "/v1/instances/slow", None);
    host.successor_of("web", 1);
}

/// The successor runs when the daemon dies, but only becomes healthy under the next daemon.
#[test]
fn a_recovery_whose_successor_is_adopted_is_told_as_recovered() {
    let mut host = Host::with_hostile_agents(
        "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    let ready = host.path("ready");
    std::fs::write(&ready, "").unwrap();
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": ["late", ready] },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    std::fs::remove_file(&ready).unwrap();
    end_agent(&host);
    host.control().wait("the successor", || {
        let now = host.control().instance("web").summary;
        (now.state == InstanceState::Recovering && now.generation == 2).then_some(())
    });
    host.restart_by_kill();
    let now = host.control().instance("web");
    assert_eq!(now.summary.state, InstanceState::Starting, "{now:?}");
    let log = || -> Vec<RecoveryRecord> { host.control().get("/v1/recoveries?instance=web") };
    assert_eq!(log()[0].outcome, RecoveryOutcome::Running);
    std::fs::write(&ready, "").unwrap();
    assert_eq!(host.running("web").summary.generation, 2);
    let last = last_recovery(&host);
    assert_eq!(last.outcome, RecoveryOutcome::Recovered, "{last:?}");
    assert_eq!((last.failed_generation, last.new_generation), (1, Some(2)));
    assert!(last.ended_at.is_some() && last.reason.is_none(), "{last:?}");
    assert_eq!(log().len(), 1);
    // A further daemon reports the same.
    host.restart();
    host.running("web");
    let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
    assert_eq!(all, [last]);
}

#[test]
fn a_quarantine_that_was_decided_is_kept() {
    let mut host = Host::new();
    host.spawn_bare("web");
    for failure in 1..CRASH_LOOP_FAILURES {
        let generation = host.running("web").summary.generation;
        end_agent(&host);
        assert!(host.successor_of("web", generation).summary.generation > failure as u64);
    }
    let last = host.running("web").summary.generation;
    assert!(host.die_before("Reclaim", DEADLINE, end_agent));
    host.start();
    let now = in_state(&host, InstanceState::Quarantined);
    assert_eq!(now.summary.generation, last, "{now:?}");
    assert!(now.reason.unwrap().contains("in a row"));
}

/// Returns the `.partial` file of a capture in progress.
fn partial(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?.flatten();
    let mut paths = entries.map(|entry| entry.path());
    paths.find(|path| path.to_string_lossy().ends_with(".vmcore.partial"))
}

/// Requires the packages and kernels of `scripts/setup-tests`.
#[test]
fn a_memory_that_was_kept_is_captured_by_a_later_daemon() {
    // A rate limit low enough that the daemon can be killed during the capture.
    let slow =
        "backend = \"qemu\"\n[pool]\nshare_cpus = true\n[vmcore]\nrate_mib_s = 8\nlevel = 0\n";
    let mut host = Host::with(slow);
    host.spawn_kv_on("web", &kernels::debian("6.1"), kernels::PANICS_ON_NMI);
    let required = json!({ "vmcore": "required" });
    host.control().set_policy("web", &required);
    // A file blocks the path of the directory.
    let obstacle = host.path("state/vmcore");
    std::fs::write(&obstacle, "").unwrap();
    let run_dir = PathBuf::from(host.control().instance("web").run_dir);
    kernels::qmp(&run_dir, "inject-nmi");
    in_state(&host, InstanceState::OperatorActionNeeded);
    std::fs::remove_file(&obstacle).unwrap();

    ask_to_recover(&host);
    let dir = obstacle.join("web");
    host.control()
        .wait("the capture to begin", || partial(&dir));
    host.kill_daemon();
    assert!(partial(&dir).is_some());

    // The second daemon captures the memory, and dies before it reports the capture; the third one finishes.
    host.configure("backend = \"qemu\"\n[pool]\nshare_cpus = true\n");
    std::fs::create_dir_all(host.path("faults")).unwrap();
    std::fs::write(host.path("faults/die before Reclaim"), "").unwrap();
    host.start();
    host.daemon_ended();
    assert_eq!(partial(&dir), None);
    host.start();
    host.successor_of("web", 1);
    let record = last_recovery(&host);
    assert_eq!(record.outcome, RecoveryOutcome::Recovered, "{record:?}");
    let vmcore = record.vmcore.unwrap();
    assert_eq!(vmcore.error, None);
    assert!(vmcore.panic.unwrap().contains("NMI"));
    let log = std::fs::read_to_string(vmcore.log_path.unwrap()).unwrap();
    assert!(log.contains("Kernel panic - not syncing: NMI"), "{log}");
    let dump = Dump::open(Path::new(&vmcore.path.unwrap())).unwrap();
    assert_eq!(dump.unwrap().completeness(), Completeness::Complete);
    assert_eq!(partial(&dir), None);
}
