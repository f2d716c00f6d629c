//! Linux 6.1, 6.12 and 7.3 in QEMU: watched, healed, morphed, adopted.
//!
//! Requires the packages and kernels of `scripts/setup-tests`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kmorph_control_api::{
    EventKind, HealthReport, InstanceState, MorphStatus, OperationState, RecoveryOutcome,
    RecoveryRecord, VmcoreRecord,
};
use kmorph_tests::kernels::Transport;
use kmorph_tests::resp::{Client, Steady};
use kmorph_tests::{Events, Host, kernels, larger_guest, program, published};
use kmorph_vmcore::analysis::{self, AnalysisOptions};
use kmorph_vmcore::{Completeness, Dump};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// Interval between two presses of Ctrl-Alt-Del.
const PRESSED_AGAIN: Duration = Duration::from_secs(5);
const MORPH: &str = "/v1/instances/web/morph";

/// Defines each test for each transport.
macro_rules! over_each_transport {
    ($($test:ident),* $(,)?) => {
        mod virtio {
            $(#[test]
            fn $test() {
                super::$test(super::Transport::Virtio);
            })*
        }
        mod kerf {
            $(#[test]
            fn $test() {
                super::$test(super::Transport::Kerf);
            })*
        }
    };
}

over_each_transport!(
    a_kernel_that_panics_or_hangs_is_healed,
    a_workload_moves_from_6_1_to_the_newest_kernel_and_back,
    a_killed_daemon_adopts_its_kernels_and_undoes_its_morph,
    the_agent_is_a_service_in_a_guest_with_an_init_of_its_own,
);

/// Writes more data than a guest of 256 MiB has to a server without a configured limit.
#[test]
fn a_workload_fits_its_guest() {
    let host = Host::qemu();
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    let mut client = Client::connect(port).unwrap();
    client.call(&["SET", "k", "v"]).unwrap();
    let full = client.fill(384, 1 << 20).unwrap_err();
    assert!(full.to_string().contains("OOM"), "{full}");
    assert_eq!(get(port, "k"), "v", "what was acknowledged is still there");
    let now = host.control().instance("web").summary;
    assert_eq!((now.workload_failures, now.recoveries), (0, 0));
}

/// Like the previous test, with a server whose limit exceeds the memory.
#[test]
fn a_workload_that_its_kernel_kills_for_want_of_memory_is_recorded() {
    let host = Host::qemu();
    let body = json!({
        "name": "web",
        "kernel": kernels::debian("6.1"),
        "workload": { "program": "kmorph-kv", "args": ["--max-memory", "1gb"] },
        "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": 6379 }],
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let port = published(&host.control().instance("web"));
    let mut client = Client::connect(port).unwrap();
    assert!(client.fill(384, 1 << 20).is_err());
    let recorded = recovered(&host);
    assert_eq!(
        (recorded.failed_generation, recorded.new_generation),
        (1, Some(1))
    );
    assert!(recorded.evidence[0].contains("oom_kill"), "{recorded:?}");
    let now = host.control().instance("web").summary;
    assert_eq!((now.workload_failures, now.recoveries), (1, 0));
}

fn run_dir(host: &Host) -> PathBuf {
    host.control().instance("web").run_dir.into()
}

fn recovered(host: &Host) -> RecoveryRecord {
    host.control().wait("the recovery to end", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        let last = all.into_iter().next_back();
        last.filter(|r| r.outcome == RecoveryOutcome::Recovered)
    })
}

fn ping(port: u16) {
    let mut client = Client::connect(port).unwrap();
    assert_eq!(client.call(&["PING"]).unwrap(), "PONG");
}

fn get(port: u16, key: &str) -> String {
    Client::connect(port).unwrap().call(&["GET", key]).unwrap()
}

