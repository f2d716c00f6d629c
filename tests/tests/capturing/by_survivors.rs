//! Survivors read a failed kernel's memory, and the capture succeeds even if a survivor or the daemon dies.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kmorph_control_api::{
    CaptureReport, InstanceState, RecoveryOutcome, RecoveryRecord, VmcoreRecord,
};
use kmorph_tests::{Host, kernels};
use kmorph_vmcore::{Completeness, Dump, MemoryFile, PhysicalMemory};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// Every failure here is a kill or a panic, which the daemon sees at once, so the heartbeat timeout can be long. The
/// capture covers all of the memory, with a rate limit, so that survivors have time to take part.
const CONFIG: &str = "backend = \"qemu\"\n[defaults]\nheartbeat_timeout_s = 10.0\nvmcore = \"on\"\n\
                      [pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n\
                      [vmcore]\nsurvivors = 2\nlevel = 0\nrate_mib_s = 16\n";
/// Offset in the file at which memory above 4 GiB would begin; the guests have less memory.
const LOW_BYTES: u64 = 2 << 30;
const SURVIVORS: [&str; 2] = ["cache", "db"];

fn run_dir(host: &Host, name: &str) -> PathBuf {
    host.control().instance(name).run_dir.into()
}

fn qemu(host: &Host, name: &str) -> Pid {
    Pid::from_raw(host.control().instance(name).processes["qemu"])
}

/// Waits for the recovery of web's `generation`, and returns its vmcore, which must be complete and verified.
fn captured(host: &Host, generation: u64) -> (VmcoreRecord, Dump) {
    let record = host.control().wait("the recovery to end", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        let ended = |r: &RecoveryRecord| {
            r.failed_generation == generation && r.outcome == RecoveryOutcome::Recovered
        };
        all.into_iter().find(ended)
    });
    let vmcore = record.vmcore.unwrap();
    assert_eq!(vmcore.error, None);
    let dump = Dump::open(Path::new(vmcore.path.as_ref().unwrap()));
    let dump = dump.unwrap().unwrap();
    assert_eq!(dump.completeness(), Completeness::Complete);
    (vmcore, dump)
}

fn wait_for_return(host: &Host, run_dir: &Path) {
    host.control().wait("the loan to be taken back", || {
        (!kernels::has_borrowed(run_dir)).then_some(())
    });
}

/// Waits until the survivor with this run directory has borrowed memory, and returns true; returns false if the capture in
/// the log after its first `logged` bytes ends before.
fn borrows(host: &Host, logged: usize, run_dir: &Path) -> bool {
    host.control()
        .wait("a loan, or the end of the capture", || {
            let ended = host.log()[logged..].contains("INFO captured: ");
            (kernels::has_borrowed(run_dir) || ended).then_some(!ended)
        })
}

/// Returns whether the survivor helps with the captures in the log after its first `logged` bytes. The daemon asks only
/// instances that are RUNNING, and gives a survivor 2 s to answer. A busy machine may keep a guest from both.
fn helps(host: &Host, logged: usize, survivor: &str) -> bool {
    let log = host.log();
    let says = |text: &str| {
        let mut lines = log[logged..].lines();
        lines.any(|line| line.contains(text) && line.contains(&format!("survivor: {survivor}")))
    };
    says("a survivor is asked to help") && !says("a survivor does not help")
}

#[test]
fn survivors_read_the_memory_and_nothing_depends_on_them() {
    let mut host = Host::with(CONFIG);
    host.spawn_kv_on("web", &kernels::debian("6.1"), kernels::PANICS_ON_NMI);
    for (name, series) in SURVIVORS.iter().zip(["6.1", "6.12"]) {
        host.spawn_kv_on(name, &kernels::debian(series), "");
    }
    they_read_what_is_in_the_memory(&mut host);
    one_that_dies_meanwhile_is_done_without(&host);
    another_daemon_takes_back_what_was_lent(&mut host);
}

