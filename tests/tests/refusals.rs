//! Invalid input is refused with a clear error, and changes nothing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "refusals/configuration.rs"]
mod configuration;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use kmorph_control_api::{
    ErrorCode, InstanceState, InstanceSummary, Operation, OperationState, Policy,
    REQUEST_BODY_MAX_BYTES,
};
use kmorph_tests::{DEADLINE, Host};
use nix::libc;
use nix::unistd::Uid;
use serde_json::json;

const SOUND: &str = "[defaults]\nheartbeat_timeout_s = 1.0\n";
/// A user who is neither root nor the daemon's user.
const NOBODY: u32 = 65_534;
const SECRET: &str = "hunter2";

fn names(host: &Host) -> Vec<String> {
    let all: Vec<InstanceSummary> = host.control().get("/v1/instances");
    all.into_iter().map(|i| i.name).collect()
}

/// Asserts that `name` is unchanged: same process, same generation, running.
fn undisturbed(host: &Host, name: &str, agent: i32) {
    let now = host.running(name);
    assert_eq!((now.processes["agent"], now.summary.recoveries), (agent, 0));
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
fn a_file_in_the_place_of_the_control_socket_is_left_alone() {
    let host = Host::prepare(SOUND);
    let socket = host.path("run/kmorphd.sock");
    std::fs::create_dir_all(host.path("run")).unwrap();
    std::fs::write(&socket, SECRET).unwrap();
    let said = host.refused_start(&[]);
    has(&said, &["kmorphd.sock", "not a socket"]);
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), SECRET);
}

#[test]
fn an_image_that_would_be_waited_for_is_refused_at_once() {
    let host = Host::new();
    let path = host.path("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let body = json!({ "name": "web", "kernel": path });
    let refused = host.control().request("POST", "/v1/instances", Some(&body));
    let error = refused.refusal();
    assert_eq!(error.code, ErrorCode::BadKernelImage);
    has(&error.message, &["fifo", "not a regular file"]);
    assert!(names(&host).is_empty());
}

#[test]
fn what_only_a_booted_kernel_takes_is_refused_where_none_is_booted() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    let kernel = host.kernel("6.12.0-b");
    let given = [
        (json!({ "kernel_cmdline": "quiet" }), "kernel command line"),
        (json!({ "initramfs": "/boot/initramfs" }), "initramfs"),
    ];
    for (given, what) in given {
        let ask = |path: &str, base: serde_json::Value| {
            let mut body = base;
            for (key, value) in given.as_object().unwrap() {
                body[key] = value.clone();
            }
            let error = host.control().request("POST", path, Some(&body)).refusal();
            assert_eq!(error.code, ErrorCode::WrongState, "{error}");
            has(&error.message, &[what, "embedded", "boots no kernel"]);
            has(&error.next_step.unwrap(), &["leave it out", "qemu"]);
        };
        ask("/v1/instances", json!({ "name": "db", "kernel": kernel }));
        let morph = json!({ "kernel": kernel, "auto_validate": true, "auto_commit": true });
        ask("/v1/instances/web/morph", morph);
    }
    assert_eq!(names(&host), ["web"]);
    assert!(!host.path("run/instances/db").exists());
    undisturbed(&host, "web", agent);
    // An empty command line is valid.
    let body = json!({ "name": "db", "kernel": kernel, "kernel_cmdline": "" });
    host.control().succeed("POST", "/v1/instances", Some(&body));
}

#[test]
fn an_image_that_is_no_kernel_is_refused_by_spawn_and_morph() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    let whole = std::fs::read(host.kernel("6.1.0-a")).unwrap();
    let bad = [
        ("truncated", whole[..300].to_vec()),
        ("text", b"#!/bin/sh\necho no kernel\n".repeat(100)),
        ("empty", Vec::new()),
    ];
    for (name, bytes) in bad {
        let path = host.path(name);
        std::fs::write(&path, bytes).unwrap();
        let body = json!({ "name": "db", "kernel": path });
        let spawn = host.control().request("POST", "/v1/instances", Some(&body));
        let body = json!({ "kernel": path, "auto_validate": true, "auto_commit": true });
        let morph = host
            .control()
            .request("POST", "/v1/instances/web/morph", Some(&body));
        for refused in [spawn, morph] {
            let error = refused.refusal();
            assert_eq!(error.code, ErrorCode::BadKernelImage, "{name}: {error}");
            has(&error.message, &[path.to_str().unwrap()]);
        }
    }
    let missing = json!({ "name": "db", "kernel": host.path("missing") });
    let refused = host
        .control()
        .request("POST", "/v1/instances", Some(&missing));
    has(&refused.refusal().message, &["missing", "No such file"]);
    assert_eq!(names(&host), ["web"]);
    assert!(!host.path("run/instances/db").exists());
    undisturbed(&host, "web", agent);
}