fn a_kernel_that_panics_or_hangs_is_healed(transport: Transport) {
    let host = Host::qemu_over(transport);
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), kernels::PANICS_ON_NMI);
    ping(port);
    let first = host.control().instance("web");
    assert!(
        first.summary.kernel_release.starts_with("6.1."),
        "{first:?}"
    );

    let capture = json!({ "vmcore": "on" });
    host.control().set_policy("web", &capture);
    kernels::qmp(&run_dir(&host), "inject-nmi");
    host.control().wait("the panic to be noticed", || {
        let state = host.control().instance("web").summary.state;
        (state != InstanceState::Running).then_some(())
    });
    // A connection made meanwhile waits, and the successor serves the client.
    ping(port);
    assert_eq!(host.successor_of("web", 1).summary.generation, 2);
    let record = recovered(&host);
    assert!(
        record.evidence.iter().any(|e| e.contains("panicked")),
        "{record:?}"
    );
    let vmcore = captured(record, 1);
    assert!(vmcore.panic.unwrap().contains("NMI"));
    let log = std::fs::read_to_string(vmcore.log_path.unwrap()).unwrap();
    assert!(log.contains("Kernel panic - not syncing: NMI"), "{log}");

    kernels::qmp(&run_dir(&host), "stop");
    assert_eq!(host.successor_of("web", 2).summary.generation, 3);
    let record = recovered(&host);
    assert!(
        record.evidence.iter().any(|e| e.contains("silent")),
        "{record:?}"
    );
    assert!(
        record
            .evidence
            .iter()
            .any(|e| e.contains("executes nothing")),
        "{record:?}"
    );
    captured(record, 1);
    ping(port);
}

/// The kernel image is in its module directory, as newer packages install it.
#[test]
fn the_newest_kernel_panics_and_is_captured_and_healed() {
    let host = Host::qemu();
    let series = kernels::newest();
    let image = kernels::debian(&series).canonicalize().unwrap();
    let port = host.spawn_kv_on("web", &image, kernels::PANICS_ON_NMI);
    ping(port);
    host.control().set_policy("web", &json!({ "vmcore": "on" }));
    kernels::qmp(&run_dir(&host), "inject-nmi");
    assert_eq!(host.successor_of("web", 1).summary.generation, 2);
    ping(port);
    let vmcore = captured_of(recovered(&host), 1, &series);
    assert!(vmcore.panic.as_ref().unwrap().contains("NMI"), "{vmcore:?}");
    let dump = Dump::open(Path::new(vmcore.path.as_ref().unwrap()));
    let dump = dump.unwrap().unwrap();
    let report = analysis::analyse(&dump, AnalysisOptions::default()).unwrap();
    assert_eq!(report.file.level, Some(31), "{:?}", report.file);
    assert!(
        report.cpus.iter().all(|cpu| cpu.at.is_some()),
        "{:?}",
        report.cpus
    );
    assert!(report.memory.kinds.is_some(), "{:?}", report.problems);
}

/// Returns the vmcore of a kernel of the 6.1 series; see [`captured_of`].
fn captured(record: RecoveryRecord, cpus: usize) -> VmcoreRecord {
    captured_of(record, cpus, "6.1")
}

/// Returns the vmcore of a recovery, which must be complete, of this series, and with the registers of `cpus` CPUs.
fn captured_of(record: RecoveryRecord, cpus: usize, series: &str) -> VmcoreRecord {
    let vmcore = record.vmcore.unwrap();
    assert_eq!(vmcore.error, None);
    let path = PathBuf::from(vmcore.path.as_ref().unwrap());
    let dump = Dump::open(&path).unwrap().unwrap();
    assert_eq!(dump.completeness(), Completeness::Complete);
    let report = analysis::analyse(&dump, AnalysisOptions::default()).unwrap();
    let release = report.kernel.unwrap().release.unwrap();
    assert!(release.starts_with(&format!("{series}.")), "{release}");
    let known = report.cpus.iter().flat_map(|cpu| &cpu.registers);
    assert_eq!(known.filter(|(name, _)| *name == "RIP").count(), cpus);
    vmcore
}

