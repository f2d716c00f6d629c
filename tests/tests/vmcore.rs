//! Vmcores of real kernels that failed: kmorph reads QEMU's dumps; makedumpfile (and drgn in `make test-drgn`, crash in
//! `make test-crash`) reads kmorph's dumps of the guest's memory; and all agree.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs::File;
use std::path::Path;
use std::process::Command;

use kmorph_tests::crashed_guest::{
    CrashedGuest, End, FIVE_LEVELS, LAST_WORDS, LOW_MEMORY_BYTES, Plan,
};
use kmorph_tests::dumps::{crash, vmlinux, written};
use kmorph_tests::{kernels, program};
use kmorph_vmcore::analysis::tasks::Task;
use kmorph_vmcore::analysis::{AnalysisOptions, Report, analyse};
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::kernel::Kernel;
use kmorph_vmcore::writer::{Output, Written};
use kmorph_vmcore::{Dump, MemoryFile, PhysicalMemory};
use serde_json::Value;

/// Memory of a guest on both sides of the hole below 4 GiB, MiB.
const LARGE_MIB: u64 = 5 << 10;

/// The last blocks are movable memory, and the kernel moves their contents away.
const OFFLINE_AND_BACK: &str = r#"
for state in offline online; do
    for block in 4 3; do
        echo $state > /sys/devices/system/memory/memory$block/state &&
            echo "guest: memory $block $state" > /dev/kmsg
    done
done
cp /tmp/files-1 /tmp/files-again
"#;

#[test]
fn a_6_1_kernel_ended_by_sysrq_is_dumped_and_read() {
    let guest = dumped_and_read(&Plan::small("6.1"));
    assert_a_whole_dump_is_the_memory(&guest);
}

#[test]
fn a_6_12_kernel_ended_by_sysrq_is_dumped_and_read() {
    let guest = dumped_and_read(&Plan::small("6.12"));
    assert_a_whole_dump_is_the_memory(&guest);
}

#[test]
fn the_newest_kernel_ended_by_sysrq_is_dumped_and_read() {
    let series = kernels::newest();
    let guest = dumped_and_read(&Plan {
        cpu_model: FIVE_LEVELS,
        ..Plan::small(&series)
    });
    let dump = Dump::open(&guest.path("elf")).unwrap().unwrap();
    let kernel = Kernel::in_dump(&dump).unwrap();
    assert_eq!(kernel.info().number("pgtable_l5_enabled"), Ok(1));
}

/// Two blocks of memory go offline and come back before the kernel ends, and are reported like any other block.
#[test]
#[ignore = "the kernel may find a block busy and keep it: run it until it gives both away"]
fn memory_that_was_offline_and_came_back_is_dumped_and_read() {
    let guest = dumped_and_read(&Plan {
        memory_mib: 768,
        options: "movablecore=384M",
        lines: OFFLINE_AND_BACK,
        ..Plan::small("6.1")
    });
    let log = analysed(&guest.dump("elf")).log.unwrap().text;
    for block in ["4", "3"] {
        for did in ["offline", "online"] {
            let said = format!("guest: memory {block} {did}");
            assert!(log.contains(&said), "{said} in\n{log}");
        }
    }
}

/// Run by `make new-kernel`.
#[test]
#[ignore = "half a minute more than make test has time for: make new-kernel"]
fn the_newest_kernel_that_read_nothing_is_dumped_and_read() {
    dumped_and_read(&Plan {
        end: End::NullDereference,
        memory_mib: LARGE_MIB,
        cpus: 2,
        ..Plan::small(&kernels::newest())
    });
}

/// Run by `make new-kernel`.
#[test]
#[ignore = "half a minute more than make test has time for: make new-kernel"]
fn the_newest_kernel_that_hangs_is_dumped_and_read() {
    dumped_and_read(&Plan {
        end: End::Hang,
        memory_mib: 512,
        cpus: 2,
        ..Plan::small(&kernels::newest())
    });
}

#[test]
fn a_6_1_kernel_that_read_nothing_is_dumped_and_read() {
    dumped_and_read(&Plan {
        end: End::NullDereference,
        memory_mib: LARGE_MIB,
        cpus: 2,
        ..Plan::small("6.1")
    });
}

#[test]
fn a_6_12_kernel_that_read_nothing_is_dumped_and_read() {
    dumped_and_read(&Plan {
        end: End::NullDereference,
        memory_mib: LARGE_MIB,
        cpus: 2,
        ..Plan::small("6.12")
    });
}

