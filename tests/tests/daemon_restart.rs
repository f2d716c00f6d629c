//! The daemon may be killed at any moment: instances keep running, and operations in progress are finished or rolled
//! back.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use kmorph_control_api::{InstanceState, Operation, RecoveryOutcome, RecoveryRecord};
use kmorph_tests::resp::{Client, Steady};
use kmorph_tests::{Events, Host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

const MORPH: &str = "/v1/instances/web/morph";

fn settled(host: &Host) -> kmorph_control_api::InstanceStatus {
    host.control().wait("web to run", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Running).then_some(now)
    })
}

#[test]
fn a_killed_daemon_disturbs_nothing_and_its_successor_adopts() {
    let mut host = Host::new();
    let port = host.spawn_kv("web");
    let agent = host.agent("web");
    let steady = Steady::start(port, Duration::from_millis(1));
    host.restart_by_kill();
    let now = settled(&host);
    assert_eq!((now.summary.generation, now.processes["agent"]), (1, agent));
    let seen = steady.stop();
    assert_eq!((seen.failed, seen.wrong), (0, 0), "{seen:?}");
    // The next daemon heals and holds the port like the first one.
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    host.successor_of("web", 1);
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
}

#[test]
fn an_instance_that_died_meanwhile_is_found_and_healed() {
    let mut host = Host::new();
    let port = host.spawn_kv("web");
    let agent = host.agent("web");
    host.kill_daemon();
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    host.start();
    host.successor_of("web", 1);
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
}

/// The start time of the instance is long over, so the heartbeat timeout applies, as if the instance had been silent
/// all the time.
#[test]
fn an_instance_that_hangs_when_it_is_adopted_is_healed_after_the_heartbeat_timeout() {
    let mut host = Host::with("[limits]\nstart_timeout_s = 120.0\n");
    host.spawn_kv("web");
    let agent = host.agent("web");
    host.kill_daemon();
    kill(Pid::from_raw(agent), Signal::SIGSTOP).unwrap();
    // According to the journal, the spawn was long ago.
    let journal = rusqlite::Connection::open(host.path("state/journal.sqlite")).unwrap();
    let older =
        "UPDATE generation SET row = json_set(row, '$.spawned_at', '2020-01-01T00:00:00.000Z')";
    assert_eq!(journal.execute(older, []).unwrap(), 1);
    drop(journal);
    host.start();
    host.successor_of("web", 1);
    let recoveries: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
    let evidence = recoveries[0].evidence.join("; ");
    let waited = evidence.strip_prefix("no healthy answer within ");
    let waited = waited.and_then(|rest| rest.split_once("s;"));
    let waited: f64 = waited.expect(&evidence).0.parse().unwrap();
    assert!(waited < 120.0, "{evidence}");
}

#[test]
fn a_prepared_morph_is_undone() {
    let mut host = Host::new();
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    let body = json!({ "kernel": host.kernel("6.12.0-b") });
    host.control().succeed("POST", MORPH, Some(&body));
    host.restart_by_kill();
    let now = settled(&host);
    assert_eq!(now.summary.generation, 1);
    assert_eq!(
        Client::connect(port).unwrap().call(&["GET", "k"]).unwrap(),
        "v"
    );
    let again = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert!(again.error.is_none(), "{again:?}");
    assert_eq!(
        Client::connect(port).unwrap().call(&["GET", "k"]).unwrap(),
        "v"
    );
}

/// Kills the daemon after `micros` of a whole morph, at whatever step.
fn killed_in_the_middle(micros: u64) {
    let mut host = Host::new();
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    let body =
        json!({ "kernel": host.kernel("6.12.0-b"), "auto_validate": true, "auto_commit": true });
    host.control().begin("POST", MORPH, Some(&body));
    // Not a wait for an event: the test varies the moment of the kill.
    std::thread::sleep(Duration::from_micros(micros));
    host.restart_by_kill();
    let now = settled(&host);
    let kernel = now.summary.kernel_release.as_str();
    assert!(matches!(kernel, "6.1.0-a" | "6.12.0-b"), "{kernel}");
    assert_eq!(
        Client::connect(port).unwrap().call(&["GET", "k"]).unwrap(),
        "v"
    );
    // Exactly one runnable generation is left.
    let dirs = std::fs::read_dir(host.path("run/instances/web")).unwrap();
    let left: Vec<_> = dirs
        .flatten()
        .map(|d| d.path())
        .filter(|d| d.join("agent.json").exists())
        .collect();
    assert_eq!(left, [std::path::PathBuf::from(now.run_dir)]);
}

#[test]
fn a_daemon_killed_anywhere_in_a_morph_leaves_one_kernel_with_the_data() {
    for micros in (0..40_000).step_by(1_000) {
        killed_in_the_middle(micros);
    }
}