#[test]
fn an_unknown_instance_is_refused_by_everything_that_names_one() {
    let host = Host::new();
    let kernel = json!({ "kernel": host.kernel("6.1.0-a") });
    let none = json!({});
    let capture = json!({ "output": host.path("core") });
    for (method, path, body) in [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/ping", None),
        ("POST", "/recover", None),
        ("POST", "/morph", Some(&kernel)),
        ("POST", "/morph/validate", None),
        ("POST", "/morph/commit", Some(&none)),
        ("POST", "/morph/rollback", None),
        ("PATCH", "/policy", Some(&none)),
        ("POST", "/vmcore", Some(&capture)),
    ] {
        let path = format!("/v1/instances/ghost{path}");
        let error = host.control().request(method, &path, body).refusal();
        assert_eq!(error.code, ErrorCode::NotFound, "{method} {path}: {error}");
        has(&error.message, &["no instance", "ghost"]);
    }
    let operations: Vec<Operation> = host.control().get("/v1/operations");
    assert!(operations.is_empty(), "{operations:?}");
    let logs = [
        "/v1/recoveries?instance=ghost",
        "/v1/events?follow=false&instance=ghost",
    ];
    for path in logs {
        let error = host.control().request("GET", path, None).refusal();
        assert_eq!(error.code, ErrorCode::NotFound, "{path}: {error}");
    }
    // The logs of a terminated instance can be read.
    host.spawn_bare("ghost");
    host.control()
        .succeed("DELETE", "/v1/instances/ghost", None);
    for path in logs {
        let reply = host.control().request("GET", path, None);
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
    }
}

/// The error states the condition of an instance that cannot be asked, and the time of its last heartbeat.
#[test]
fn an_instance_that_does_not_run_is_not_pinged() {
    let host = Host::new();
    host.spawn_bare("web");
    host.control()
        .set_policy("web", &json!({ "auto_heal": false }));
    let agent = nix::unistd::Pid::from_raw(host.agent("web"));
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGKILL).unwrap();
    let now = host.control().wait("the failure", || {
        let now = host.control().instance("web").summary;
        (now.state == InstanceState::Failed).then_some(now)
    });
    assert!(now.last_heartbeat_ms.is_some(), "{now:?}");
    let error = host
        .control()
        .request("POST", "/v1/instances/web/ping", None)
        .refusal();
    assert_eq!(error.code, ErrorCode::WrongState, "{error}");
    has(&error.message, &["web cannot be pinged: it is failed"]);
}

#[test]
fn a_second_instance_of_the_same_name_is_refused() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    let body = json!({ "name": "web", "kernel": host.kernel("6.12.0-b") });
    let error = host
        .control()
        .request("POST", "/v1/instances", Some(&body))
        .refusal();
    assert_eq!(error.code, ErrorCode::AlreadyExists);
    has(&error.message, &["web"]);
    undisturbed(&host, "web", agent);
    assert_eq!(
        host.control().instance("web").summary.kernel_release,
        "6.1.0-a"
    );
}

#[test]
fn a_commit_before_the_validation_is_refused_and_the_morph_goes_on() {
    const MORPH: &str = "/v1/instances/web/morph";
    let host = Host::new();
    host.spawn_kv("web");
    let agent = host.agent("web");
    let nothing = host
        .control()
        .request("POST", &format!("{MORPH}/commit"), Some(&json!({})));
    has(&nothing.refusal().message, &["no morph under way"]);
    let body = json!({ "kernel": host.kernel("6.12.0-b"), "auto_validate": false });
    host.control().succeed("POST", MORPH, Some(&body));
    let path = format!("{MORPH}/commit");
    // By force: the budget is not under test.
    let body = json!({ "force": true });
    let error = host.control().request("POST", &path, Some(&body)).refusal();
    assert_eq!(error.code, ErrorCode::WrongState);
    has(&error.message, &["not validated"]);
    assert_eq!(host.agent("web"), agent, "the source kernel serves");
    host.control()
        .succeed("POST", &format!("{MORPH}/validate"), None);
    let again = host
        .control()
        .request("POST", &format!("{MORPH}/validate"), None);
    assert_eq!(again.refusal().code, ErrorCode::WrongState);
    // The target's end rolls the morph back, and a commit that comes too late receives the reason.
    let instances = std::fs::read_to_string(host.path("run/instances/web/2/agent.birth")).unwrap();
    let target = instances.split(' ').next().unwrap().parse().unwrap();
    let target = nix::unistd::Pid::from_raw(target);
    nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGKILL).unwrap();
    host.control().wait("the rollback", || {
        let status = host.control().request("GET", MORPH, None).status;
        (status == 404).then_some(())
    });
    let late = host.control().request("POST", &path, Some(&body)).refusal();
    assert_eq!(late.code, ErrorCode::WrongState);
    has(
        &late.message,
        &["no morph under way; the last one was rolled back"],
    );
    has(&late.next_step.unwrap(), &["morph prepare web"]);
    host.control().succeed(
        "POST",
        MORPH,
        Some(&json!({ "kernel": host.kernel("6.12.0-b"), "auto_validate": true })),
    );
    assert_eq!(
        host.control().operate("POST", &path, Some(&body)).state,
        OperationState::Succeeded
    );
}