#[test]
fn a_6_1_kernel_that_hangs_is_dumped_and_read() {
    dumped_and_read(&Plan {
        end: End::Hang,
        memory_mib: 512,
        cpus: 2,
        ..Plan::small("6.1")
    });
}

#[test]
fn a_6_12_kernel_that_hangs_is_dumped_and_read() {
    dumped_and_read(&Plan {
        end: End::Hang,
        memory_mib: 512,
        cpus: 2,
        ..Plan::small("6.12")
    });
}

/// kmorph reads QEMU's dumps and its own, and makedumpfile reads kmorph's; all have the same log.
fn dumped_and_read(plan: &Plan<'_>) -> CrashedGuest {
    let guest = CrashedGuest::new(plan);
    let mut logs = Vec::new();
    let formats = match plan.end {
        End::Sysrq => &["elf", "kdump-zlib", "kdump-raw-zlib"][..],
        _ => &["elf"],
    };
    for format in formats {
        let path = guest.dump(format);
        let report = analysed(&path);
        assert_tells_the_end(&report, plan);
        assert_tells_the_registers(&report, plan);
        logs.push(report.log.unwrap().text);
    }
    let readable = [
        ("core-elf", Output::Elf),
        ("core-zlib", Output::Kdump(Compression::Zlib)),
        ("core-lzo", Output::Kdump(Compression::Lzo)),
    ];
    for (name, output) in readable {
        let (path, written) = written(&guest, name, output, 31);
        assert!(
            written.not_filtered.is_none() && written.sections_kept == 0,
            "{written:?}"
        );
        let report = analysed(&path);
        assert_tells_the_end(&report, plan);
        assert_tells_the_registers(&report, plan);
        assert_eq!(report.file.checksum, "holds");
        logs.push(report.log.unwrap().text);
        assert_makedumpfile_agrees(&path, &logs[0], None);
    }
    // From a dump with everything except zero pages, makedumpfile excludes the same pages as kmorph.
    let (whole, _) = self::written(&guest, "core-all", Output::Kdump(Compression::None), 1);
    let (filtered, note) = self::written(&guest, "core-zstd", Output::Kdump(Compression::Zstd), 31);
    assert_makedumpfile_agrees(&whole, &logs[0], Some(&note));
    logs.push(analysed(&filtered).log.unwrap().text);
    assert!(
        logs.iter().all(|log| *log == logs[0]),
        "{plan:?}: logs differ"
    );
    assert_the_command_tells_it(&filtered, plan);
    guest
}

fn analysed(path: &Path) -> Report {
    let dump = Dump::open(path).unwrap().unwrap();
    analyse(&dump, AnalysisOptions { scan: true }).unwrap()
}

fn assert_tells_the_end(report: &Report, plan: &Plan<'_>) {
    assert!(report.file.complete, "{:?}", report.file);
    assert_tells_the_kernel(report, plan);
    let log = report.log.as_ref().unwrap();
    assert!(
        LAST_WORDS.iter().all(|words| log.text.contains(words)),
        "{}",
        log.text
    );
    assert_eq!(log.messages_lost, 0);
    let uptime = report.crash.uptime_at_least_ns.unwrap();
    assert!(uptime > 500_000_000, "{uptime}");
    match plan.end {
        End::Sysrq => {
            assert_eq!(report.crash.panic.as_deref(), Some("sysrq triggered crash"));
            assert_eq!(report.crash.cause, None);
            assert_called(report, "init", "sysrq_handle_crash+");
        }
        End::NullDereference => {
            let panic = report.crash.panic.as_deref();
            assert_eq!(panic, Some("Fatal exception"));
            let cause = report.crash.cause.as_deref();
            let null = "BUG: kernel NULL pointer dereference, address: 0000000000000008";
            assert_eq!(cause, Some(null));
            let oops = &report.crash.events[0];
            assert!(
                oops.title
                    .contains("NULL pointer dereference, address: 0000000000000008"),
                "{oops:?}"
            );
            assert_called(report, "insmod", "do_one_initcall+");
        }
        _ => {
            // The guest's programs logged a fake panic and a fake fault.
            assert_eq!((&report.crash.panic, &report.crash.cause), (&None, &None));
            assert!(log.text.contains("failing: no CPU goes on"), "{}", log.text);
        }
    }
    let kinds = report.memory.kinds.unwrap();
    let large = [kinds.free, kinds.kernel, kinds.slab, kinds.cache];
    assert!(
        large.iter().all(|pages| *pages > 100) && kinds.user > 0,
        "{kinds:?}"
    );
    assert_eq!(report.memory.unreadable, Some(0));
    assert!(report.memory.zero.unwrap() > 100);
}