#[test]
fn a_memory_that_must_be_captured_is_kept_until_it_is() {
    let host = Host::qemu();
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    let required = json!({ "vmcore": "required" });
    host.control().set_policy("web", &required);
    // A file blocks the path of the directory.
    let obstacle = host.path("state/vmcore");
    std::fs::write(&obstacle, "").unwrap();
    // Not even QEMU is left; the daemon holds the memory.
    kill(Pid::from_raw(qemu_of(&run_dir(&host))), Signal::SIGKILL).unwrap();
    let kept = host.control().wait("an operator to be asked", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::OperatorActionNeeded).then_some(now)
    });
    assert!(kept.reason.unwrap().contains("vmcore.dir"));
    assert_eq!(kept.summary.generation, 1);

    std::fs::remove_file(&obstacle).unwrap();
    host.control()
        .succeed("POST", "/v1/instances/web/recover", None);
    let record = recovered(&host);
    assert_eq!(record.failed_generation, 1);
    // No process that knows the registers is left.
    captured(record, 0);
    ping(port);
}

fn a_workload_moves_from_6_1_to_the_newest_kernel_and_back(transport: Transport) {
    let newest = kernels::newest();
    let mut others = vec!["6.12", &newest, "6.1"];
    // Over kerf-vsock, only `make new-kernel` uses the newest kernel: its module requires tools that some machines
    // cannot have.
    if transport == Transport::Kerf && std::env::var_os("KMORPH_NEWEST_SERIES").is_none() {
        others = vec!["6.12", "6.1"];
    }
    let host = Host::qemu_over(transport);
    let events = Events::follow(host.control());
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    let mut client = Client::connect(port).unwrap();
    let value = "x".repeat(100_000);
    for key in 0..50 {
        client.call(&["SET", &format!("k{key}"), &value]).unwrap();
    }
    for (series, breaks) in others.into_iter().zip(1..) {
        let steady = Steady::start(port, Duration::from_millis(5));
        let ended = morph(&host, series);
        assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
        let now = host.control().instance("web");
        let wanted = format!("{series}.");
        assert!(now.summary.kernel_release.starts_with(&wanted), "{now:?}");
        assert_eq!(now.summary.morphs, breaks);
        let proof = events.wait("a vmcore to be proven readable", |event| {
            event.kind == EventKind::Vmcore && event.generation == Some(now.summary.generation)
        });
        let proof = proof.event.message;
        assert_eq!(proof, "a vmcore of its new kernel could be read whole");
        ping(port);
        let seen = steady.stop();
        // The client's one connection may break, with an error; no answer is wrong.
        assert!(seen.failed <= 1 && seen.wrong == 0, "{seen:?}");
        for key in 0..50 {
            assert_eq!(get(port, &format!("k{key}")), value);
        }
    }
}

fn morph(host: &Host, series: &str) -> kmorph_control_api::Operation {
    // Under software emulation, the budget is not under test.
    let body = json!({
        "kernel": kernels::debian(series), "auto_validate": true, "auto_commit": true,
        "force": true,
    });
    host.control().operate("POST", MORPH, Some(&body))
}

fn a_killed_daemon_adopts_its_kernels_and_undoes_its_morph(transport: Transport) {
    let mut host = Host::qemu_over(transport);
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    let before = host.control().instance("web");
    host.restart_by_kill();
    let now = host.control().instance("web");
    assert_eq!(now.processes, before.processes);
    assert_eq!(get(port, "k"), "v");

    let body = json!({ "kernel": kernels::debian("6.12"), "auto_validate": true });
    host.control().succeed("POST", MORPH, Some(&body));
    let status: MorphStatus = host.control().get(MORPH);
    assert_eq!(status.to_generation, 2);
    host.restart_by_kill();
    let now = host.control().wait("the source kernel to serve", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Running).then_some(now)
    });
    assert_eq!(now.summary.generation, 1);
    assert_eq!(now.processes, before.processes);
    assert_eq!(get(port, "k"), "v");
    assert!(!host.path("run/instances/web/2/qmp.sock").exists());
}

