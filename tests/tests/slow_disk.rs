//! A disk that stalls for a while. Only operations that must be durable wait for the disk, and nothing is done twice
//! because of the stall.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kmorph_control_api::{
    DaemonStatus, ErrorCode, EventKind, InstanceState, InstanceSummary, Operation, OperationState,
};
use kmorph_tests::{Events, Host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// A heartbeat timeout that expires several times during the stall.
const CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";
/// Default duration of the stall (`KMORPH_TEST_STALL_S`).
const STALL: Duration = Duration::from_secs(6);
/// Maximum time of a request for the list during the stall, even on a busy machine: well below the duration of the
/// stall.
const LIST_MAX: Duration = Duration::from_secs(3);

/// Starts a daemon whose disk can stall: paths below `under`, and with `sync` each fsync.
fn host(under: &str, sync: bool) -> Host {
    let mut host = Host::prepare(CONFIG);
    let library = host.path("stall.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/slow_disk/stall.c");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([&library, &source])
        .status();
    assert!(built.expect("there is a C compiler").success());
    host.set_env("LD_PRELOAD", library);
    host.set_env("KMORPH_STALL", host.path("stalled"));
    host.set_env("KMORPH_STALL_UNDER", host.path(under));
    if sync {
        host.set_env("KMORPH_STALL_SYNC", "yes");
    }
    host.start();
    host
}

fn stall_time() -> Duration {
    let told = std::env::var("KMORPH_TEST_STALL_S").ok();
    told.and_then(|s| s.parse().ok())
        .map_or(STALL, Duration::from_secs)
}

fn list(host: &Host) -> Vec<InstanceSummary> {
    let asked = Instant::now();
    let list = host.control().get("/v1/instances");
    let took = asked.elapsed();
    assert!(took < LIST_MAX, "the list took {took:?}");
    list
}

/// Kills `web` while the disk stalls. `meanwhile` checks the list repeatedly.
fn dies_while_the_disk_stands_still(host: &Host, meanwhile: impl Fn(&[InstanceSummary])) {
    host.spawn_bare("web");
    host.spawn_bare("db");
    let bystander = host.agent("db");
    let events = Events::follow(host.control());
    std::fs::write(host.path("stalled"), "").unwrap();
    let begun = Instant::now();
    kill(Pid::from_raw(host.agent("web")), Signal::SIGKILL).unwrap();
    events.wait("its verdict", |event| event.kind == EventKind::Detector);
    while begun.elapsed() < stall_time() {
        meanwhile(&list(host));
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::remove_file(host.path("stalled")).unwrap();
    let web = host.successor_of("web", 1);
    assert_eq!((web.summary.generation, web.summary.recoveries), (2, 1));
    let told: Vec<_> = events
        .drain()
        .into_iter()
        .map(|arrived| arrived.event)
        .collect();
    let of_web = told.iter().filter(|e| e.instance.as_deref() == Some("web"));
    let said = |words: &str| {
        of_web
            .clone()
            .filter(|e| e.message.starts_with(words))
            .count()
    };
    assert_eq!((said("fenced:"), said("successor:")), (1, 1), "{told:?}");
    let db = host.running("db");
    assert_eq!(
        (db.processes["agent"], db.summary.recoveries),
        (bystander, 0)
    );
}

#[test]
fn while_the_journal_waits_for_the_disk_nothing_is_fenced_or_started_and_the_list_answers() {
    let host = host("state", true);
    dies_while_the_disk_stands_still(&host, |list| {
        let web = list.iter().find(|one| one.name == "web").unwrap();
        // Nothing begins before its journal entry is written.
        assert_eq!((web.generation, web.recoveries), (1, 0), "{web:?}");
        assert_ne!(web.state, InstanceState::Running);
    });
    let daemon: DaemonStatus = host.control().get("/v1/daemon");
    assert!(daemon.journal_ok, "{daemon:?}");
}

#[test]
fn while_a_successor_waits_for_its_directory_the_list_answers() {
    let host = host("run/instances", false);
    dies_while_the_disk_stands_still(&host, |list| {
        let web = list.iter().find(|one| one.name == "web").unwrap();
        assert_eq!(web.recoveries, 0, "{web:?}");
    });
}

/// While the disk stalls, the durability of the record is unknown: the morph cannot be rolled back any more, and is not
/// reported as rolled back.
#[test]
fn a_rollback_is_refused_while_the_commit_record_waits_for_the_disk() {
    let host = host("state", true);
    host.spawn_kv("web");
    let control = host.control();
    let kernel = host.kernel("6.12.0-b");
    let prepare = json!({ "kernel": kernel, "auto_validate": true });
    let path = "/v1/instances/web/morph";
    control.succeed("POST", path, Some(&prepare));
    std::fs::write(host.path("stalled"), "").unwrap();
    let by_force = json!({ "force": true });
    let commit: Operation = control
        .request("POST", &format!("{path}/commit"), Some(&by_force))
        .ok();
    control.wait("the record to be under way", || {
        let now: Operation = control.get(&format!("/v1/operations/{}", commit.id));
        (now.progress.step == "recording the commit").then_some(())
    });
    let rollback = control.request("POST", &format!("{path}/rollback"), None);
    let refused = rollback.refusal();
    assert_eq!(refused.code, ErrorCode::WrongState, "{refused:?}");
    std::fs::remove_file(host.path("stalled")).unwrap();
    let committed = control.finished(&commit.id);
    assert_eq!(committed.state, OperationState::Succeeded, "{committed:?}");
    let web = host.running("web");
    assert_eq!((web.summary.generation, web.summary.morphs), (2, 1));
}
