//! The failure notices to survivors: their order, their contents, and the notices sent later to a survivor that was
//! unreachable.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::PathBuf;

use kmorph_tests::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 5.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";

/// Spawns a survivor `name` that records its notices in the returned directory.
fn survivor(host: &Host, name: &str) -> PathBuf {
    let dir = host.path(name);
    std::fs::create_dir(&dir).unwrap();
    let body = json!({
        "name": name, "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": ["survivor", dir] },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    dir
}

/// Starts a daemon with the survivor `app`.
fn host() -> (Host, PathBuf) {
    let host = Host::with_hostile_agents(CONFIG);
    let dir = survivor(&host, "app");
    (host, dir)
}

fn told(dir: &std::path::Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("told")).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let parse = |line| serde_json::from_str(line).unwrap();
    whole.lines().map(parse).collect()
}

/// Waits until the survivor has received the ends of this many recoveries, and returns all its notices.
fn told_all(host: &Host, dir: &std::path::Path, completed: usize) -> Vec<Value> {
    host.control().wait("the survivor to be told", || {
        let all = told(dir);
        let over = all.iter().filter(|m| m["type"] == "RECOVER_COMPLETE");
        (over.count() >= completed).then_some(all)
    })
}

fn fail(host: &Host, name: &str, generation: u64) {
    let agent = host.running(name).processes["agent"];
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    host.successor_of(name, generation);
}

#[test]
fn a_survivor_is_told_of_the_failure_the_fence_and_the_new_topology_in_this_order() {
    let (host, dir) = host();
    host.spawn_bare("web");
    fail(&host, "web", 1);
    let all = told_all(&host, &dir, 1);
    let kinds: Vec<_> = all.iter().map(|m| m["type"].as_str().unwrap()).collect();
    assert_eq!(
        kinds,
        ["RECOVER_PREPARE", "RECOVER_RECLAIM", "RECOVER_COMPLETE"]
    );
    for message in &all {
        assert_eq!(message["instance"], "web");
        assert_eq!(message["failed_generation"], 1);
        assert_eq!(message["recovery"], 1);
    }
    assert_eq!(all[0]["cause"], "kernel_dead");
    assert!(all[0]["text"].as_str().unwrap().contains("signal 9"));
    let confirmed = (
        all[1]["fenced_generation"].clone(),
        all[1]["confirmation"].clone(),
    );
    assert_eq!(confirmed, (json!(1), json!(1)), "processes gone");
    assert_eq!(all[2]["outcome"], "recovered");
    assert_eq!(all[2]["new_generation"], 2);
    assert_eq!(all[2]["topology"], json!([["app", 1], ["web", 2]]));
}

#[test]
fn one_who_could_not_be_reached_is_told_the_newest_topology_when_it_can() {
    let (host, dir) = host();
    let witness = survivor(&host, "eye");
    host.spawn_bare("web");
    std::fs::write(dir.join("deaf"), "").unwrap();
    for generation in 1..=2 {
        fail(&host, "web", generation);
    }
    told_all(&host, &witness, 2);
    assert!(told(&dir).is_empty());
    std::fs::remove_file(dir.join("deaf")).unwrap();
    let all = told_all(&host, &dir, 1);
    // No notice of steps that were in progress then, and none of the older recovery.
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(all[0]["type"], "RECOVER_COMPLETE");
    assert_eq!(all[0]["recovery"], 2);
    assert_eq!(
        all[0]["topology"],
        json!([["app", 1], ["eye", 1], ["web", 3]])
    );
}

#[test]
fn a_survivor_that_refuses_holds_up_nothing_and_is_named() {
    let (host, dir) = host();
    host.spawn_bare("web");
    std::fs::write(dir.join("refuse"), "").unwrap();
    fail(&host, "web", 1);
    told_all(&host, &dir, 1);
    let line = host.control().wait("the log to say so", || {
        let log = host.log();
        let line = log.lines().find(|line| line.contains("RECOVER_COMPLETE"))?;
        Some(line.to_owned())
    });
    for words in [
        "did not take",
        "refused by policy",
        "not today",
        "app",
        "generation",
    ] {
        assert!(line.contains(words), "{line}");
    }
}
