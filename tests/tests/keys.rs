//! The key of a generation: new at each spawn, in two files that only their owner can read, and nowhere else.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kmorph_control_api::OperationState;
use kmorph_tests::Host;
use kmorph_tests::resp::Client;

/// Returns the key in a run directory, after a check of its permissions.
fn key(run_dir: &str) -> String {
    for name in ["agent.key", "agent.json"] {
        let path = Path::new(run_dir).join(name);
        let mode = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let key = std::fs::read_to_string(Path::new(run_dir).join("agent.key")).unwrap();
    assert_eq!(key.len(), 64);
    key
}

#[test]
fn each_generation_has_its_own_key_which_nothing_shows_and_the_next_daemon_knows() {
    let mut host = Host::with(
        "[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n[log]\nlevel = \"debug\"\n",
    );
    let port = host.spawn_kv("web");
    let first = host.running("web");
    let mut keys = vec![key(&first.run_dir)];
    let morphed = host.control().morph("web", &host.kernel("6.12.0-b"));
    assert_eq!(morphed.state, OperationState::Succeeded, "{morphed:?}");
    host.restart_by_kill();
    let now = host.running("web");
    assert_eq!(
        now.summary.recoveries, 0,
        "the next daemon proves itself too"
    );
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
    keys.push(key(&now.run_dir));
    assert_ne!(keys[0], keys[1]);
    let agent = std::fs::read_to_string(Path::new(&now.run_dir).join("agent.log")).unwrap();
    let mut told = vec![("the daemon's log", host.log()), ("the agent's log", agent)];
    for path in [
        "/v1/instances",
        "/v1/instances/web",
        "/v1/daemon",
        "/metrics",
    ] {
        let reply = host.control().try_request("GET", path, None).unwrap();
        told.push((path, format!("{reply:?}")));
    }
    for name in ["state/journal.sqlite", "state/journal.sqlite-wal"] {
        let journal = std::fs::read(host.path(name)).unwrap();
        told.push((name, String::from_utf8_lossy(&journal).into_owned()));
    }
    for (what, text) in told {
        for key in &keys {
            assert!(!text.contains(key.as_str()), "{what} shows a key");
        }
    }
}