fn assert_tells_the_kernel(report: &Report, plan: &Plan<'_>) {
    let kernel = report.kernel.as_ref().unwrap();
    let release = kernel.release.as_deref().unwrap();
    assert!(
        release.starts_with(&format!("{}.", plan.series)),
        "{release}"
    );
    assert!(kernel.version.as_deref().unwrap().contains(release));
    assert!(
        kernel.machine.as_deref().unwrap().contains("QEMU"),
        "{kernel:?}"
    );
    assert_eq!(kernel.command_line, Some(plan.command_line()));
    // An oops taints the kernel, and so does an out-of-tree module.
    let letters = match plan.end {
        End::Sysrq => "",
        End::NullDereference => "DOE",
        _ => "OE",
    };
    assert_eq!(kernel.taint.as_ref().unwrap().letters, letters);
    let names = &report.modules.as_ref().unwrap().names;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let own = ["pvpanic_pci", "pvpanic", "qemu_fw_cfg"];
    match plan.end {
        End::Sysrq => assert_eq!(names, own),
        _ => assert_eq!(names, [&["failing"], &own[..]].concat()),
    }
}

/// Asserts that `program` failed, with `function` in its call trace.
fn assert_called(report: &Report, program: &str, function: &str) {
    let failed = report.crash.events.iter();
    let mut failed = failed.filter(|event| event.comm.as_deref() == Some(program));
    assert!(
        failed.any(|event| event
            .call_trace
            .iter()
            .any(|call| call.starts_with(function))),
        "{:?}",
        report.crash.events
    );
}

/// Checks the registers of every CPU, as dumped by QEMU.
fn assert_tells_the_registers(report: &Report, plan: &Plan<'_>) {
    assert_eq!(report.cpus.len(), plan.cpus as usize);
    for cpu in &report.cpus {
        assert_eq!(cpu.mode, "kernel", "{cpu:?}");
        // The code that hangs is in a module, whose symbols are not looked up.
        let named = cpu.at.as_deref().is_some_and(|at| at.contains('+'));
        assert!(named || plan.end == End::Hang, "{cpu:?}");
    }
}

/// makedumpfile finds the same log, can filter the file again, and excludes as many pages of each kind as `expected`
/// states.
fn assert_makedumpfile_agrees(path: &Path, log: &str, expected: Option<&Written>) {
    let (dmesg, again) = (path.with_extension("dmesg"), path.with_extension("again"));
    makedumpfile(&["--dump-dmesg".as_ref(), path, &dmesg]);
    let theirs = std::fs::read_to_string(&dmesg).unwrap();
    assert!(theirs == log, "the logs of {path:?} differ");
    let words = ["-l", "-d", "31", "--message-level", "16"].map(Path::new);
    let report = makedumpfile(&[&words[..], &[path, &again]].concat());
    assert!(Dump::open(&again).unwrap().is_ok());
    let Some(Written { note, .. }) = expected else {
        return;
    };
    let dump = Dump::open(path).unwrap().unwrap();
    let kernel = Kernel::in_dump(&dump).unwrap();
    let knows_no_slab = kernel.info().number("PAGE_SLAB_MAPCOUNT_VALUE").is_ok();
    for (line, ours) in [
        ("Non-private cache pages", note.cache),
        ("Private cache pages", note.cache_private),
        ("User process data pages", note.user),
        ("Free pages", note.free),
    ] {
        let theirs = report.lines().find_map(|l| l.trim().strip_prefix(line));
        let theirs = theirs.and_then(|l| l.trim().strip_prefix(": 0x"));
        let theirs = theirs.map(|digits| u64::from_str_radix(digits.trim(), 16).unwrap());
        let theirs = theirs.unwrap_or_else(|| panic!("no {line} in\n{report}"));
        // makedumpfile 1.7.2 does not know how Linux 6.10 and newer mark slab pages, and takes some of them for user
        // pages.
        let more_is_right = knows_no_slab && line.starts_with("User");
        let agrees = theirs == ours.get() || (more_is_right && theirs > ours.get());
        assert!(agrees, "{line}: {ours} in\n{report}");
    }
}

