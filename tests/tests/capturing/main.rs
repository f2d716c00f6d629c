//! `vmcore capture`: the memory of real kernels that live, that have failed, and that are frozen when the capture or
//! the daemon ends. And `doctor`, which tests that a failed kernel would be captured.
//!
//! Requires the packages and kernels of `scripts/setup-tests`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod by_survivors;

use std::path::Path;

use kmorph_control_api::{
    CaptureReport, DaemonStatus, DoctorReport, ErrorCode, EventKind, InstanceState, InstanceStatus,
    Operation, OperationState,
};
use kmorph_tests::kernels::Transport;
use kmorph_tests::resp::Client;
use kmorph_tests::{Events, Host, kernels};
use kmorph_vmcore::analysis::{self, AnalysisOptions};
use kmorph_vmcore::{Completeness, Dump};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::Uid;
use serde_json::{Value, json};

const CAPTURE: &str = "/v1/instances/web/vmcore";
/// A rate limit low enough that the guest is still frozen during the steps of a test.
const SLOW: &str = "backend = \"qemu\"\n[vmcore]\nrate_mib_s = 8\nlevel = 0\n";

fn report(ended: Operation) -> CaptureReport {
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    serde_json::from_value(ended.result.unwrap()).unwrap()
}

fn output(path: &Path) -> Value {
    json!({ "output": path })
}

/// Checks with kmorph's own reader that the vmcore is complete and has the registers of its one CPU.
fn assert_whole(path: &Path) {
    let dump = Dump::open(path).unwrap().unwrap();
    assert_eq!(dump.completeness(), Completeness::Complete);
    let report = analysis::analyse(&dump, AnalysisOptions::default()).unwrap();
    assert_eq!(report.file.checksum, "holds");
    assert!(report.kernel.unwrap().release.unwrap().starts_with("6.1."));
    assert!(report.log.unwrap().text.contains("Linux version 6.1."));
    assert_eq!(report.cpus.len(), 1);
}

fn a_kernel_that_lives_is_frozen_and_goes_on(transport: Transport) {
    let host = Host::qemu_over(transport);
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    let mut client = Client::connect(port).unwrap();
    client.call(&["SET", "k", "v"]).unwrap();
    let before = host.control().instance("web");
    let events = Events::follow(host.control());
    for number in 0..3 {
        let path = host.path(&format!("core-{number}"));
        let ended = host
            .control()
            .operate("POST", CAPTURE, Some(&output(&path)));
        let report = report(ended);
        assert!(report.frozen_ms.unwrap() > 0.0, "{report:?}");
        assert_eq!((report.panic, report.log_error), (None, None));
        assert_eq!(Path::new(&report.path), path);
        assert_whole(&path);
        // The connection from before the capture still works.
        assert_eq!(client.call(&["GET", "k"]).unwrap(), "v");
    }
    let log = events.wait("its log", |event| event.kind == EventKind::Vmcore);
    let tail = log.event.detail["kernel_log_tail"].as_str().unwrap();
    assert!(tail.contains("] NET: Registered"), "{tail}");
    let done = events.wait("the dump", |event| event.kind == EventKind::Vmcore);
    assert!(done.event.message.starts_with("captured: "), "{done:?}");
    let now = host.running("web");
    assert_eq!(now.processes, before.processes);
    assert_eq!(now.summary.recoveries, 0);
    // A new connection: the forwarder points at the instance again.
    assert_eq!(
        Client::connect(port).unwrap().call(&["GET", "k"]).unwrap(),
        "v"
    );
}

mod over_virtio {
    #[test]
    fn a_kernel_that_lives_is_frozen_and_goes_on() {
        super::a_kernel_that_lives_is_frozen_and_goes_on(super::Transport::Virtio);
    }
}

mod over_kerf {
    #[test]
    fn a_kernel_that_lives_is_frozen_and_goes_on() {
        super::a_kernel_that_lives_is_frozen_and_goes_on(super::Transport::Kerf);
    }
}

/// Begins a capture and waits until its reader makes progress.
fn begin(host: &Host, path: &Path) -> Operation {
    let reply = host.control().request("POST", CAPTURE, Some(&output(path)));
    let begun: Operation = reply.ok();
    host.control().wait("the memory to be read", || {
        let now: Operation = host.control().get(&format!("/v1/operations/{}", begun.id));
        assert!(!now.is_over(), "{now:?}");
        (now.progress.total > 0 && now.progress.done > 0).then_some(())
    });
    let now = host.control().instance("web");
    assert_eq!(now.summary.state, InstanceState::Unresponsive);
    assert!(now.reason.unwrap().contains("being captured"));
    assert_eq!(kernels::guest_status(Path::new(&now.run_dir)), "paused");
    begun
}

