//! Policies of several instances: a change applies to all of them, or to none.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use kmorph_control_api::{ErrorCode, Policy, PolicySet};
use kmorph_tests::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

fn policies(host: &Host) -> PolicySet {
    host.control().get("/v1/policies")
}

fn import(host: &Host, morph_timeout_s: f64) -> kmorph_tests::Reply {
    let mut set = policies(host);
    for policy in set.instance.values_mut() {
        policy.morph_timeout_s = morph_timeout_s;
    }
    let body: Value = serde_json::to_value(&set).unwrap();
    host.control().request("PUT", "/v1/policies", Some(&body))
}

/// Makes the journal refuse rows of `db`, or accept them again: like a disk that fills up after the row of the first
/// instance.
fn refuse_db(host: &Host, refuse: bool) {
    let journal = rusqlite::Connection::open(host.path("state/journal.sqlite")).unwrap();
    for what in ["INSERT", "UPDATE"] {
        let statement = match refuse {
            true => format!(
                "CREATE TRIGGER full_{what} BEFORE {what} ON instance WHEN NEW.name = 'db'
                 BEGIN SELECT RAISE(ABORT, 'no room for db'); END"
            ),
            false => format!("DROP TRIGGER full_{what}"),
        };
        journal.execute_batch(&statement).unwrap();
    }
}

#[test]
fn a_journal_that_fails_behind_the_first_policy_keeps_none() {
    let mut host = Host::new();
    for name in ["app", "db", "web"] {
        host.spawn_bare(name);
    }
    let before = policies(&host);
    refuse_db(&host, true);
    let refused = import(&host, 7.0).refusal();
    assert_eq!(refused.code, ErrorCode::JournalUnavailable, "{refused:?}");
    assert!(refused.message.contains("no room for db"), "{refused:?}");
    assert_eq!(policies(&host), before);
    host.restart_by_kill();
    assert_eq!(policies(&host), before, "as the journal has them");
    refuse_db(&host, false);
    let set: PolicySet = import(&host, 7.0).ok();
    assert_eq!(set.instance.len(), 3);
    for _ in 0..2 {
        assert_eq!(policies(&host), set);
        assert!(set.instance.values().all(|p| p.morph_timeout_s == 7.0));
        host.restart_by_kill();
    }
}

#[test]
fn a_policy_that_is_changed_while_its_instance_is_recovered_stays_changed() {
    let mut host = Host::new();
    host.spawn_bare("web");
    // The back-off after a second failure leaves enough time for a change.
    for generation in 1..=2 {
        let agent = host.running("web").processes["agent"];
        kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
        if generation == 2 {
            host.control().wait("its failure", || {
                let now = host.control().instance("web").summary;
                (now.state != kmorph_control_api::InstanceState::Running).then_some(())
            });
            let patch = json!({ "morph_timeout_s": 7.0 });
            host.control().set_policy("web", &patch);
        }
        host.successor_of("web", generation);
    }
    host.restart_by_kill();
    let policy: Policy = host.control().get("/v1/instances/web/policy");
    assert_eq!(policy.morph_timeout_s, 7.0);
}
