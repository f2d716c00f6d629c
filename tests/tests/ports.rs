//! Published ports when their daemon, their agents or other programs interfere.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use kmorph_control_api::{InstanceState, InstanceStatus, PortState};
use kmorph_tests::Host;
use kmorph_tests::resp::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

fn port_state(now: &InstanceStatus) -> PortState {
    now.summary.published[0].state
}

fn answers(port: u16) -> bool {
    Client::connect(port)
        .and_then(|mut client| client.call(&["PING"]))
        .is_ok()
}

fn refused(port: u16) -> bool {
    let connected = TcpStream::connect(("127.0.0.1", port));
    connected.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[test]
fn an_agent_that_stands_still_during_a_restart_gives_its_sockets_back_later() {
    let mut host = Host::with(
        "[defaults]\nheartbeat_timeout_s = 60.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    let port = host.spawn_kv("web");
    let agent = host.agent("web");
    signal(agent, Signal::SIGSTOP);
    host.restart_by_kill();
    assert_eq!(
        port_state(&host.control().instance("web")),
        PortState::Missing
    );
    signal(agent, Signal::SIGCONT);
    host.control().wait("the port", || {
        let now = host.control().instance("web");
        (port_state(&now) == PortState::Open).then_some(())
    });
    // The daemon holds the port, so the next generation has the port too.
    signal(agent, Signal::SIGKILL);
    host.successor_of("web", 1);
    assert!(answers(port));
}

#[test]
fn an_agent_that_stands_still_for_good_is_healed_with_its_port() {
    let mut host = Host::new();
    let port = host.spawn_kv("web");
    signal(host.agent("web"), Signal::SIGSTOP);
    host.restart_by_kill();
    let now = host.successor_of("web", 1);
    assert_eq!(port_state(&now), PortState::Open);
    assert!(answers(port));
}

#[test]
fn a_port_that_another_program_has_is_waited_for() {
    let mut host = Host::new();
    let port = host.spawn_kv("web");
    let agent = host.agent("web");
    host.kill_daemon();
    signal(agent, Signal::SIGKILL);
    let squatter = host.control().wait("the port to be free", || {
        TcpListener::bind(("127.0.0.1", port)).ok()
    });
    host.start();
    let now = host.control().wait("the port to be told", || {
        let now = host.control().instance("web");
        let told = now.summary.published[0].reason.clone();
        told.is_some_and(|why| why.contains("in use"))
            .then_some(now)
    });
    assert_eq!(port_state(&now), PortState::Missing);
    assert_eq!(
        now.summary.generation, 1,
        "no successor is started without its port"
    );
    drop(squatter);
    let now = host.successor_of("web", 1);
    assert_eq!(port_state(&now), PortState::Open);
    assert!(answers(port));
}

#[test]
fn the_port_of_an_instance_that_rests_refuses_and_comes_back_with_it() {
    let host = Host::with(
        "[defaults]\nheartbeat_timeout_s = 1.0\nauto_heal = false\n\
         [pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    let port = host.spawn_kv("web");
    signal(host.agent("web"), Signal::SIGKILL);
    let now = host.control().wait("it to fail", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Failed).then_some(now)
    });
    assert_eq!(port_state(&now), PortState::Refusing);
    assert!(refused(port));
    assert!(
        TcpListener::bind(("127.0.0.1", port)).is_err(),
        "nobody else gets it"
    );
    assert_eq!((now.processes.len(), now.summary.uptime_s), (0, None));
    assert_eq!(now.summary.kernel_release, "");
    host.control()
        .succeed("POST", "/v1/instances/web/recover", Some(&json!({})));
    let now = host.running("web");
    assert_eq!(port_state(&now), PortState::Open);
    assert!(answers(port));
}

#[test]
fn connections_wait_for_a_successor_and_not_for_ever() {
    let host = Host::with(
        "[defaults]\nheartbeat_timeout_s = 1.0\n[limits]\nport_hold_s = 0.3\n\
         [pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    let port = host.spawn_kv("web");
    // The kernel image has changed: no successor can start, and the recovery is retried with back-off.
    std::fs::write(host.path("vmlinuz-6.1.0-a"), "another").unwrap();
    signal(host.agent("web"), Signal::SIGKILL);
    let failed = Instant::now();
    host.control()
        .wait("the port to refuse", || refused(port).then_some(()));
    assert!(
        failed.elapsed() >= Duration::from_millis(200),
        "connections were held before"
    );
    host.kernel("6.1.0-a");
    host.successor_of("web", 1);
    assert!(answers(port));
}