#[test]
fn silence_while_it_is_frozen_says_nothing_and_its_end_is_found_at_once() {
    let host = Host::with(&format!(
        "{SLOW}[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\n"
    ));
    host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    let events = Events::follow(host.control());
    let begun = begin(&host, &host.path("core"));
    let frozen = std::time::Instant::now();
    host.control().wait("three timeouts to pass", || {
        (frozen.elapsed() > std::time::Duration::from_secs(3)).then_some(())
    });
    let now = host.control().instance("web");
    assert_eq!(
        (now.summary.state, now.summary.recoveries),
        (InstanceState::Unresponsive, 0)
    );
    let qemu = nix::unistd::Pid::from_raw(now.processes["qemu"]);
    nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGKILL).unwrap();
    events.wait("its end", |event| {
        event.message.contains("ended by signal 9")
    });
    let now = host.control().instance("web");
    assert_eq!(now.summary.state, InstanceState::Failed, "{now:?}");
    let still: Operation = host.control().get(&format!("/v1/operations/{}", begun.id));
    assert!(!still.is_over(), "its memory is read to its end: {still:?}");
    let cancel = format!("/v1/operations/{}/cancel", begun.id);
    let _ = host.control().request("POST", &cancel, None);
    host.successor_of("web", 1);
}

#[test]
fn whatever_ends_a_capture_its_kernel_goes_on() {
    let mut host = Host::with(SLOW);
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    let before = host.control().instance("web");
    let run_dir = std::path::PathBuf::from(&before.run_dir);
    let mut client = Client::connect(port).unwrap();
    client.call(&["SET", "k", "v"]).unwrap();
    let (path, partial) = (host.path("core"), host.path("core.partial"));

    let begun = begin(&host, &path);
    for (method, path, body) in [
        ("DELETE", "/v1/instances/web", None),
        ("POST", "/v1/instances/web/recover", None),
        ("POST", CAPTURE, Some(output(&host.path("second")))),
    ] {
        let refused = host
            .control()
            .request(method, path, body.as_ref())
            .refusal();
        assert_eq!(
            refused.code,
            ErrorCode::WrongState,
            "{method} {path}: {refused}"
        );
        assert!(refused.message.contains("being captured"), "{refused}");
    }
    let cancel = format!("/v1/operations/{}/cancel", begun.id);
    let _: Operation = host.control().request("POST", &cancel, None).ok();
    let ended = host.control().finished(&begun.id);
    assert_eq!(ended.state, OperationState::Cancelled, "{ended:?}");
    assert_eq!(client.call(&["GET", "k"]).unwrap(), "v");
    assert!(!path.exists() && !partial.exists());
    host.running("web");

    // A killed daemon cannot resume the guest, so the next daemon does.
    begin(&host, &path);
    host.kill_daemon();
    assert_eq!(kernels::guest_status(&run_dir), "paused");
    host.start();
    assert_eq!(host.running("web").processes, before.processes);
    assert_eq!(
        Client::connect(port).unwrap().call(&["GET", "k"]).unwrap(),
        "v"
    );
    assert!(!path.exists() && partial.exists());

    // A daemon that is told to stop resumes the guest first.
    begin(&host, &path);
    let _: Value = host
        .control()
        .request(
            "POST",
            "/v1/daemon/stop",
            Some(&json!({ "graceful": false })),
        )
        .ok();
    assert!(host.daemon_ended().success());
    assert_eq!(kernels::guest_status(&run_dir), "running");
    assert!(!path.exists() && !partial.exists());
    host.start();
    assert_eq!(host.running("web").processes, before.processes);
}

#[test]
fn what_has_failed_and_is_not_healed_is_captured_as_it_is() {
    let host = Host::qemu();
    host.spawn_kv_on("web", &kernels::debian("6.1"), kernels::PANICS_ON_NMI);
    let alone = json!({ "auto_heal": false });
    host.control().set_policy("web", &alone);
    let run_dir = host.control().instance("web").run_dir;
    kernels::qmp(Path::new(&run_dir), "inject-nmi");
    let failed = || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Failed).then_some(now)
    };
    host.control().wait("the panic to be noticed", failed);
    let path = host.path("core");
    let report = report(
        host.control()
            .operate("POST", CAPTURE, Some(&output(&path))),
    );
    assert_eq!(report.frozen_ms, None);
    assert!(report.panic.unwrap().contains("NMI"));
    assert_whole(&path);
    assert!(failed().is_some(), "it stays as it is");
    assert_eq!(kernels::guest_status(Path::new(&run_dir)), "guest-panicked");
    host.control()
        .succeed("POST", "/v1/instances/web/recover", None);
    assert_eq!(host.running("web").summary.generation, 2);
}