#[test]
fn one_bad_policy_of_many_changes_none() {
    let host = Host::new();
    host.spawn_bare("a");
    host.spawn_bare("b");
    let before: Policy = host.control().instance("a").policy;
    let changed = Policy {
        morph_timeout_s: 9.0,
        ..before.clone()
    };
    let wrong = Policy {
        heartbeat_timeout_s: -1.0,
        ..before.clone()
    };
    for (second, policy, word) in [
        ("b", &wrong, "heartbeat_timeout_s"),
        ("ghost", &changed, "ghost"),
    ] {
        let body = json!({ "instance": { "a": changed, second: policy } });
        let error = host
            .control()
            .request("PUT", "/v1/policies", Some(&body))
            .refusal();
        has(&error.message, &[word]);
        assert_eq!(host.control().instance("a").policy, before);
    }
}

/// Runs `work` on a thread whose user is `NOBODY`.
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // The library's setuid would change every thread of this process; the system call
            // changes the calling one, and SO_PEERCRED is that of the thread that connects.
            let ids = [NOBODY; 3];
            // SAFETY: setresuid(2) takes three integers and touches no memory.
            let set = unsafe { libc::syscall(libc::SYS_setresuid, ids[0], ids[1], ids[2]) };
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
            work()
        });
        thread.join().unwrap()
    })
}

#[test]
fn who_has_no_permission_may_look_and_change_nothing() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can call as another user");
        return;
    }
    let host = Host::new();
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "kmorph-kv", "env": { "TOKEN": SECRET } },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let agent = host.agent("web");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(host.path(""), open).unwrap();
    let kernel = json!({ "kernel": host.kernel("6.12.0-b") });
    let spawn = json!({ "name": "db", "kernel": host.kernel("6.12.0-b") });
    let (policy, graceful) = (json!({ "auto_heal": false }), json!({ "graceful": false }));
    let policies = json!({ "instance": {} });
    let one = |rest: &str| format!("/v1/instances/web{rest}");
    as_nobody(|| {
        for path in ["/v1/daemon", "/v1/instances", "/v1/instances/web"] {
            let seen = host.control().request("GET", path, None);
            assert_eq!(seen.status, 200, "{path}: {}", seen.body);
            assert!(!seen.body.contains(SECRET), "{path}: {}", seen.body);
        }
        for (method, path, body) in [
            ("POST", "/v1/instances".to_owned(), Some(&spawn)),
            ("POST", "/v1/daemon/reload".to_owned(), None),
            ("POST", "/v1/daemon/stop".to_owned(), Some(&graceful)),
            ("PUT", "/v1/policies".to_owned(), Some(&policies)),
            ("POST", "/v1/operations/op-1/cancel".to_owned(), None),
            ("DELETE", one(""), None),
            ("POST", one("/recover"), None),
            ("POST", one("/morph"), Some(&kernel)),
            ("POST", one("/morph/validate"), None),
            ("POST", one("/morph/commit"), Some(&json!({}))),
            ("POST", one("/morph/rollback"), None),
            ("PATCH", one("/policy"), Some(&policy)),
        ] {
            let error = host.control().request(method, &path, body).refusal();
            assert_eq!(error.code, ErrorCode::Forbidden, "{method} {path}: {error}");
            has(&error.message, &["uid 65534", "may look"]);
        }
    });
    assert_eq!(names(&host), ["web"]);
    undisturbed(&host, "web", agent);
    let web = host.control().instance("web");
    assert!(web.policy.auto_heal);
    assert_eq!(web.workload.unwrap().env["TOKEN"], SECRET);
}

