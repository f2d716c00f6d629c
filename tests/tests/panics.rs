//! An actor that panics is replaced and counted, or the daemon exits and its successor adopts the instances: in either
//! case, the instances are undisturbed. Requires a debug build of the daemon: a release build has no such fault.

#![cfg(debug_assertions)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use kmorph_control_api::{
    DaemonStatus, EventKind, InstanceState, InstanceStatus, OperationState, RecoveryOutcome,
    RecoveryRecord,
};
use kmorph_tests::resp::Client;
use kmorph_tests::{Events, Host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

fn restarts(host: &Host) -> u64 {
    let now: DaemonStatus = host.control().get("/v1/daemon");
    now.actor_restarts
}

/// Returns `name` once an actor has been replaced and the instance runs.
fn running_again(host: &Host, name: &str) -> InstanceStatus {
    host.control()
        .wait("the replacement", || (restarts(host) > 0).then_some(()));
    let path = format!("/v1/instances/{name}");
    host.control().wait("it to run", || {
        let reply = host.control().request("GET", &path, None);
        // The instance's actor may not be back yet.
        let now: InstanceStatus = (reply.status < 300).then(|| reply.ok())?;
        (now.summary.state == InstanceState::Running).then_some(now)
    })
}

/// Asserts that one actor has been replaced, and that `name` runs as before.
fn replaced(host: &Host, name: &str, agent: i32) {
    let now = running_again(host, name);
    assert_eq!(restarts(host), 1);
    assert_eq!((now.processes["agent"], now.summary.recoveries), (agent, 0));
}

/// Asserts that the detector still judges the instance: a hang is detected and healed.
fn still_watched(host: &Host, name: &str) {
    let before = host.control().instance(name);
    kill(Pid::from_raw(before.processes["agent"]), Signal::SIGSTOP).unwrap();
    host.successor_of(name, before.summary.generation);
}

#[test]
fn an_instance_actor_is_replaced() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    host.panic_at("instance", || {
        let body = json!({ "auto_heal": true });
        let path = "/v1/instances/web/policy";
        let refused = host.control().request("PATCH", path, Some(&body)).refusal();
        assert!(refused.message.contains("being replaced"), "{refused:?}");
    });
    replaced(&host, "web", agent);
    still_watched(&host, "web");
}

#[test]
fn a_request_that_panics_ends_its_connection_and_no_other() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    let events = Events::follow(host.control());
    host.panic_at("control", || {
        let answer = host.control().try_request("GET", "/v1/daemon", None);
        assert!(answer.is_none(), "{answer:?}");
    });
    assert_eq!(restarts(&host), 0);
    assert_eq!(host.agent("web"), agent);
    // The stream that was open before continues.
    host.control()
        .set_policy("web", &json!({ "auto_heal": true }));
    events.wait("the change", |event| event.kind == EventKind::Policy);
    still_watched(&host, "web");
}

#[test]
fn a_watch_is_replaced() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    host.panic_at("watch", || {});
    replaced(&host, "web", agent);
    still_watched(&host, "web");
}

#[test]
fn the_transport_is_replaced_and_all_connections_are_made_again() {
    let host = Host::new();
    host.spawn_bare("web");
    host.spawn_bare("db");
    let (web, db) = (host.agent("web"), host.agent("db"));
    host.panic_at("transport", || {});
    replaced(&host, "web", web);
    replaced(&host, "db", db);
    for name in ["web", "db"] {
        let path = format!("/v1/instances/{name}/ping");
        let reply = host.control().wait("an answer to a ping", || {
            let reply = host.control().request("POST", &path, None);
            (reply.status < 300).then_some(reply)
        });
        assert_eq!(reply.status, 200);
    }
    replaced(&host, "web", web);
    still_watched(&host, "db");
}

#[test]
fn a_recovery_is_taken_up_by_another() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    let agent = host.agent("web");
    host.panic_at("recovery", || {
        kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    });
    assert_eq!(running_again(&host, "web").summary.generation, 2);
    assert_eq!(restarts(&host), 1);
    let done = || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        let over = all.iter().all(|r| r.outcome != RecoveryOutcome::Running);
        over.then_some(all)
    };
    let all = host.control().wait("the recovery to end", done);
    let outcomes: Vec<_> = all.iter().map(|r| r.outcome).collect();
    assert_eq!(
        outcomes,
        [RecoveryOutcome::Failed, RecoveryOutcome::Recovered]
    );
    assert!(all[0].reason.as_ref().unwrap().contains("fault in kmorphd"));
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
}

#[test]
fn a_morph_whose_session_panics_is_undone_and_can_be_begun_again() {
    let host = Host::new();
    let port = host.spawn_kv("web");
    let agent = host.agent("web");
    let mut client = Client::connect(port).unwrap();
    client.call(&["SET", "k", "v"]).unwrap();
    host.panic_at("morph", || {
        let ended = host.control().morph("web", &host.kernel("6.12.0-b"));
        assert_eq!(ended.state, OperationState::Failed);
        let error = ended.error.unwrap();
        assert!(error.message.contains("fault in kmorphd"), "{error:?}");
    });
    replaced(&host, "web", agent);
    assert_eq!(client.call(&["GET", "k"]).unwrap(), "v");
    let body = json!({ "kernel": host.kernel("6.12.0-b"), "auto_validate": true,
        "auto_commit": true, "force": true });
    host.control()
        .succeed("POST", "/v1/instances/web/morph", Some(&body));
    assert_eq!(client.call(&["GET", "k"]).unwrap(), "v");
}

/// Makes `actor` panic: the daemon exits with a failure that names the actor, and its successor adopts.
fn ends_and_is_followed(actor: &str) {
    let mut host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    host.panic_at(actor, || {
        // A write to the journal, for actors that panic only then; the request may stay unanswered.
        let body = json!({ "auto_heal": true }).to_string();
        let path = "/v1/instances/web/policy";
        host.control().try_request("PATCH", path, Some(&body));
    });
    assert_eq!(host.daemon_ended().code(), Some(1));
    let said = format!("its {actor} actor panicked");
    assert!(host.log().contains(&said), "{}", host.log());
    host.start();
    let now = host.control().wait("web to run", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Running).then_some(now)
    });
    assert_eq!((now.processes["agent"], now.summary.recoveries), (agent, 0));
    still_watched(&host, "web");
}

#[test]
fn without_its_journal_the_daemon_ends() {
    ends_and_is_followed("journal");
}

#[test]
fn without_its_supervisor_the_daemon_ends() {
    ends_and_is_followed("supervisor");
}
