//! A failed kernel's memory that is read by the kernels which survive: whatever becomes of them, or of the daemon.
//!
//! Needs what `scripts/setup-tests` installs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::fs::File;
use std::path::{Path, PathBuf};

use kmorph_control_api::{RecoveryOutcome, RecoveryRecord, VmcoreRecord};
use kmorph_tests::{Host, kernels};
use kmorph_vmcore::{Completeness, Dump, MemoryFile, PhysicalMemory};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// All of the memory, no faster than so that survivors have the time to take part in it.
const CONFIG: &str = "backend = \"qemu\"\n[defaults]\nheartbeat_timeout_s = 3.0\nvmcore = \"on\"\n\
                      [pool]\nshare_cpus = true\nmemory_mib = 65536\n\
                      [vmcore]\nsurvivors = 2\nlevel = 0\nrate_mib_s = 24\n";
/// Where memory above 4 GiB would begin in the file; the guests have less.
const LOW_BYTES: u64 = 2 << 30;
const SURVIVORS: [&str; 2] = ["cache", "db"];

fn run_dir(host: &Host, name: &str) -> PathBuf {
    host.control().instance(name).run_dir.into()
}

fn qemu(host: &Host, name: &str) -> Pid {
    Pid::from_raw(host.control().instance(name).processes["qemu"])
}

/// The recovery of web's `generation`, once it is over.
fn recovered(host: &Host, generation: u64) -> VmcoreRecord {
    let record = host.control().wait("the recovery to end", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        let ended = |r: &RecoveryRecord| {
            r.failed_generation == generation && r.outcome == RecoveryOutcome::Recovered
        };
        all.into_iter().find(ended)
    });
    record.vmcore.unwrap()
}

/// What was captured of it: whole, and verified.
fn captured(host: &Host, generation: u64) -> (VmcoreRecord, Dump) {
    let vmcore = recovered(host, generation);
    assert_eq!(vmcore.error, None);
    let dump = Dump::open(Path::new(vmcore.path.as_ref().unwrap()));
    let dump = dump.unwrap().unwrap();
    assert_eq!(dump.completeness(), Completeness::Complete);
    (vmcore, dump)
}

fn wait_for_loan(host: &Host, run_dir: &Path, lent: bool) {
    let what = if lent {
        "a loan"
    } else {
        "it to be taken back"
    };
    host.control().wait(what, || {
        (kernels::has_borrowed(run_dir) == lent).then_some(())
    });
}

#[test]
fn survivors_read_the_memory_and_nothing_depends_on_them() {
    let mut host = Host::with(CONFIG);
    host.spawn_kv_on("web", &kernels::debian("6.1"), kernels::PANICS_ON_NMI);
    for (name, series) in SURVIVORS.iter().zip(["6.1", "6.12"]) {
        host.spawn_kv_on(name, &kernels::debian(series), "");
    }
    they_read_what_is_in_the_memory(&host);
    one_that_dies_meanwhile_is_done_without(&host);
    another_daemon_takes_back_what_was_lent(&mut host);
}

fn they_read_what_is_in_the_memory(host: &Host) {
    let (dir, daemon) = (run_dir(host, "web"), Pid::from_raw(host.daemon_pid()));
    // The daemon looks away until there is a copy of the memory: it gives it back when it has captured it.
    kill(daemon, Signal::SIGSTOP).unwrap();
    let web = qemu_memory(&dir);
    kernels::qmp(&dir, "inject-nmi");
    host.control().wait("the panic", || {
        (kernels::guest_status(&dir) == "guest-panicked").then_some(())
    });
    let copy = host.path("memory");
    std::fs::copy(web, &copy).unwrap();
    kill(daemon, Signal::SIGCONT).unwrap();

    let (vmcore, dump) = captured(host, 1);
    for name in SURVIVORS {
        let read = vmcore.read_by.get(name).copied().unwrap_or(0);
        assert!(read >= 1 << 20, "{name} has read {read} bytes: {vmcore:?}");
        wait_for_loan(host, &run_dir(host, name), false);
    }
    let memory = MemoryFile::of_pc(File::open(copy).unwrap(), LOW_BYTES).unwrap();
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for range in memory.ranges() {
        for at in (range.start..range.end).step_by(1 << 20) {
            memory.read(at, &mut theirs).unwrap();
            dump.read(at, &mut ours).unwrap();
            assert!(ours == theirs, "the memory differs at {at:#x}");
        }
    }
}

/// The file that is the memory of the guest in `run_dir`.
fn qemu_memory(run_dir: &Path) -> PathBuf {
    let wanted = run_dir.as_os_str().as_encoded_bytes();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if !line.starts_with(b"qemu") || !line.windows(wanted.len()).any(|part| part == wanted) {
            continue;
        }
        let open = std::fs::read_dir(entry.path().join("fd")).unwrap();
        let mut open = open.flatten().map(|entry| entry.path());
        let memory = open.find(|path| {
            let target = std::fs::read_link(path).unwrap_or_default();
            // This one was lent nothing yet.
            target.to_string_lossy().contains("memory-backend-memfd")
        });
        return memory.expect("QEMU has its guest's memory open");
    }
    panic!("no QEMU runs from {run_dir:?}");
}

fn one_that_dies_meanwhile_is_done_without(host: &Host) {
    host.successor_of("web", 1);
    let (dir, other) = (run_dir(host, "db"), run_dir(host, "cache"));
    kernels::qmp(&run_dir(host, "web"), "inject-nmi");
    wait_for_loan(host, &dir, true);
    kill(qemu(host, "db"), Signal::SIGKILL).unwrap();
    captured(host, 2);
    wait_for_loan(host, &other, false);
    assert_eq!(host.successor_of("db", 1).summary.recoveries, 1);
    assert_eq!(host.control().instance("cache").summary.recoveries, 0);
}

fn another_daemon_takes_back_what_was_lent(host: &mut Host) {
    host.successor_of("web", 2);
    let dirs = SURVIVORS.map(|name| run_dir(host, name));
    kernels::qmp(&run_dir(host, "web"), "inject-nmi");
    wait_for_loan(host, &dirs[0], true);
    host.kill_daemon();
    assert!(kernels::has_borrowed(&dirs[0]));
    // This one asks nobody to help: what is taken back is what the one before it has lent.
    let config = CONFIG.replace("survivors = 2", "survivors = 0");
    host.configure(&config);
    host.start();
    // The memory of a guest that was fenced went with the daemon.
    let vmcore = recovered(host, 3);
    assert!(
        vmcore.error.is_some() && vmcore.read_by.is_empty(),
        "{vmcore:?}"
    );
    for dir in &dirs {
        wait_for_loan(host, dir, false);
    }
    for name in SURVIVORS {
        let recoveries = host.control().instance(name).summary.recoveries;
        assert_eq!(recoveries, u64::from(name == "db"), "{name}");
    }
}
