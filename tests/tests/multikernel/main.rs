//! Kernels beside an emulated one: watched, healed, morphed, adopted, and shared with the real kerf.
//!
//! Requires root and `/dev/fuse`, and for kerf the setup of `scripts/setup-tests`; skipped without the former.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod capture;
mod kerf;
mod load;
mod release;

use std::process::Command;

use kmorph_control_api::{
    ErrorCode, InstanceState, MorphStatus, OperationState, PoolUsage, RecoveryOutcome,
    RecoveryRecord,
};
use kmorph_emulated_kernel::{Generation, Process};
use kmorph_tests::resp::{Client, Steady};
use kmorph_tests::{DEADLINE, Host, kernels, program};
use libkerf::kernel::Kernel;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const MORPH: &str = "/v1/instances/web/morph";

fn host() -> Option<Host> {
    Host::multikernel(Generation::Confirms)
}

fn kernel(host: &Host) -> Kernel {
    let emulated = host.emulated();
    Kernel::at(emulated.root(), emulated.beside("run/kerf.lock"))
}

fn instances(host: &Host) -> Vec<String> {
    kernel(host).instance_names().unwrap()
}

fn pool(host: &Host) -> PoolUsage {
    let daemon: Value = host.control().get("/v1/daemon");
    serde_json::from_value(daemon["pool"].clone()).unwrap()
}

fn ping(port: u16) {
    let mut client = Client::connect(port).unwrap();
    assert_eq!(client.call(&["PING"]).unwrap(), "PONG");
}

fn get(port: u16, key: &str) -> String {
    Client::connect(port).unwrap().call(&["GET", key]).unwrap()
}

fn recovered(host: &Host, generation: u64) -> RecoveryRecord {
    host.control().wait("the recovery to end", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        let mut ended = all.into_iter();
        ended.find(|r| r.failed_generation == generation && r.outcome == RecoveryOutcome::Recovered)
    })
}

/// Runs the real kerf in a namespace where the emulated files replace the kernel's, with the lock and the records of
/// the test; returns its output on success.
fn run_kerf(host: &Host, arguments: &str) -> Result<String, String> {
    let emulated = host.emulated();
    let records = emulated.beside("records");
    std::fs::create_dir_all(&records).unwrap();
    let script = format!(
        "mount -t tmpfs none /sys/fs && mkdir /sys/fs/multikernel && \
         mount --bind {} /sys/fs/multikernel && mount --bind {} /run && \
         mount -t tmpfs none /var/lib && mkdir -p /var/lib/kerf/instances && \
         mount --bind {} /var/lib/kerf/instances && exec {} under {} {} {arguments}",
        emulated.root().display(),
        emulated.beside("run").display(),
        records.display(),
        program("kmorph-emulated-kernel").display(),
        emulated.beside("").display(),
        kernels::cache().join("tools/kerf/bin/kerf").display(),
    );
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    match output.status.success() {
        true => Ok(said),
        false => Err(said),
    }
}

fn kerf_does(host: &Host, arguments: &str) -> String {
    run_kerf(host, arguments).unwrap_or_else(|said| panic!("kerf {arguments}: {said}"))
}

#[test]
fn a_kernel_that_panics_or_hangs_is_healed() {
    let Some(host) = host() else { return };
    let port = host.spawn_kv("web");
    ping(port);
    let first = host.running("web");
    assert_eq!(first.summary.kernel_release, "6.1.0-a");
    assert!(first.processes.is_empty(), "{first:?}");

    // The only sign of the panic is the status `loaded`.
    host.emulated().strike("panic", "web");
    host.control().wait("the panic to be noticed", || {
        // Until the daemon sees the end, the instance is only silent, and still receives connections.
        let state = host.control().instance("web").summary.state;
        let serves = [InstanceState::Running, InstanceState::Unresponsive];
        (!serves.contains(&state)).then_some(())
    });
    // A connection made meanwhile waits, and the successor serves the client.
    ping(port);
    assert_eq!(host.successor_of("web", 1).summary.generation, 2);
    let record = recovered(&host, 1);
    let says =
        |record: &RecoveryRecord, word: &str| record.evidence.iter().any(|e| e.contains(word));
    assert!(says(&record, "panicked"), "{record:?}");
    assert_eq!(record.fence.as_deref(), Some("cpus_parked"));

    // The status stays `active`: the only sign of the hang is silence.
    host.emulated().strike("hang", "web");
    assert_eq!(host.successor_of("web", 2).summary.generation, 3);
    let record = recovered(&host, 2);
    assert!(says(&record, "silent"), "{record:?}");
    assert_eq!(record.fence.as_deref(), Some("cpus_parked"));
    ping(port);
    assert_eq!(instances(&host), ["web"]);
}