#[test]
fn a_new_kernel_that_dies_in_a_morph_is_rolled_back_from() {
    let host = Host::qemu();
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    let body = json!({ "kernel": kernels::debian("6.12"), "auto_validate": true });
    host.control().succeed("POST", MORPH, Some(&body));
    let pid = qemu_of(&host.path("run/instances/web/2"));
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let now = host.control().wait("the rollback", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Running).then_some(now)
    });
    assert_eq!(now.summary.generation, 1);
    assert_eq!(get(port, "k"), "v");
}

/// Returns the QEMU process that runs from `run_dir`.
fn qemu_of(run_dir: &std::path::Path) -> i32 {
    let wanted = run_dir.as_os_str().as_encoded_bytes();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_str().unwrap_or("").parse::<i32>() else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let is_qemu = line.starts_with(b"qemu");
        if is_qemu && line.windows(wanted.len()).any(|part| part == wanted) {
            return pid;
        }
    }
    panic!("no QEMU runs from {run_dir:?}");
}

#[test]
fn a_guest_that_stood_still_for_a_while_is_reached_again() {
    let host = Host::qemu();
    let port = host.spawn_kv_on("web", &kernels::debian("6.1"), "");
    host.control()
        .set_policy("web", &json!({ "heartbeat_timeout_s": 60.0 }));
    let qemu = Pid::from_raw(host.control().instance("web").processes["qemu"]);
    kill(qemu, Signal::SIGSTOP).unwrap();
    // The daemon gives up its connection to the guest, and the client receives an error.
    let mut client = Client::connect(port).unwrap();
    assert!(client.call(&["PING"]).is_err());
    kill(qemu, Signal::SIGCONT).unwrap();
    ping(port);
    assert_eq!(host.control().instance("web").summary.recoveries, 0);
}

fn the_agent_is_a_service_in_a_guest_with_an_init_of_its_own(transport: Transport) {
    let host = Host::qemu_over(transport);
    let kernel = kernels::debian("6.1");
    let body = json!({
        "name": "web",
        "kernel": kernel,
        "initramfs": larger_guest::build(&host.path(""), &kernel, transport, larger_guest::STOPS_ITS_AGENT),
        "workload": { "program": larger_guest::KV_IN_GUEST, "args": [] },
        "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": 6379 }],
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let now = host.control().instance("web");
    assert!(now.summary.kernel_release.starts_with("6.1."), "{now:?}");
    ping(published(&now));
    // The guest's kernel keeps running without the agent, and reports that.
    kernels::press_ctrl_alt_del(&run_dir(&host));
    let record = host.control().wait("the silence to be judged", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        all.into_iter().next()
    });
    assert_eq!(record.cause, "agent_dead", "{record:?}");
    host.control()
        .succeed("DELETE", "/v1/instances/web?force=true", None);
}

#[test]
fn a_cpu_that_hangs_is_named_and_a_failure_where_policy_says_so_on_6_1() {
    a_cpu_that_hangs_is_noticed("6.1");
}

#[test]
fn a_cpu_that_hangs_is_named_and_a_failure_where_policy_says_so_on_6_12() {
    a_cpu_that_hangs_is_noticed("6.12");
}

#[test]
fn a_cpu_that_hangs_is_named_and_a_failure_where_policy_says_so_on_the_newest() {
    a_cpu_that_hangs_is_noticed(&kernels::newest());
}

