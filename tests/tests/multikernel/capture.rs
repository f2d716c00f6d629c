//! Vmcores of kernels beside an emulated one. The memory is that of a real kernel, which panicked in QEMU: the emulated
//! host shows it as the instance's memory, like a multikernel host in `/proc/iomem` and `/proc/kcore`.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use kmorph_backends::multikernel::kcore;
use kmorph_control_api::{InstanceState, OperationState, RecoveryOutcome, RecoveryRecord};
use kmorph_emulated_kernel::Generation;
use kmorph_tests::Host;
use kmorph_tests::crashed_guest::{CrashedGuest, Plan};
use kmorph_vmcore::analysis::{self, AnalysisOptions};
use kmorph_vmcore::{Completeness, Dump};
use serde_json::{Value, json};

use super::{kernel, recovered};

const CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 1.0\n[limits]\nstop_timeout_s = 0.5\n";
const CAPTURE: &str = "/v1/instances/web/vmcore";
/// Lines that make the guest print how its own kernel shows its memory; each output line begins with a mark.
const SHOWS: &str = "/bin/busybox grep 'System RAM' /proc/iomem | /bin/busybox sed 's/^/iomem: /'\n\
    dd if=/proc/kcore bs=4096 count=1 2>/dev/null | /bin/busybox od -An -v -tx1 | \
    /bin/busybox sed 's/^/kcore:/'\n";

/// Shows the guest's memory on the emulated host, as the memory of the kernel instance `name`.
fn show(host: &Host, name: &str, memory: &Path) {
    let id = kernel(host).id(name).unwrap();
    let bytes = memory.metadata().unwrap().len();
    let last = bytes - 1;
    let iomem = format!(
        "00000000-{last:08x} : Multikernel Memory Pool\n  00000000-{last:08x} : mk-instance-{id}-{name}-region-0\n"
    );
    std::fs::write(host.emulated().beside("iomem"), iomem).unwrap();
    let mut file = File::create(host.emulated().beside("kcore")).unwrap();
    file.write_all(&kcore::synthetic(0, bytes)).unwrap();
    file.seek(SeekFrom::Start(kcore::SYNTHETIC_OFFSET)).unwrap();
    std::io::copy(&mut File::open(memory).unwrap(), &mut file).unwrap();
}

/// Checks that a vmcore of the guest is complete and shows why the kernel ended.
fn assert_whole(path: &Path) {
    let dump = Dump::open(path).unwrap().unwrap();
    assert_eq!(dump.completeness(), Completeness::Complete);
    let report = analysis::analyse(&dump, AnalysisOptions::default()).unwrap();
    assert_eq!(report.file.checksum, "holds");
    let log = report.log.unwrap().text;
    assert!(log.contains("sysrq triggered crash"), "{log}");
    assert!(log.contains("guest: about to crash"), "{log}");
    assert!(report.kernel.unwrap().release.unwrap().starts_with("6.1."));
}

#[test]
fn the_memory_of_a_kernel_that_failed_is_captured_before_it_is_given_back() {
    let Some(mut host) = Host::prepare_multikernel(Generation::Confirms, CONFIG) else {
        return;
    };
    let guest = CrashedGuest::new(&Plan {
        lines: SHOWS,
        ..Plan::small("6.1")
    });
    a_real_kernel_shows_its_memory_so(&guest);
    host.start();
    host.spawn_kv("web");
    let required = json!({ "vmcore": "required" });
    host.control().set_policy("web", &required);
    show(&host, "web", &guest.memory());

    // A running kernel cannot be frozen, and the error says so.
    let output = json!({ "output": host.path("live") });
    let ended = host.control().operate("POST", CAPTURE, Some(&output));
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let error = ended.error.unwrap();
    assert!(error.message.contains("until it is halted"), "{error:?}");
    assert!(!host.path("live").exists());

    host.emulated().strike("panic", "web");
    let record = recovered(&host, 1);
    let vmcore = record.vmcore.unwrap();
    assert_eq!(vmcore.error, None);
    let panic = vmcore.panic.unwrap();
    assert!(panic.contains("sysrq triggered crash"), "{panic}");
    assert_whole(Path::new(&vmcore.path.unwrap()));
    assert_eq!(host.running("web").summary.generation, 2);

    // A failed instance without auto-heal is captured by hand.
    let alone = json!({ "auto_heal": false, "vmcore": "off" });
    host.control().set_policy("web", &alone);
    show(&host, "web", &guest.memory());
    host.emulated().strike("panic", "web");
    host.control().wait("the failure", || {
        let web = host.control().instance("web");
        (web.summary.state == InstanceState::Failed).then_some(())
    });
    let output = json!({ "output": host.path("core") });
    let ended = host.control().operate("POST", CAPTURE, Some(&output));
    assert_eq!(ended.state, OperationState::Succeeded, "{ended:?}");
    assert_whole(&host.path("core"));
}

/// Checks that the guest's kernel shows all of its memory in /proc/kcore by physical address, as needed to read an
/// instance's memory.
fn a_real_kernel_shows_its_memory_so(guest: &CrashedGuest) {
    let console = std::fs::read(guest.path("console")).unwrap();
    let console = String::from_utf8_lossy(&console);
    let marked = |mark: &str| -> Vec<String> {
        let lines = console
            .lines()
            .filter_map(|line| line.trim().strip_prefix(mark));
        lines.map(str::to_owned).collect()
    };
    let header: Vec<u8> = marked("kcore:")
        .iter()
        .flat_map(|line| {
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .map(|byte| u8::from_str_radix(&byte, 16).unwrap())
        .collect();
    assert_eq!(header.len(), 4096, "{console}");
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&header, 0).unwrap();
    let shown = kcore::shown(&file).unwrap();
    let ranges = marked("iomem: ");
    assert!(!ranges.is_empty(), "{console}");
    for range in ranges {
        let (start, rest) = range.split_once('-').unwrap();
        let (end, _) = rest.split_once(' ').unwrap();
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        // Only whole pages are shown; a range in /proc/iomem ends with its last byte.
        let start = start.next_multiple_of(4096);
        let length = ((end + 1) & !4095) - start;
        let parts = kcore::parts(&shown, start, length);
        assert!(parts.is_some(), "{range} is not in {shown:x?}");
    }
}

/// Host kernels of multikernel Linux are 7.0 or later.
#[test]
fn newer_kernels_too_show_all_their_memory_by_physical_address() {
    for series in ["6.12", "7.3"] {
        let guest = CrashedGuest::new(&Plan {
            lines: SHOWS,
            ..Plan::small(series)
        });
        a_real_kernel_shows_its_memory_so(&guest);
    }
}

#[test]
fn memory_that_cannot_be_read_is_kept_where_it_is_required() {
    let Some(mut host) = Host::prepare_multikernel(Generation::Confirms, CONFIG) else {
        return;
    };
    host.start();
    host.spawn_kv("web");
    let required = json!({ "vmcore": "required" });
    host.control().set_policy("web", &required);
    host.emulated().strike("panic", "web");
    let record = host.control().wait("a person to be asked", || {
        let all: Vec<RecoveryRecord> = host.control().get("/v1/recoveries?instance=web");
        let mut ended = all.into_iter();
        ended.find(|record| record.outcome != RecoveryOutcome::Running)
    });
    let error = record.vmcore.unwrap().error.unwrap();
    assert!(error.contains("iomem"), "{error}");
    let status: Value = host.control().get("/v1/instances/web");
    assert_eq!(status["state"], "operator_action_needed", "{status}");
}