fn makedumpfile(words: &[&Path]) -> String {
    let ran = Command::new("makedumpfile").args(words).output();
    let ran = ran.expect("makedumpfile is installed: scripts/setup-tests");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&ran.stdout) + &text(&ran.stderr);
    assert!(ran.status.success(), "makedumpfile {words:?}: {said}");
    said
}

fn assert_a_whole_dump_is_the_memory(guest: &CrashedGuest) {
    let (path, _) = written(guest, "core-whole", Output::Kdump(Compression::None), 0);
    let dump = Dump::open(&path).unwrap().unwrap();
    let file = File::open(guest.memory()).unwrap();
    let memory = MemoryFile::of_pc(file, LOW_MEMORY_BYTES).unwrap();
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for range in memory.ranges() {
        for at in (range.start..range.end).step_by(1 << 20) {
            dump.read(at, &mut ours).unwrap();
            memory.read(at, &mut theirs).unwrap();
            assert!(ours == theirs, "memory at {at:#x} differs");
        }
    }
}

fn assert_the_command_tells_it(path: &Path, plan: &Plan<'_>) {
    let run = |words: &[&str]| {
        let mut command = Command::new(program("kmorphctl"));
        let ran = command
            .args(["vmcore", "analyze"])
            .arg(path)
            .args(words)
            .output();
        let ran = ran.unwrap();
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    };
    let report: Value = serde_json::from_str(&run(&["--output-format", "json"])).unwrap();
    assert_eq!(report["file"]["checksum"], "holds");
    assert_eq!(report["log"]["text"], run(&["--log"]));
    let shown = run(&[]);
    let panic = match plan.end {
        End::Sysrq => "Panic: sysrq triggered crash",
        End::NullDereference => "Panic: Fatal exception",
        _ => "Panic: none in the log: the kernel hung, was stopped from outside, or was alive",
    };
    for line in [panic, "Checksum: holds", "Complete: yes"] {
        assert!(
            shown.lines().any(|shown| shown == line),
            "{line} in\n{shown}"
        );
    }
}

/// Run by `make test-drgn`, with a Python that has drgn.
#[test]
#[ignore = "needs drgn: make test-drgn"]
fn drgn_reads_every_page_of_what_is_written() {
    let python = std::env::var_os("KMORPH_DRGN_PYTHON").expect("make test-drgn sets it");
    for series in ["6.1", "6.12"] {
        let guest = CrashedGuest::new(&Plan::small(series));
        guest.dump("elf");
        for (name, output) in [
            ("core-elf", Output::Elf),
            ("core-zlib", Output::Kdump(Compression::Zlib)),
            ("core-lzo", Output::Kdump(Compression::Lzo)),
            ("core-zstd", Output::Kdump(Compression::Zstd)),
        ] {
            let (whole, _) = written(&guest, name, output, 0);
            let (filtered, note) = written(&guest, &format!("{name}-filtered"), output, 31);
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/drgn_pages.py");
            let left_out = note.note.pages.get() - in_file(&filtered, &note);
            for (path, left_out) in [(whole, 0), (filtered, left_out)] {
                let mut drgn = Command::new(&python);
                let ran = drgn
                    .arg(script)
                    .arg(&path)
                    .arg(guest.memory())
                    .output()
                    .unwrap();
                let said = String::from_utf8_lossy(&ran.stdout).into_owned();
                assert!(ran.status.success(), "{path:?}: {ran:?}");
                // In an ELF core, excluded pages read as zeros.
                let expected = match output {
                    Output::Elf => format!("release {series}."),
                    Output::Kdump(_) => format!("missing {left_out} release {series}."),
                };
                assert!(said.contains(&expected), "{path:?}: {said}, not {expected}");
            }
        }
    }
}