/// CPU 1 of two spins with interrupts off; the other CPU answers.
fn a_cpu_that_hangs_is_noticed(series: &str) {
    let host = Host::qemu();
    let kernel = kernels::debian(series);
    let (dir, then) = (host.path(""), larger_guest::HANGS_CPU_1);
    let body = json!({
        "name": "web",
        "kernel": kernel,
        // An emulated machine with two CPUs often misses the timer check of 6.1 at boot.
        "kernel_cmdline": "no_timer_check",
        "cpus": 2,
        "initramfs": larger_guest::build(&dir, &kernel, Transport::Virtio, then),
        "workload": { "program": larger_guest::KV_IN_GUEST, "args": [] },
        "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": 6379 }],
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let port = published(&host.running("web"));
    // On a busy machine, each of two emulated CPUs can be late by more than a second.
    host.control()
        .set_policy("web", &json!({ "heartbeat_timeout_s": 3.0 }));
    // The keyboard driver may start later than the agent: earlier key presses are lost.
    let mut pressed: Option<Instant> = None;
    let now = host.control().wait("it to be noticed", || {
        let now = host.control().instance("web");
        let runs = now.summary.state == InstanceState::Running;
        if runs && pressed.is_none_or(|at| at.elapsed() > PRESSED_AGAIN) {
            kernels::press_ctrl_alt_del(Path::new(&now.run_dir));
            pressed = Some(Instant::now());
        }
        let noticed = now.summary.state == InstanceState::Degraded || now.summary.generation > 1;
        noticed.then_some(now)
    });
    assert_eq!(now.summary.generation, 1, "{now:?}");
    let reason = now.reason.unwrap();
    assert!(reason.starts_with("CPU 1 is stuck: "), "{reason}");
    assert_eq!(host.control().instance("web").summary.recoveries, 0);

    host.control()
        .set_policy("web", &json!({ "stuck_cpu": "failed" }));
    let record = host.control().wait("it to be failed", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        all.into_iter().next()
    });
    assert_eq!(record.cause, "kernel_dead", "{record:?}");
    assert!(
        record.evidence[0].starts_with("CPU 1 is stuck: "),
        "{record:?}"
    );
    assert_eq!(host.successor_of("web", 1).summary.generation, 2);
    ping(port);
}

#[test]
fn an_image_that_is_no_kernel_and_memory_too_small_are_refused() {
    let host = Host::qemu();
    let path = host.path("noise");
    std::fs::write(&path, vec![7; 100_000]).unwrap();
    let body = json!({ "name": "web", "kernel": path });
    let refusal = host
        .control()
        .request("POST", "/v1/instances", Some(&body))
        .refusal();
    assert!(refusal.message.contains("noise"), "{refusal:?}");
    let body = json!({
        "name": "web", "kernel": kernels::debian("6.1"), "memory_bytes": 64 << 20,
    });
    let ended = host.control().operate("POST", "/v1/instances", Some(&body));
    let error = ended.error.unwrap();
    assert!(error.message.contains("64 MiB are not enough"), "{error:?}");
    let body = json!({
        "name": "web", "kernel": kernels::debian("6.1"), "initramfs": host.path("none"),
    });
    let ended = host.control().operate("POST", "/v1/instances", Some(&body));
    let error = ended.error.unwrap();
    assert!(error.message.contains("none"), "{error:?}");
    assert!(error.message.contains("is not a file"), "{error:?}");
    let all: Vec<serde_json::Value> = host.control().get("/v1/instances");
    assert!(all.is_empty(), "{all:?}");
}

#[test]
fn a_guest_with_too_much_to_do_is_shown_as_overloaded_and_left_alone() {
    let host = Host::qemu();
    let events = Events::follow(host.control());
    let body = json!({
        "name": "web",
        "kernel": kernels::debian("6.1"),
        "workload": { "program": program("kmorph-test-load"), "args": [] },
        "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": 6379 }],
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    let said = |words: &'static str| {
        let event = events.wait(words, |event| {
            event.kind == EventKind::Detector && event.message.starts_with(words)
        });
        event.event.message
    };
    let evidence = said("overloaded");
    assert!(
        evidence.contains("its programs waited for a CPU"),
        "{evidence}"
    );
    let now = host.control().wait("it to be degraded", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::Degraded).then_some(now)
    });
    assert_eq!(now.reason.as_ref(), Some(&evidence));
    let health: HealthReport = host.control().get("/v1/instances/web/health");
    assert_eq!(health.reason, Some(evidence));
    assert!(health.metrics.unwrap().cpu_pressure_percent.unwrap() >= 90.0);
    // The load ends.
    let _stop = std::net::TcpStream::connect(("127.0.0.1", published(&now))).unwrap();
    said("not overloaded any more");
    let now = host.running("web");
    assert_eq!((now.summary.generation, now.summary.recoveries), (1, 0));
}