#[test]
fn a_kernel_that_ends_while_it_boots_is_said_to_and_where_its_console_is() {
    let config = "[defaults]\nauto_heal = false\nheartbeat_timeout_s = 1.0\n\
                  [limits]\nstart_timeout_s = 1.0\nstop_timeout_s = 0.5\n";
    let Some(mut host) = Host::prepare_multikernel(Generation::Confirms, config) else {
        return;
    };
    host.start();
    let initramfs = host.path("broken.img");
    std::fs::write(&initramfs, "no archive").unwrap();
    let spawn = |cmdline: &str| {
        let body = json!({
            "name": "web", "kernel": host.kernel("6.1.0-a"), "initramfs": initramfs,
            "kernel_cmdline": cmdline,
        });
        let ended = host.control().operate("POST", "/v1/instances", Some(&body));
        assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
        ended.error.unwrap()
    };
    let error = spawn("");
    let said = &error.message;
    assert!(said.contains("ended while it booted"), "{said}");
    assert!(said.contains("kerf start --console"), "{said}");
    assert!(instances(&host).is_empty());
    // This kernel halts instead: the only sign is its silence.
    let error = spawn("panic=0");
    let hint = error.next_step.unwrap();
    assert!(error.message.contains("healthy"), "{}", error.message);
    assert!(hint.contains("kerf start --console"), "{hint}");
}

#[test]
fn a_machine_without_vsock_between_kernels_is_told_at_the_start_what_works_without() {
    let Some(host) = Host::prepare_multikernel(Generation::Confirms, "") else {
        return;
    };
    // The machine that runs this test has no such transport.
    host.configure(&format!(
        "backend = \"multikernel\"\n[multikernel]\nroot = \"{0}/multikernel\"\n\
         lock = \"{0}/run/kerf.lock\"\nrecords = \"{0}/records\"\n",
        host.path("kernel").display()
    ));
    let said = host.refused_start(&[]);
    assert!(said.contains("CONFIG_MULTIKERNEL_VSOCKETS"), "{said}");
    assert!(said.contains("What works: kerf create"), "{said}");
}

#[test]
fn a_workload_moves_to_another_kernel_and_back() {
    let Some(host) = host() else { return };
    let port = host.spawn_kv("web");
    let mut client = Client::connect(port).unwrap();
    for key in 0..50 {
        client.call(&["SET", &format!("k{key}"), "value"]).unwrap();
    }
    for (release, kernel_instance) in [("6.12.9-b", "web+b"), ("6.1.0-a", "web")] {
        let steady = Steady::start(port, std::time::Duration::from_millis(5));
        let ended = host.control().morph("web", &host.kernel(release));
        assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
        let now = host.running("web");
        assert_eq!(now.summary.kernel_release, release);
        assert_eq!(host.emulated().strike("release", kernel_instance), release);
        // The old generation is fenced, and its kernel instance is released.
        host.control().wait("the old one to be gone", || {
            (instances(&host) == [kernel_instance]).then_some(())
        });
        let seen = steady.stop();
        // The client's one connection may break, with an error; no answer is wrong.
        assert!(seen.failed <= 1 && seen.wrong == 0, "{seen:?}");
        assert_eq!(get(port, "k49"), "value");
    }
}

#[test]
fn what_a_killed_emulator_leaves_mounted_is_taken_away() {
    let Some(host) = host() else { return };
    host.spawn_bare("web");
    let place = host.emulated().beside("");
    let mounted = || {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(&*place.to_string_lossy())
    };
    assert!(mounted());
    kill(Pid::from_raw(host.emulated().pid()), Signal::SIGKILL).unwrap();
    drop(host);
    assert!(!mounted() && !place.exists());
}

/// Hides the kernel's files behind other files, which are invalid, until drop.
struct Hidden(std::path::PathBuf);

impl Hidden {
    fn behind(host: &Host) -> Self {
        let (root, other) = (host.emulated().root(), host.path("other"));
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("instances"), "no directory").unwrap();
        let none = None::<&str>;
        mount(Some(&other), &root, none, MsFlags::MS_BIND, none).unwrap();
        Self(root)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn files_that_fail_are_said_to_once_and_how_often_they_did() {
    let Some(host) = host() else { return };
    host.spawn_bare("web");
    host.running("web");
    let hidden = Hidden::behind(&host);
    host.emulated().strike("hang", "web");
    host.control().wait("an operator to be asked", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::OperatorActionNeeded).then_some(())
    });
    // The log is written concurrently with the answers.
    let line = |part: &str| {
        let lines = host.control().wait("it to be in the log", || {
            let log = std::fs::read_to_string(host.path("kmorphd.log")).unwrap();
            let lines = log.lines().filter(|line| line.contains(part));
            let lines: Vec<String> = lines.map(str::to_owned).collect();
            (!lines.is_empty()).then_some(lines)
        });
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines[0].clone()
    };
    let given_up = line("the fence is not tried any more");
    assert!(given_up.contains("5 times in "), "{given_up}");
    line("the fence is not confirmed");
    let unseen = line("it was not observed while it was silent");
    assert!(unseen.contains(" times in "), "{unseen}");
    line("it cannot be observed");
    drop(hidden);
    host.control()
        .succeed("POST", "/v1/instances/web/recover", None);
    host.successor_of("web", 1);
}