/// Run by `make test-tasks`, with drgn in `PATH`.
#[test]
#[ignore = "needs drgn and Debian's debug symbols: make test-tasks"]
fn tasks_and_their_stacks_are_told_with_debug_symbols() {
    for series in ["6.1", "6.12"] {
        let guest = CrashedGuest::new(&Plan::small(series));
        guest.dump("elf");
        let (core, _) = written(&guest, "core", Output::Kdump(Compression::Zstd), 31);
        let ran = Command::new(program("kmorphctl"))
            .args(["vmcore", "analyze", "--output-format", "json"])
            .arg(&core)
            .arg("--vmlinux")
            .arg(vmlinux(series))
            .output()
            .unwrap();
        assert!(ran.status.success(), "{ran:?}");
        let report: Value = serde_json::from_slice(&ran.stdout).unwrap();
        let tasks: Vec<Task> = serde_json::from_value(report["tasks"].clone()).unwrap();
        let calls = |pid: i64, comm: &str, function: &str| {
            let task = tasks.iter().find(|task| task.pid == pid).unwrap();
            assert_eq!(task.comm, comm);
            let mut stack = task.stack.iter();
            assert!(stack.any(|at| at.starts_with(function)), "{task:?}");
        };
        calls(1, "init", "sysrq_handle_crash+0x");
        calls(2, "kthreadd", "kthreadd+0x");
        // The kernel and makedumpfile indent the second line of a message, drgn does not.
        let (theirs, ours) = (drgn_log(&core, series), &report["log"]["text"]);
        let (mut theirs, mut ours) = (theirs.lines(), ours.as_str().unwrap().lines());
        assert!(
            theirs
                .by_ref()
                .all(|line| ours.next().map(str::trim_start) == Some(line))
        );
        assert_eq!(ours.next(), None);
    }
}

/// Returns the log from drgn. drgn prints bytes that are not text unchanged; this function escapes them like
/// makedumpfile, which treats a byte as a signed number.
fn drgn_log(core: &Path, series: &str) -> String {
    let script = "import sys; from drgn.helpers.linux.printk import get_dmesg; \
                  sys.stdout.buffer.write(get_dmesg(prog))";
    let ran = Command::new("drgn")
        .args(["--quiet", "-e", script, "--core"])
        .arg(core)
        .arg("--symbols")
        .arg(vmlinux(series))
        .output();
    let ran = ran.expect("make test-tasks has drgn in PATH");
    assert!(ran.status.success(), "{ran:?}");
    let escaped = |byte: &u8| match byte {
        b'\t' | b'\n' | b' '..=b'~' => char::from(*byte).to_string(),
        byte => format!("\\x{:02x}", i32::from(i8::from_ne_bytes([*byte]))),
    };
    ran.stdout.iter().map(escaped).collect()
}

/// Run by `make test-crash`, without options for crash. The crash of Debian 12 is too old for Linux 6.4 and newer, and
/// reads not even QEMU's own dumps of them.
#[test]
#[ignore = "needs crash and Debian's debug symbols: make test-crash"]
fn crash_reads_what_is_written() {
    for plan in [
        Plan::small("6.1"),
        Plan {
            end: End::NullDereference,
            memory_mib: LARGE_MIB,
            cpus: 2,
            ..Plan::small("6.1")
        },
        Plan {
            end: End::Hang,
            cpus: 2,
            ..Plan::small("6.1")
        },
    ] {
        let guest = CrashedGuest::new(&plan);
        let log = analysed(&guest.dump("elf")).log.unwrap().text;
        let stacks = crash(&guest, &plan, &guest.path("elf"), &["bt -a"]).unwrap();
        // crash cannot unwind the stack of a hung CPU, even in QEMU's dump.
        let expected = match plan.end {
            End::Sysrq => "] sysrq_handle_crash at ",
            End::NullDereference => "] do_one_initcall at ",
            _ => "PID: 0 ",
        };
        assert!(stacks.contains(expected), "{plan:?}:\n{stacks}");
        for (name, output) in [
            ("core-elf", Output::Elf),
            ("core-zlib", Output::Kdump(Compression::Zlib)),
            ("core-lzo", Output::Kdump(Compression::Lzo)),
            ("core-zstd", Output::Kdump(Compression::Zstd)),
        ] {
            let (path, _) = written(&guest, name, output, 31);
            assert_crash_prints_the_log(&crash(&guest, &plan, &path, &["log"]).unwrap(), &log);
            assert_eq!(crash(&guest, &plan, &path, &["bt -a"]).unwrap(), stacks);
            println!(
                "{plan:?}, {name}:\n{}",
                crash(&guest, &plan, &path, &["sys", "bt -a"]).unwrap()
            );
        }
    }
}

/// crash prints warnings first, and a dot for each byte that is not text.
fn assert_crash_prints_the_log(said: &str, log: &str) {
    let begin = said.find("[    0.000000] Linux version").unwrap();
    let log = log.replace("\\x01\\xffffffff", "..");
    assert!(said[begin..] == log, "the logs differ:\n{said}");
}

/// Returns the number of pages in the file.
fn in_file(path: &Path, written: &Written) -> u64 {
    let dump = Dump::open(path).unwrap().unwrap();
    dump.pages_in_file().unwrap_or(written.note.pages.get())
}
