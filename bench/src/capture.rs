//! A large instance that fails under kmorphd: the times until its kernel's log and its dump exist, and the memory that
//! the daemon needs for them.

use kmorph_control_api::RecoveryRecord;
use kmorph_tests::{Events, Host, kernels};
use serde_json::json;

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};
use crate::instances::{fill, key_value, port, runs, spawn, terminate};
use crate::process::{forget_peak, peak_mib};

const GROUP: &str = "vmcore";
const NAME: &str = "large";
const FAILURES: u64 = 3;
/// Size of the values in the instance, MiB: the contents of its memory besides the kernel.
const VALUES_MIB: usize = 256;
const CONFIG: &str = "backend = \"qemu\"\n[defaults]\nheartbeat_timeout_s = 10.0\nmemory_mib = MIB\n\
                      vmcore = \"on\"\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";

pub(crate) fn run(memory_mib: u64) -> Found {
    if !kernels::cache().join("kernels/6.1").is_file() {
        let remark = "capture: not measured, there is no kernel 6.1: run scripts/setup-tests";
        let (figures, remarks) = (Vec::new(), vec![remark.to_owned()]);
        return Found { figures, remarks };
    }
    let host = Host::with(&CONFIG.replace("MIB", &memory_mib.to_string()));
    let events = Events::follow(host.control());
    let mut request = key_value(NAME, &kernels::debian("6.1"), &[]);
    request["kernel_cmdline"] = json!(kernels::PANICS_ON_NMI);
    spawn(&host, &events, &request);
    let (mut logs, mut dumps, mut peaks, mut grown) = (vec![], vec![], vec![], vec![]);
    for failure in 1..=FAILURES {
        fill(port(&host, NAME), VALUES_MIB << 20);
        forget_peak(host.daemon_pid());
        let before = peak_mib(host.daemon_pid());
        let run_dir = host.control().instance(NAME).run_dir;
        kernels::qmp(run_dir.as_ref(), "inject-nmi");
        events.wait("a successor", |e| runs(e, NAME, failure + 1));
        let peak = peak_mib(host.daemon_pid());
        peaks.push(peak);
        grown.push(peak - before);
        let path = format!("/v1/recoveries?instance={NAME}");
        let records: Vec<RecoveryRecord> = host.control().get(&path);
        let vmcore = records
            .into_iter()
            .next_back()
            .and_then(|record| record.vmcore);
        let vmcore = vmcore.expect("a capture");
        assert_eq!(vmcore.error, None);
        logs.push(vmcore.log_ms.expect("a log"));
        dumps.push(vmcore.captured_ms.expect("a dump"));
    }
    terminate(&host, NAME);
    let of = |what: &str, unit, values| Figure::of(GROUP, what, unit, values);
    let figures = vec![
        of(
            &format!("instance of {memory_mib} MiB: verdict to its kernel's log"),
            Unit::Milliseconds,
            logs,
        )
        .bar(Bar::at_most(Of::Max, 1000.0)),
        of(
            &format!("instance of {memory_mib} MiB: verdict to a verified dump"),
            Unit::Milliseconds,
            dumps,
        ),
        of("most memory of kmorphd meanwhile", Unit::Mebibytes, peaks)
            .bar(Bar::at_most(Of::Max, 128.0)),
        of("of it, for the capture", Unit::Mebibytes, grown),
    ];
    let remark = format!("capture: the instance holds {VALUES_MIB} MiB of values");
    Found {
        figures,
        remarks: vec![remark],
    }
}