/// Captures a kept memory by hand, so that the vmcore can be compared with the memory.
fn they_read_what_is_in_the_memory(host: &mut Host) {
    let inode = memory_of(qemu(host, "web").as_raw(), |_| true);
    let inode = std::fs::metadata(inode).unwrap().ino();
    // A required memory that cannot be captured is kept: a file blocks the path of the directory.
    host.control()
        .set_policy("web", &json!({ "vmcore": "required" }));
    let obstacle = host.path("state/vmcore");
    std::fs::write(&obstacle, "").unwrap();
    kernels::qmp(&run_dir(host, "web"), "inject-nmi");
    host.control().wait("an operator to be asked", || {
        let now = host.control().instance("web").summary.state;
        (now == InstanceState::OperatorActionNeeded).then_some(())
    });
    // The memory is kept as long as needed, even across restarts of the daemon.
    host.restart_by_kill();

    let path = host.path("by-hand");
    host.control().wait("a capture that both have read", || {
        for name in SURVIVORS {
            host.running(name);
        }
        let ended = host.control().succeed(
            "POST",
            "/v1/instances/web/vmcore",
            Some(&json!({ "output": path })),
        );
        let report: CaptureReport = serde_json::from_value(ended.result.unwrap()).unwrap();
        for name in SURVIVORS {
            wait_for_return(host, &run_dir(host, name));
        }
        let reads = |name: &&str| {
            report
                .read_by
                .get(*name)
                .is_some_and(|read| *read >= 1 << 20)
        };
        if SURVIVORS.iter().all(reads) {
            return Some(());
        }
        std::fs::remove_file(&path).unwrap();
        None
    });
    let of_web = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.ino() == inode);
    let memory = File::open(memory_of(host.daemon_pid(), of_web)).unwrap();
    assert_same(&Dump::open(&path).unwrap().unwrap(), memory);

    std::fs::remove_file(&obstacle).unwrap();
    host.control()
        .succeed("POST", "/v1/instances/web/recover", None);
    captured(host, 1);
}

fn assert_same(dump: &Dump, memory: File) {
    assert_eq!(dump.completeness(), Completeness::Complete);
    let memory = MemoryFile::of_pc(memory, LOW_BYTES).unwrap();
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for range in memory.ranges() {
        for at in (range.start..range.end).step_by(1 << 20) {
            memory.read(at, &mut theirs).unwrap();
            dump.read(at, &mut ours).unwrap();
            assert!(ours == theirs, "the memory differs at {at:#x}");
        }
    }
}

/// Returns a guest's memory that the process has open and that satisfies `right`.
fn memory_of(pid: i32, right: impl Fn(&Path) -> bool) -> PathBuf {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut open = open.flatten().map(|entry| entry.path());
    let memory = open.find(|path| {
        let target = std::fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().contains("memory-backend-memfd") && right(path)
    });
    memory.expect("the memory is open")
}

fn one_that_dies_meanwhile_is_done_without(host: &Host) {
    host.successor_of("web", 1);
    let (dir, other) = (run_dir(host, "db"), run_dir(host, "cache"));
    let logged = host.log().len();
    kernels::qmp(&run_dir(host, "web"), "inject-nmi");
    borrows(host, logged, &dir);
    kill(qemu(host, "db"), Signal::SIGKILL).unwrap();
    let (vmcore, _) = captured(host, 2);
    let read = vmcore.read_by.get("cache").copied().unwrap_or(0);
    assert!(
        read >= 1 << 20 || !helps(host, logged, "cache"),
        "{vmcore:?}"
    );
    wait_for_return(host, &other);
    assert_eq!(host.successor_of("db", 1).summary.recoveries, 1);
    assert_eq!(host.control().instance("cache").summary.recoveries, 0);
}

fn another_daemon_takes_back_what_was_lent(host: &mut Host) {
    let dirs = SURVIVORS.map(|name| run_dir(host, name));
    let mut failed = 2;
    loop {
        host.successor_of("web", failed);
        failed += 1;
        let logged = host.log().len();
        kernels::qmp(&run_dir(host, "web"), "inject-nmi");
        if borrows(host, logged, &dirs[0]) {
            break;
        }
        captured(host, failed);
    }
    host.kill_daemon();
    assert!(kernels::has_borrowed(&dirs[0]));
    // This daemon uses no survivors, so any take-back concerns memory that the previous daemon lent.
    let config = CONFIG.replace("survivors = 2", "survivors = 0");
    host.configure(&config);
    host.start();
    // The guest's QEMU and the daemon have ended, but a separate process kept the memory.
    let (vmcore, _) = captured(host, failed);
    assert!(vmcore.read_by.is_empty(), "{vmcore:?}");
    for dir in &dirs {
        wait_for_return(host, dir);
    }
    for name in SURVIVORS {
        let recoveries = host.control().instance(name).summary.recoveries;
        assert_eq!(recoveries, u64::from(name == "db"), "{name}");
    }
}