/// Returns the peak resident memory of the daemon, bytes.
fn peak_bytes(host: &Host) -> u64 {
    let path = format!("/proc/{}/status", host.daemon_pid());
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

/// Sends a request with a body of `total` bytes, announced by `length`, until the daemon hangs up or answers; returns
/// the answer.
fn oversized(host: &Host, length: &str, total: u64) -> String {
    let mut stream = UnixStream::connect(host.path("run/kmorphd.sock")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    let head = format!("POST /v1/instances HTTP/1.1\r\nHost: kmorph\r\n{length}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    // One chunk of the chunked coding; with a Content-Length, the same bytes serve as arbitrary text.
    let chunk = [b"10000\r\n".as_slice(), &[b'['; 0x10000], b"\r\n"].concat();
    let mut sent = 0;
    while sent < total {
        match stream.write(&chunk) {
            Ok(count) => sent += count as u64,
            // The daemon has hung up; its answer can still be read.
            Err(_) => break,
        }
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn a_request_of_a_gigabyte_is_refused_and_not_held() {
    const GIGABYTE: u64 = 1 << 30;
    /// Far below the size of the request, well above the memory that its handling may take.
    const GROWTH_MAX_BYTES: u64 = 16 << 20;
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    let before = peak_bytes(&host);
    let limit = REQUEST_BODY_MAX_BYTES.to_string();
    let chunked = "Transfer-Encoding: chunked".to_owned();
    for (length, status, words) in [
        (
            format!("Content-Length: {GIGABYTE}"),
            " 413 ",
            limit.as_str(),
        ),
        (chunked, " 400 ", "how long it is"),
    ] {
        let answer = oversized(&host, &length, GIGABYTE);
        has(&answer, &[status, words]);
        let grown = peak_bytes(&host) - before;
        assert!(grown < GROWTH_MAX_BYTES, "{length}: grew by {grown} bytes");
    }
    assert_eq!(names(&host), ["web"]);
    undisturbed(&host, "web", agent);
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    has(
        &host.refused_start(&[]),
        &[
            "another kmorphd",
            host.path("state").to_str().unwrap(),
            "state directory of its own",
        ],
    );
    undisturbed(&host, "web", agent);
    // A daemon with other directories, but the same control socket.
    let other = Host::prepare(SOUND);
    let socket = host.path("run/kmorphd.sock");
    let text = other.refused_start(&["--socket".as_ref(), socket.as_os_str()]);
    has(
        &text,
        &["another daemon is using the control socket", "kmorphd.sock"],
    );
    undisturbed(&host, "web", agent);
}

#[test]
fn half_a_request_does_not_keep_a_connection_for_ever() {
    let host = Host::new();
    let connect = || {
        let mut stream = UnixStream::connect(host.path("run/kmorphd.sock")).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let head = b"POST /v1/instances HTTP/1.1\r\nHost: kmorph\r\nContent-Length: 100\r\n\r\n{";
        stream.write_all(head).unwrap();
        stream
    };
    // More connections than the daemon serves at once.
    let mut half: Vec<_> = (0..300).map(|_| connect()).collect();
    let now: Vec<InstanceSummary> = host.control().get("/v1/instances");
    assert!(now.is_empty());
    let mut answer = String::new();
    half[0].read_to_string(&mut answer).unwrap();
    has(&answer, &[" 504 ", "no whole request"]);
}

#[test]
fn a_capture_that_cannot_be_is_refused_before_it_begins() {
    let host = Host::new();
    host.spawn_bare("web");
    let agent = host.agent("web");
    std::fs::write(host.path("there"), "").unwrap();
    for (output, code, words) in [
        (
            "core".into(),
            ErrorCode::InvalidRequest,
            "not an absolute path",
        ),
        ("/".into(), ErrorCode::InvalidRequest, "names no file"),
        (
            host.path("there"),
            ErrorCode::AlreadyExists,
            "exists already",
        ),
        (host.path("none/core"), ErrorCode::InvalidRequest, "none"),
        (
            host.path("there/core"),
            ErrorCode::InvalidRequest,
            "not a directory",
        ),
        // The kernel of that instance is the host's.
        (
            host.path("core"),
            ErrorCode::WrongState,
            "no kernel of its own",
        ),
    ] {
        let path = "/v1/instances/web/vmcore";
        let body = json!({ "output": output });
        let error = host.control().request("POST", path, Some(&body)).refusal();
        assert_eq!(error.code, code, "{output:?}: {error}");
        has(&error.message, &[words]);
    }
    assert_eq!(std::fs::read(host.path("there")).unwrap(), b"");
    let doctor = host
        .control()
        .request("POST", "/v1/doctor", Some(&json!({})))
        .refusal();
    assert_eq!(doctor.code, ErrorCode::WrongState, "{doctor}");
    has(&doctor.message, &["embedded", "nothing to test"]);
    undisturbed(&host, "web", agent);
}