#[test]
fn a_termination_under_way_is_finished() {
    let mut host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    // The agent cannot exit on its own, so the daemon waits.
    kill(Pid::from_raw(agent), Signal::SIGSTOP).unwrap();
    let begun: Operation = host
        .control()
        .request("DELETE", "/v1/instances/web", None)
        .ok();
    host.control().wait("it to be asked", || {
        let now: Operation = host.control().get(&format!("/v1/operations/{}", begun.id));
        (now.progress.step == "stopping").then_some(())
    });
    host.restart_by_kill();
    host.control().wait("it to be gone", || {
        let all: Vec<serde_json::Value> = host.control().get("/v1/instances");
        all.is_empty().then_some(())
    });
    let stat = std::fs::read_to_string(format!("/proc/{agent}/stat")).unwrap_or_default();
    assert!(
        stat.is_empty() || stat.contains(") Z "),
        "it runs on: {stat}"
    );
}

#[test]
fn an_end_that_was_granted_comes_although_the_daemon_dies_at_once() {
    for _ in 0..10 {
        let mut host = Host::new();
        host.spawn_bare("web");
        let begun: Operation = host
            .control()
            .request("DELETE", "/v1/instances/web", None)
            .ok();
        assert_eq!(begun.error, None);
        host.restart_by_kill();
        host.control().wait("it to be gone", || {
            let all: Vec<serde_json::Value> = host.control().get("/v1/instances");
            all.is_empty().then_some(())
        });
    }
}

#[test]
fn a_recovery_that_died_with_the_daemon_is_not_told_to_run() {
    let mut host = Host::new();
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"), "workload": kmorph_tests::starts_once(),
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    kill(Pid::from_raw(host.agent("web")), Signal::SIGKILL).unwrap();
    host.control().wait("a successor", || {
        (host.control().instance("web").summary.generation > 1).then_some(())
    });
    let successor = host.agent("web");
    host.kill_daemon();
    kill(Pid::from_raw(successor), Signal::SIGKILL).unwrap();
    host.control().wait("its end", || {
        let program = std::fs::read_link(format!("/proc/{successor}/exe"));
        program.is_err().then_some(())
    });
    host.start();
    let first: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
    assert_eq!(first[0].outcome, RecoveryOutcome::Failed, "{first:?}");
    assert!(
        first[0].reason.as_deref().unwrap().contains("daemon ended"),
        "{first:?}"
    );
    // The next recovery handles the successor's death.
    assert_eq!(first[1].failed_generation, 2, "{first:?}");
}

/// A restarted daemon leaves the same instances alone as a running one.
#[test]
fn a_workload_that_its_agent_has_given_up_is_adopted_as_it_is() {
    let mut host = Host::new();
    let fails = host.path("fails");
    let script = format!("[ -e {} ] && exit 1; exec sleep 100000", fails.display());
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/sh", "args": ["-c", script] },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let agent = host.agent("web");
    std::fs::write(&fails, "").unwrap();
    let children = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
    let workload = children.split_whitespace().next().unwrap().parse().unwrap();
    kill(Pid::from_raw(workload), Signal::SIGKILL).unwrap();
    let given_up = |host: &Host| {
        host.control().wait("the agent to have given up", || {
            let now = host.control().instance("web");
            let reason = now.reason.clone().unwrap_or_default();
            let over = reason.contains("not restarted");
            (over && now.summary.state == InstanceState::Degraded).then_some(now)
        })
    };
    given_up(&host);
    let log = |host: &Host| -> Vec<RecoveryRecord> {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        all.into_iter()
            .filter(|r| r.outcome != RecoveryOutcome::Recovered)
            .collect()
    };
    let last = host.control().wait("the entry", || log(&host).pop());
    assert_eq!(
        (last.outcome, last.cause.as_str()),
        (RecoveryOutcome::Failed, "workload_failed")
    );
    host.restart();
    let now = given_up(&host);
    assert_eq!((now.summary.generation, now.processes["agent"]), (1, agent));
    assert_eq!(log(&host), [last], "told once");
}

#[test]
fn a_follower_of_events_misses_none_over_a_restart() {
    let mut host = Host::new();
    let events = Events::follow(host.control());
    host.spawn_bare("web");
    let seen = events.wait("the spawn", |e| e.message == "spawned").event;
    host.spawn_bare("db");
    let rest = Events::resume(host.control(), seen.id);
    let next = rest.wait("the next event", |_| true).event;
    assert_eq!(next.id, seen.id + 1);
    rest.wait("the other spawn", |e| {
        e.message == "spawned" && e.instance.as_deref() == Some("db")
    });
    host.restart_by_kill();
    let rest = Events::resume(host.control(), seen.id);
    let next = rest.wait("the next event", |_| true).event;
    assert_eq!(next.id, seen.id + 1);
    rest.wait("the adoption", |e| e.message == "adopted");
}