#[test]
fn an_emulator_ends_while_its_files_are_in_use() {
    if !Process::is_possible() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let (own, agent) = (program("kmorph-emulated-kernel"), program("kmorph-agent"));
    let emulated = Process::start(&own, place.path(), &agent, Generation::Confirms);
    let pid = Pid::from_raw(emulated.pid());
    let held = std::fs::File::open(emulated.root().join("device_tree")).unwrap();
    let (ended, told) = std::sync::mpsc::channel();
    let ending = std::thread::spawn(move || {
        drop(emulated);
        ended.send(()).unwrap();
    });
    let in_time = told.recv_timeout(DEADLINE);
    if in_time.is_err() {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    ending.join().unwrap();
    drop(held);
    in_time.expect("it ends though a file is open");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*place.path().to_string_lossy()));
}

#[test]
fn what_is_terminated_leaves_nothing_and_the_pool_is_the_kernels() {
    let Some(host) = host() else { return };
    let pool = || pool(&host);
    let whole = pool();
    assert_eq!(whole.cpus, [8, 10, 12, 14, 16, 18]);
    assert_eq!(
        (whole.cpus_shared, whole.memory_bytes),
        (false, 0xc000_0000)
    );
    host.spawn_kv("web");
    let holds = kernel(&host).instance("web").unwrap();
    let taken = pool();
    assert!(
        !taken
            .cpus_free
            .iter()
            .any(|cpu| holds.cpus.contains(&u64::from(*cpu)))
    );
    assert_eq!(taken.cpus_free.len(), 5);
    let body = json!({ "name": "large", "kernel": host.kernel("6.1.0-a"), "cpus": 6 });
    let refused = host
        .control()
        .request("POST", "/v1/instances", Some(&body))
        .refusal();
    assert!(refused.message.contains("5 of the pool's 6"), "{refused:?}");
    // [pool] has no effect here.
    assert!(refused.next_step.unwrap().contains("kerf init"));
    let daemon: Value = host.control().get("/v1/daemon");
    assert_eq!(daemon["can_self_test"], false);
    let refused = host
        .control()
        .request("POST", "/v1/doctor", Some(&json!({})))
        .refusal();
    assert_eq!(refused.code, ErrorCode::NotImplemented, "{refused}");
    for force in [false, true] {
        let path = format!("/v1/instances/web?force={force}");
        host.control().succeed("DELETE", &path, None);
        assert!(instances(&host).is_empty());
        assert!(!host.emulated().beside("records/web.json").exists());
        assert_eq!(pool(), whole);
        if !force {
            host.spawn_kv("web");
        }
    }
    // This instance does not answer a request to halt: the kernel waits for the answer, and blocks all changes
    // meanwhile.
    host.spawn_kv("web");
    host.emulated().strike("hang", "web");
    host.control().succeed("DELETE", "/v1/instances/web", None);
    assert!(instances(&host).is_empty());
}

#[test]
fn a_morph_that_lacks_only_the_kernels_bookkeeping_is_refused_before_it_begins() {
    let Some(host) = host() else { return };
    let half = pool(&host).memory_bytes / 2;
    let spawn = |memory_bytes: u64| {
        let kernel = host.kernel("6.1.0-a");
        let body = json!({ "name": "web", "kernel": kernel, "memory_bytes": memory_bytes });
        host.control().succeed("POST", "/v1/instances", Some(&body));
    };
    let morph = json!({ "kernel": host.kernel("6.12.9-b"), "auto_validate": true });
    // Both instances fit, but without the memory that the kernel takes for them.
    spawn(half - (1 << 20));
    let taken = pool(&host);
    let refused = host.control().request("POST", MORPH, Some(&morph));
    let refused = refused.refusal();
    assert_eq!(refused.code, ErrorCode::InsufficientResources);
    assert!(refused.message.contains("bookkeeping"), "{refused:?}");
    assert_eq!(pool(&host), taken);
    assert_eq!(instances(&host), ["web"]);
    host.control().succeed("DELETE", "/v1/instances/web", None);
    // The maximum that fits. No single piece of the pool has room for both, so the second one's memory consists of
    // several pieces.
    spawn(half - (2 << 20));
    host.control().succeed("POST", MORPH, Some(&morph));
    assert_eq!(instances(&host), ["web", "web+b"]);
    assert_eq!(pool(&host).memory_free_bytes, 0);
}

