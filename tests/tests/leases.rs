//! A workload that its daemon froze before it died.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use kmorph_tests::resp::Client;
use kmorph_tests::{DEADLINE, Host};
use serde_json::json;

/// Makes the daemon of a host with a key-value server die immediately before `step` of a morph. Returns the server's
/// port.
fn die_before(host: &mut Host, step: &str) -> u16 {
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    let body = json!({
        "kernel": host.kernel("6.12.0-b"), "auto_validate": true, "auto_commit": true, "force": true,
    });
    let died = host.die_before(step, DEADLINE, |host| {
        let path = "/v1/instances/web/morph";
        let _ = host.control().try_begin("POST", path, Some(&body));
    });
    assert!(died, "the morph did not come to {step}");
    port
}

fn get(port: u16) -> std::io::Result<String> {
    Client::connect(port)?.call(&["GET", "k"])
}

#[test]
fn a_source_serves_again_by_itself_when_no_record_can_exist() {
    let mut host = Host::new();
    let port = die_before(&mut host, "Round(last)");
    // No daemon runs. The client waits for the end of the lease, and no longer.
    assert_eq!(get(port).unwrap(), "v");
    host.start();
    let now = host.running("web");
    assert_eq!(now.summary.generation, 1);
    assert_eq!(get(port).unwrap(), "v");
    let again = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert!(again.error.is_none(), "{again:?}");
    assert_eq!(get(port).unwrap(), "v");
}

#[test]
fn a_source_that_answered_the_last_round_waits_for_the_next_daemon() {
    let mut host = Host::new();
    let port = die_before(&mut host, "WriteCommitRecord");
    let asked = std::thread::spawn(move || get(port));
    host.start();
    assert_eq!(asked.join().unwrap().unwrap(), "v");
    assert_eq!(
        host.running("web").summary.generation,
        1,
        "there was no record"
    );
}