#[test]
fn a_damaged_journal_is_named_and_its_copy_is_put_back() {
    let mut host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    let copies = host.path("state/backups");
    host.control().wait("a copy of the journal", || {
        let found = std::fs::read_dir(&copies).ok()?.flatten();
        let mut names = found.map(|entry| entry.file_name().into_string().unwrap());
        names.find(|name| name.starts_with("journal-"))
    });
    host.kill_daemon();
    let journal = host.path("state/journal.sqlite");
    std::fs::write(&journal, "not what it was".repeat(1000)).unwrap();
    // All pages may be in the write-ahead log as well.
    let _ = std::fs::remove_file(host.path("state/journal.sqlite-wal"));
    let said = host.refused_start(&[]);
    assert!(said.contains("is damaged"), "{said}");
    // The command of the message, with only the path of the program replaced.
    let command = said.split('`').nth(1).unwrap();
    let words: Vec<_> = command.split(' ').skip(1).collect();
    let restored = std::process::Command::new(kmorph_tests::program("kmorphd"))
        .args(&words)
        .output()
        .unwrap();
    assert!(restored.status.success(), "{restored:?}");
    host.start();
    assert_eq!(host.agent("web"), agent, "adopted");
    let kept = std::fs::read_dir(host.path("state")).unwrap().flatten();
    let mut kept = kept.map(|entry| entry.file_name().into_string().unwrap());
    assert!(kept.any(|name| name.starts_with("journal.sqlite.damaged-")));
}

/// Returns the soft limit of a process's descriptors.
fn soft_limit(pid: i32) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|l| l.starts_with("Max open files"))
        .unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap()
}

#[test]
fn the_daemon_has_all_descriptors_it_may_have_and_what_it_starts_has_no_more_than_before() {
    use std::os::unix::process::CommandExt;
    let host = Host::prepare("");
    let mut command = host.command();
    // SAFETY: between fork and exec, one system call is made, and no memory is allocated.
    unsafe {
        command.pre_exec(|| {
            use nix::sys::resource::{Resource, getrlimit, setrlimit};
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            Ok(setrlimit(Resource::RLIMIT_NOFILE, 512, hard)?)
        });
    }
    let mut daemon = command.spawn().unwrap();
    let pid = i32::try_from(daemon.id()).unwrap();
    host.control().wait("the daemon to answer", || {
        host.control().try_request("GET", "/v1/daemon", None)
    });
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/sleep", "args": ["100000"] },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let agent = host.agent("web");
    let children = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
    let workload = children.trim().parse().unwrap();
    let limits = [pid, agent, workload].map(soft_limit);
    let environment = std::fs::read(format!("/proc/{workload}/environ")).unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(limits[0] > 512, "{limits:?}");
    assert_eq!(limits[1..], [512, 512]);
    assert!(!String::from_utf8_lossy(&environment).contains("DESCRIPTORS"));
}

/// A daemon with another backend cannot see the running generations: it would consider them ended, and fence and
/// respawn them.
#[test]
fn a_start_with_another_backend_is_refused_before_anything_is_touched() {
    let mut host = Host::new();
    let port = host.spawn_kv("web");
    let mut client = Client::connect(port).unwrap();
    client.call(&["SET", "k", "v"]).unwrap();
    let agent = host.agent("web");
    host.kill_daemon();
    let sound = std::fs::read_to_string(host.config_path()).unwrap();
    let other = format!("backend = \"qemu\"\n{sound}");
    std::fs::write(host.config_path(), other).unwrap();
    let said = host.refused_start(&[]);
    for wanted in ["embedded", "qemu", ": web;", "nothing was changed"] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    assert_eq!(client.call(&["GET", "k"]).unwrap(), "v");
    // Conversely, an instance that a journal records for the other backend is refused in the same way.
    std::fs::write(host.config_path(), sound).unwrap();
    let journal = rusqlite::Connection::open(host.path("state/journal.sqlite")).unwrap();
    let moved = |backend: &str| {
        let sql = "UPDATE instance SET row = json_set(row, '$.spec.backend', ?1)";
        assert_eq!(journal.execute(sql, [backend]).unwrap(), 1);
    };
    moved("qemu");
    let said = host.refused_start(&[]);
    assert!(said.contains("of the qemu backend: web;"), "{said}");
    moved("embedded");
    drop(journal);
    host.start();
    let now = settled(&host);
    assert_eq!((now.summary.generation, now.processes["agent"]), (1, agent));
    assert_eq!(client.call(&["GET", "k"]).unwrap(), "v");
}