#[test]
fn a_killed_daemon_adopts_its_kernels_and_undoes_its_morph() {
    let Some(mut host) = host() else { return };
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    host.restart_by_kill();
    let now = host.running("web");
    assert_eq!((now.summary.generation, now.summary.recoveries), (1, 0));
    assert_eq!(get(port, "k"), "v");

    let body = json!({ "kernel": host.kernel("6.12.9-b"), "auto_validate": true });
    host.control().succeed("POST", MORPH, Some(&body));
    let status: MorphStatus = host.control().get(MORPH);
    assert_eq!(status.to_generation, 2);
    assert_eq!(instances(&host), ["web", "web+b"]);
    host.restart_by_kill();
    assert_eq!(host.running("web").summary.generation, 1);
    assert_eq!(get(port, "k"), "v");
    host.control().wait("the target to be gone", || {
        (instances(&host) == ["web"]).then_some(())
    });

    // The kernel panics while no daemon watches.
    host.kill_daemon();
    host.emulated().strike("panic", "web");
    host.start();
    assert!(host.successor_of("web", 1).summary.generation > 1);
    ping(port);
}

#[test]
fn without_the_kernels_word_that_cpus_stopped_a_person_is_asked() {
    let Some(host) = Host::multikernel(Generation::Silent) else {
        return;
    };
    let port = host.spawn_kv("web");
    host.emulated().strike("panic", "web");
    let kept = host.control().wait("an operator to be asked", || {
        let now = host.control().instance("web");
        (now.summary.state == InstanceState::OperatorActionNeeded).then_some(now)
    });
    let reason = kept.reason.unwrap();
    assert!(
        reason.contains("does not say whether its CPUs have stopped"),
        "{reason}"
    );
    assert_eq!(kept.summary.generation, 1);
    assert_eq!(instances(&host), ["web"], "it keeps its resources");

    // An operator who knows that the CPUs have stopped removes the kernel instance with the real kerf, as the reason
    // says.
    kerf_does(&host, "kill web --force");
    kerf_does(&host, "unload web");
    kerf_does(&host, "delete web");
    host.control()
        .succeed("POST", "/v1/instances/web/recover", None);
    let record = recovered(&host, 1);
    assert_eq!(record.fence.as_deref(), Some("nothing_found"));
    ping(port);
}

#[test]
fn what_kerf_configures_kmorph_runs_and_what_kmorph_makes_kerf_shows() {
    let Some(host) = host() else { return };
    kerf_does(
        &host,
        "create web --cpus=10,12 --memory=512MB --devices=0000:09:00.0",
    );
    let port = host.spawn_kv("web");
    let shown = kerf_does(&host, "show web -v");
    assert!(
        shown.contains("active") && shown.contains("6.1.0-a"),
        "{shown}"
    );
    let holds = kernel(&host).instance("web").unwrap();
    assert_eq!(holds.cpus, [10, 12]);
    // The pool counts the actual resources, not the requested ones.
    let left = pool(&host);
    assert_eq!(left.cpus_free, [8, 14, 16, 18]);
    // Includes 2 MiB for the kernel.
    assert_eq!(left.memory_bytes - left.memory_free_bytes, 514 << 20);
    // kerf does not delete a running kernel instance.
    let refused = run_kerf(&host, "delete web").unwrap_err();
    assert!(refused.contains("active"), "{refused}");

    let ended = host.control().morph("web", &host.kernel("6.12.9-b"));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    ping(port);
    // The kernel instance that kerf configured stays; the devices follow the workload.
    let second = host.control().wait("the devices to follow", || {
        let second = kernel(&host).instance("web+b").unwrap();
        (!second.devices.is_empty()).then_some(second)
    });
    assert_eq!(second.cpus.len(), 2);
    assert!(kernel(&host).instance("web").unwrap().devices.is_empty());
    let shown = kerf_does(&host, "show");
    assert!(shown.contains("web+b"), "{shown}");
    let shown = kerf_does(&host, "show web+b -v");
    assert!(shown.contains("6.12.9-b"), "{shown}");

    // A halt by kerf is an end like any other: the instance is healed, in the kernel instance that kerf had configured.
    kerf_does(&host, "kill web+b");
    assert_eq!(host.successor_of("web", 2).summary.generation, 3);
    ping(port);
    host.control().succeed("DELETE", "/v1/instances/web", None);
    assert_eq!(instances(&host), ["web"]);
    kerf_does(&host, "delete web");
    assert!(instances(&host).is_empty());
}
