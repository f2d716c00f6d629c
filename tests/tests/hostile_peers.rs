//! Hostile peers: agents that break the protocol, and strangers that connect to every socket. The daemon names the
//! fault, and the other instances are not disturbed.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use kmorph_control_api::{EventKind, HealthReport, InstanceState, Operation, OperationState};
use kmorph_tests::resp::Client;
use kmorph_tests::{Events, Host};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;

/// Number of connections made to each socket.
const CONNECTIONS: usize = 100_000;
/// Number of connections that the stranger holds open at once.
const HELD: usize = 500;

/// Maximum time for an answer of the daemon in a crowd: slow on a busy machine, but never stuck.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Starts a daemon whose agents are hostile if the workload says so.
fn host() -> Host {
    Host::with_hostile_agents(
        "[defaults]\nheartbeat_timeout_s = 1.0\nauto_heal = false\n\
         [limits]\nstart_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    )
}

fn spawn_hostile(host: &Host, word: &str) -> String {
    let body = json!({
        "name": "bad", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": [word] },
    });
    let ended = host.control().operate("POST", "/v1/instances", Some(&body));
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let gone = host.control().request("GET", "/v1/instances/bad", None);
    assert_eq!(gone.status, 404, "{gone:?}");
    ended.error.unwrap().message
}

#[test]
fn an_agent_that_breaks_the_protocol_is_named_and_disturbs_nobody() {
    let host = host();
    host.spawn_bare("good");
    let agent = host.agent("good");
    for (word, reason) in [
        ("garbage", "invalid frame"),
        ("wrong-crc", "checksum"),
        ("oversized", "4294967295"),
        ("stale", "generation"),
        ("versions", "speaks versions 0 to 0"),
        ("impostor", "does not prove"),
        ("silent", "no healthy answer"),
    ] {
        let message = spawn_hostile(&host, word);
        assert!(message.contains(reason), "{word}: {message}");
        let good = host.running("good");
        assert_eq!(
            (good.processes["agent"], good.summary.recoveries),
            (agent, 0)
        );
    }
}

/// The agent's texts would forge a log line, clear a terminal and reverse the reading direction.
#[test]
fn what_an_agent_writes_reaches_log_events_and_api_escaped() {
    let host = host();
    let body = json!({
        "name": "bad", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": ["spiteful"] },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let shown = |path: &str| host.control().request("GET", path, None).body;
    host.control().wait("the release of its kernel", || {
        let status = shown("/v1/instances/bad");
        status.contains("txet").then_some(())
    });
    let kernel = host.kernel("6.12.0-b");
    let refused = host.control().morph("bad", &kernel);
    assert_eq!(refused.state, OperationState::Failed, "{refused:?}");
    let harmless = |what: &str, text: &str| {
        for raw in text.chars().filter(|c| *c != '\n') {
            let harmful = raw.is_control() || matches!(raw, '\u{202a}'..='\u{202e}' | '\u{2066}');
            assert!(!harmful, "{what}: {raw:?} in {text:?}");
        }
        // The JSON escapes of control characters.
        assert!(
            !text.contains("\\u001b") && !text.contains("\\u0007"),
            "{what}: {text}"
        );
        assert!(
            !text.lines().any(|line| line.starts_with("ERRO forged")),
            "{what}: {text}"
        );
    };
    for path in [
        "/v1/instances/bad",
        "/v1/instances/bad/health",
        "/v1/instances",
        "/v1/operations",
    ] {
        harmless(path, &shown(path));
    }
    assert!(shown("/v1/instances/bad").contains("\\u{1b}[2J"));
    assert!(shown("/v1/operations").contains("\\u{1b}[2J"));
    harmless("kmorphd.log", &host.log());
}

/// The agent was healthy, served and was trusted; from one heartbeat to the next, it turns hostile.
#[test]
fn an_agent_that_turns_hostile_is_named_and_disturbs_nobody() {
    let host = host();
    host.spawn_bare("good");
    let agent = host.agent("good");
    let events = Events::follow(host.control());
    for (word, reason) in [
        ("garbage", "invalid frame"),
        ("wrong-crc", "checksum"),
        ("oversized", "4294967295"),
        ("stale", "generation"),
        ("reborn", "started anew"),
        ("silent", "silent for"),
    ] {
        let turn = host.path(word);
        let body = json!({
            "name": "bad", "kernel": host.kernel("6.1.0-a"),
            "workload": { "program": "/bin/true", "args": [format!("turns-{word}"), turn] },
        });
        host.control().succeed("POST", "/v1/instances", Some(&body));
        host.running("bad");
        std::fs::write(&turn, "").unwrap();
        let verdict = events.wait("the verdict", |event| {
            event.kind == EventKind::InstanceState && event.detail["state"] == "failed"
        });
        assert!(
            verdict.event.message.contains(reason),
            "{word}: {verdict:?}"
        );
        let good = host.running("good");
        assert_eq!(
            (good.processes["agent"], good.summary.recoveries),
            (agent, 0)
        );
        host.control()
            .succeed("DELETE", "/v1/instances/bad?force=true", None);
    }
}

/// A later version of the protocol may define more health values.
#[test]
fn an_agent_of_unknown_health_is_taken_for_degraded() {
    let host = host();
    let turn = host.path("turn");
    let body = json!({
        "name": "bad", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": ["strange", turn] },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    host.running("bad");
    std::fs::write(&turn, "").unwrap();
    let shown = host.control().wait("it to be degraded", || {
        let now = host.control().instance("bad");
        (now.summary.state == InstanceState::Degraded).then_some(now)
    });
    assert_eq!(shown.summary.recoveries, 0);
}

/// A status before the first heartbeat holds until the agent sends another one.
#[test]
fn an_agent_that_is_unwell_from_the_beginning_is_shown_degraded() {
    let host = Host::with_hostile_agents("[pool]\nshare_cpus = true\n");
    let turn = host.path("turn");
    let body = json!({
        "name": "bad", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": ["unwell", turn] },
    });
    let spawn: Operation = host
        .control()
        .request("POST", "/v1/instances", Some(&body))
        .ok();
    host.control().wait("its words", || {
        let now = host
            .control()
            .request("GET", "/v1/instances/bad/health", None);
        // The instance is missing while the daemon prepares its spawn.
        let said = (now.status < 300).then(|| now.ok::<HealthReport>().reason)?;
        (said.as_deref() == Some("a fever")).then_some(())
    });
    std::fs::write(&turn, "").unwrap();
    let spawned = host.control().finished(&spawn.id);
    assert_eq!(spawned.state, OperationState::Succeeded, "{spawned:?}");
    let shown = host.control().instance("bad").summary;
    assert_eq!(shown.state, InstanceState::Degraded, "{shown:?}");
}

#[test]
fn an_agent_of_many_moods_fills_no_log() {
    let host = host();
    let events = Events::follow(host.control());
    let body = json!({
        "name": "bad", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "/bin/true", "args": ["moody"] },
    });
    let begun = Instant::now();
    host.control().request("POST", "/v1/instances", Some(&body));
    let mut changes = 0;
    let failed = events.wait("its end", |event| {
        let change = event.kind == EventKind::InstanceState;
        // Counts the agent's changes; occasional silence is an effect of the machine.
        changes += u64::from(change && event.detail["state"] == "degraded");
        change && event.detail["state"] == "failed"
    });
    // Ten per ten seconds, plus the start and the end.
    let most = 10 * ((failed.at - begun).as_secs() / 10 + 1) + 4;
    assert!(changes <= most, "{changes} changes of state");
}

/// Returns the number of open descriptors of a process, and its resident memory in bytes.
fn size(pid: i32) -> (usize, u64) {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count();
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    (open, kib * 1024)
}

/// Connects [`CONNECTIONS`] times, sends `line`, and holds the last [`HELD`] connections open. Returns the maximum
/// number of descriptors that `pid` had.
fn flood(socket: &Path, line: &[u8], pid: i32) -> usize {
    let mut held = std::collections::VecDeque::with_capacity(HELD);
    let mut most = 0;
    for count in 0..CONNECTIONS {
        if held.len() == HELD {
            held.pop_front();
        }
        if count % 1000 == 0 {
            most = most.max(size(pid).0);
        }
        let mut stream = UnixStream::connect(socket).unwrap();
        // A write may fail, because a hang-up is one form of refusal.
        let _ = stream.write_all(line);
        held.push_back(stream);
    }
    most.max(size(pid).0)
}

#[test]
fn a_hundred_thousand_connections_to_an_agent_are_bounded_and_not_noticed() {
    const GROWTH_MAX_BYTES: u64 = 8 << 20;
    /// The 64 pending connections, plus those that one turn of the runtime accepts before the oldest ones are closed.
    const OPEN_MAX: usize = 256;
    let host = Host::new();
    host.spawn_bare("web");
    let now = host.control().instance("web");
    let agent = now.processes["agent"];
    let socket = Path::new(&now.run_dir).join("vsock.sock");
    let (open, bytes) = size(agent);
    for line in [b"".as_slice(), b"CONNECT 9000\n"] {
        let most = flood(&socket, line, agent);
        assert!(most <= open + OPEN_MAX, "{open} descriptors became {most}");
    }
    let grown = size(agent).1.saturating_sub(bytes);
    assert!(grown < GROWTH_MAX_BYTES, "the agent grew by {grown} bytes");
    let log = std::fs::metadata(Path::new(&now.run_dir).join("agent.log")).unwrap();
    assert!(log.len() < 1 << 20, "the agent logged {} bytes", log.len());
    let after = host.running("web");
    assert_eq!(
        (after.processes["agent"], after.summary.recoveries),
        (agent, 0)
    );
}

#[test]
fn a_hundred_thousand_connections_to_the_control_socket_are_bounded() {
    const GROWTH_MAX_BYTES: u64 = 32 << 20;
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    let daemon = host.daemon_pid();
    let socket = host.path("run/kmorphd.sock");
    let (open, bytes) = size(daemon);
    for line in [
        b"GET / HTTP/1.0\r\n\r\n".as_slice(),
        b"\x16\x03\x01 no HTTP\r\n\r\n",
    ] {
        let most = flood(&socket, line, daemon);
        assert!(most <= open + 300, "{open} descriptors became {most}");
    }
    let grown = size(daemon).1.saturating_sub(bytes);
    assert!(grown < GROWTH_MAX_BYTES, "the daemon grew by {grown} bytes");
    let after = host.running("web");
    assert_eq!(
        (after.processes["agent"], after.summary.recoveries),
        (agent, 0)
    );
}

/// The port's socket also belongs to the workload: the daemon holds the socket, but does not handle its connections.
#[test]
fn a_hundred_thousand_connections_to_a_published_port_are_none_of_the_daemons() {
    const GROWTH_MAX_BYTES: u64 = 8 << 20;
    let host = Host::new();
    let port = host.spawn_kv("web");
    let agent = host.agent("web");
    let daemon = host.daemon_pid();
    let mut held = Client::connect(port).unwrap();
    let (open, bytes) = size(daemon);
    let mut crowd = std::collections::VecDeque::with_capacity(HELD);
    for count in 0..CONNECTIONS {
        if crowd.len() == HELD {
            crowd.pop_front();
        }
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        // Closes with a reset, so that the system keeps no state of the connection and does not run out of ports.
        let at_once = nix::libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&stream, sockopt::Linger, &at_once).unwrap();
        let _ = (&stream).write_all(b"*1\r\n$4\r\nPI");
        crowd.push_back(stream);
        if count % 10_000 == 0 {
            assert_eq!(held.call(&["PING"]).unwrap(), "PONG");
            let begun = Instant::now();
            let now: kmorph_control_api::DaemonStatus = host.control().get("/v1/daemon");
            assert!(begun.elapsed() < ANSWER_MAX, "it answered late");
            assert!(now.journal_ok);
        }
    }
    let (open_now, bytes_now) = size(daemon);
    assert!(open_now <= open + 4, "{open} descriptors became {open_now}");
    let grown = bytes_now.saturating_sub(bytes);
    assert!(grown < GROWTH_MAX_BYTES, "the daemon grew by {grown} bytes");
    drop(crowd);
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
    let after = host.running("web");
    assert_eq!(
        (after.processes["agent"], after.summary.recoveries),
        (agent, 0)
    );
}

#[test]
fn clients_that_say_nothing_are_hung_up_on_and_keep_nobody_out() {
    let host = Host::new();
    host.spawn_bare("web");
    let socket = host.path("run/kmorphd.sock");
    // More connections than the daemon serves at once.
    let mut silent: Vec<_> = (0..300)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    host.running("web");
    for stream in &mut silent[..200] {
        stream
            .set_read_timeout(Some(kmorph_tests::DEADLINE))
            .unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
}
