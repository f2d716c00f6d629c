//! A cgroup limits the memory of an embedded instance. The tests run Debian's kernels in a guest with daemon, agents
//! and workloads, because the machine of a test may have the memory controller in cgroups of version 1.
//!
//! Requires the packages and kernels of `scripts/setup-tests`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod guest;

use guest::Found;
use kmorph_control_api::{InstanceState, InstanceStatus, RecoveryOutcome, RecoveryRecord};

#[test]
fn linux_6_1() {
    tried_on("6.1");
}

#[test]
fn linux_6_12() {
    tried_on("6.12");
}

fn tried_on(series: &str) {
    let found = Found::by_guest(series);
    a_workload_is_killed_alone_and_recorded(&found);
    a_server_that_keeps_to_its_memory_is_not(&found);
    a_restart_and_a_morph_keep_the_limit(&found);
    what_systemd_delegated_has_no_controller(&found);
    a_setup_without_the_controller_says_so(&found);
}

fn a_workload_is_killed_alone_and_recorded(found: &Found) {
    found.has(
        "held",
        "a cgroup for each instance, in /sys/fs/cgroup/kmorph/run-kmorph",
    );
    found.has("held", "memory: held by memory.max");
    let limits = [
        "memory.max 67108864",
        "memory.swap.max 0",
        "memory.oom.group 1",
    ];
    // Debian's kernels have swap.
    assert_eq!(found.lines("limits"), limits);
    let recorded: Vec<RecoveryRecord> = found.json("hog");
    assert_eq!(recorded.len(), 1, "{recorded:?}");
    assert_eq!(recorded[0].outcome, RecoveryOutcome::Recovered);
    let cause = "the kernel killed it because it exceeded its memory of 67108864 bytes (oom_kill)";
    assert!(recorded[0].evidence[0].contains(cause), "{recorded:?}");
    assert_eq!(recorded[0].failed_generation, 1);
    assert_eq!(
        recorded[0].new_generation,
        Some(1),
        "the agent has healed it"
    );
    let hog: InstanceStatus = found.json("hog-status");
    assert_eq!(
        (hog.summary.workload_failures, hog.summary.recoveries),
        (1, 0)
    );
    assert_eq!(found.lines("agent-lives"), ["yes"]);
    let kv = found.lines("neighbour");
    assert_eq!(kv[..2], ["$1", "v"]);
}

fn a_server_that_keeps_to_its_memory_is_not(found: &Found) {
    let replies = found.lines("fill");
    let refused = |line: &&String| line.contains("-OOM command not allowed");
    assert!(replies.iter().any(|line| refused(&line)), "{replies:?}");
    let kv: InstanceStatus = found.json("full-status");
    assert_eq!(kv.summary.state, InstanceState::Running);
    assert_eq!(
        (kv.summary.workload_failures, kv.summary.recoveries),
        (0, 0)
    );
}

fn a_restart_and_a_morph_keep_the_limit(found: &Found) {
    assert_eq!(found.lines("adopted")[..2], ["$1", "v"]);
    let recorded: Vec<RecoveryRecord> = found.json("adopted");
    let by_limit = |record: &&RecoveryRecord| record.evidence[0].contains("oom_kill");
    assert_eq!(recorded.iter().filter(by_limit).count(), 2, "{recorded:?}");
    let morphed = found.lines("morphed");
    assert_eq!(morphed[..2], ["$1", "v"]);
    // Earlier writes belong to the generation that wrote them, which is gone: docs/operations.md.
    let bytes = |name: &str| found.number("morphed", name);
    assert!(bytes("own") < 12 << 20, "{morphed:?}");
    assert!(bytes("daemon") > 24 << 20, "{morphed:?}");
    assert!(found.lines("left").is_empty(), "cgroups are left");
}

fn what_systemd_delegated_has_no_controller(found: &Found) {
    let unit = "/sys/fs/cgroup/system.slice/kmorphd.service";
    found.has("delegated", &format!("in {unit}/kmorph/run-kmorph"));
    found.has(
        "delegated",
        "memory: only limited for each process (RLIMIT_DATA)",
    );
    found.has("delegated", "without Delegate=");
    found.has("delegated", "enabled ''");
    found.has(
        "delegated",
        "67108864             67108864             bytes",
    );
    found.has(
        "delegated",
        "0::/system.slice/kmorphd.service/kmorph/run-kmorph/hog.",
    );
    let hog: InstanceStatus = found.json("delegated-again");
    assert_eq!(hog.summary.state, InstanceState::Running, "adopted");
    // With the controller, systemd could not move a process into the unit.
    found.has("why", "Device or resource busy");
}

fn a_setup_without_the_controller_says_so(found: &Found) {
    found.has("nested", "processes run in the cgroup");
    found.has("bare", "the memory controller is not in");
    for place in ["nested", "bare"] {
        found.has(place, "memory: only limited for each process (RLIMIT_DATA)");
    }
}