/// A small file system, visible to this thread and its children.
struct Disk(std::path::PathBuf);

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn without_room_for_it_the_kernel_goes_on_and_the_file_says_what_it_is() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can mount a small disk");
        return;
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(none, "/", none, private, none).unwrap();
    let mut host = Host::prepare("backend = \"qemu\"\n");
    let disk = Disk(host.path("disk"));
    std::fs::create_dir(&disk.0).unwrap();
    let tmpfs = Some("tmpfs");
    mount(tmpfs, &disk.0, tmpfs, MsFlags::empty(), Some("size=1m")).unwrap();
    host.start();
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    let path = disk.0.join("core");
    let ended = host
        .control()
        .operate("POST", CAPTURE, Some(&output(&path)));
    let error = ended.error.unwrap();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert!(error.message.contains("no space"), "{error}");
    assert!(!path.exists());
    let partial = Dump::open(&disk.0.join("core.partial")).unwrap().unwrap();
    assert!(matches!(
        partial.completeness(),
        Completeness::Incomplete(_)
    ));
    host.running("web");
    assert_eq!(
        Client::connect(port).unwrap().call(&["PING"]).unwrap(),
        "PONG"
    );
    drop(disk);
}

fn doctor() -> Value {
    json!({ "kernel": kernels::debian("6.1") })
}

fn last_doctor(host: &Host) -> DoctorReport {
    let daemon: DaemonStatus = host.control().get("/v1/daemon");
    daemon.last_doctor.unwrap()
}

fn nothing_is_left(host: &Host) {
    let all: Vec<Value> = host.control().get("/v1/instances");
    assert!(all.is_empty(), "{all:?}");
}

#[test]
fn the_self_test_passes_leaves_nothing_and_is_remembered() {
    let mut host = Host::qemu();
    let ended = host
        .control()
        .operate("POST", "/v1/doctor", Some(&doctor()));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    let report = last_doctor(&host);
    assert!(report.passed && report.reason.is_none(), "{report:?}");
    assert!(report.kernel_release.unwrap().starts_with("6.1."));
    assert!(report.panic.unwrap().contains("NMI"));
    assert_eq!(report.cpus, Some(1));
    assert!(report.vmcore_bytes.unwrap() > 1 << 20);
    nothing_is_left(&host);
    assert!(!host.path("state/vmcore/kmorph-doctor").exists());
    // A mistyped kernel is refused before a test begins, and the last result stays.
    let mistyped = json!({ "kernel": "/nope" });
    let refused = host
        .control()
        .request("POST", "/v1/doctor", Some(&mistyped));
    assert_eq!(refused.refusal().code, ErrorCode::KernelUnreadable);
    host.restart_by_kill();
    assert!(last_doctor(&host).passed);
    let metrics = host.control().request("GET", "/metrics", None).body;
    for line in [
        "kmorph_self_test_passed 1\n",
        "kmorph_self_test_age_seconds ",
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
}

#[test]
fn the_self_test_fails_where_nothing_can_be_captured() {
    let host = Host::qemu();
    // A file blocks the path of the directory.
    std::fs::write(host.path("state/vmcore"), "").unwrap();
    let ended = host
        .control()
        .operate("POST", "/v1/doctor", Some(&doctor()));
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let report = last_doctor(&host);
    assert!(!report.passed);
    assert!(report.reason.unwrap().contains("vmcore.dir"));
    nothing_is_left(&host);
}

#[test]
fn what_a_killed_daemon_tested_with_is_thrown_away_by_the_next() {
    let mut host = Host::qemu();
    let begun = host
        .control()
        .request("POST", "/v1/doctor", Some(&doctor()));
    let _: Operation = begun.ok();
    let path = "/v1/instances/kmorph-doctor";
    let test = host.control().wait("its instance to be there", || {
        let found = host.control().request("GET", path, None);
        (found.status == 200).then(|| found.ok::<InstanceStatus>())
    });
    let again = host
        .control()
        .request("POST", "/v1/doctor", Some(&doctor()));
    assert_eq!(again.refusal().code, ErrorCode::WrongState);
    host.restart_by_kill();
    host.control().wait("it to be gone", || {
        let all: Vec<Value> = host.control().get("/v1/instances");
        all.is_empty().then_some(())
    });
    let run_dir = std::path::PathBuf::from(test.run_dir);
    assert!(!run_dir.exists());
}
