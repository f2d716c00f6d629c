//! A large instance that fails under kmorphd with a capture of all of its memory: read by the daemon alone, and with
//! the help of two survivors.

use kmorph_control_api::{RecoveryRecord, VmcoreRecord};
use kmorph_tests::{Events, Host, kernels};
use serde_json::json;

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};
use crate::instances::{fill, key_value, port, runs, spawn, terminate};
use crate::process::{forget_peak, peak_mib};

const GROUP: &str = "survivors";
const FAILED: &str = "large";
const SURVIVORS: [&str; 2] = ["first", "second"];
const FAILURES: usize = 3;
/// Size of the values in the failing instance, MiB.
const VALUES_MIB: usize = 512;
const CONFIG: &str = "backend = \"qemu\"\n[defaults]\nheartbeat_timeout_s = 10.0\nmemory_mib = 4096\n\
                      vmcore = \"on\"\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n[vmcore]\nlevel = 0\n";

pub(crate) fn run() -> Found {
    let host = Host::with(CONFIG);
    let events = Events::follow(host.control());
    let kernel = kernels::debian("6.1");
    for name in SURVIVORS {
        let mut survivor = key_value(name, &kernel, &[]);
        survivor["memory_bytes"] = json!(512 << 20);
        spawn(&host, &events, &survivor);
    }
    let mut request = key_value(FAILED, &kernel, &[]);
    request["kernel_cmdline"] = json!(kernels::PANICS_ON_NMI);
    let mut figures = Vec::new();
    for (survivors, how) in [(0, "by the daemon alone"), (2, "with two survivors")] {
        host.configure(&format!("{CONFIG}survivors = {survivors}\n"));
        host.control().request("POST", "/v1/daemon/reload", None);
        // A new instance for each series: an instance that fails too often is not restarted.
        spawn(&host, &events, &request);
        let (mut dumps, mut shares, mut peaks) = (vec![], vec![], vec![]);
        for _ in 0..FAILURES {
            let (vmcore, peak) = fail(&host, &events);
            dumps.push(vmcore.captured_ms.expect("a dump"));
            #[expect(clippy::cast_precision_loss, reason = "bytes of memory, for a figure")]
            let read = vmcore.read_by.values().sum::<u64>() as f64 / f64::from(1 << 20);
            shares.push(read);
            peaks.push(peak);
        }
        terminate(&host, FAILED);
        let of =
            |what: &str, unit, values| Figure::of(GROUP, format!("{what}, {how}"), unit, values);
        figures.push(of("verdict to a dump of all", Unit::Milliseconds, dumps));
        if survivors > 0 {
            figures.push(of("of it, read by them", Unit::Mebibytes, shares));
        }
        let peak = of("most memory of kmorphd meanwhile", Unit::Mebibytes, peaks);
        figures.push(peak.bar(Bar::at_most(Of::Max, 128.0)));
    }
    for name in SURVIVORS {
        terminate(&host, name);
    }
    let remark = format!(
        "survivors: a dump of all is of an instance of 4 GiB with {VALUES_MIB} MiB of values, of which zeros alone are left out; \
         survivors have 512 MiB and one CPU"
    );
    Found {
        figures,
        remarks: vec![remark],
    }
}

/// Makes the instance fail; returns the record of the capture, and the daemon's peak memory meanwhile, MiB.
fn fail(host: &Host, events: &Events) -> (VmcoreRecord, f64) {
    fill(port(host, FAILED), VALUES_MIB << 20);
    forget_peak(host.daemon_pid());
    let failing = host.control().instance(FAILED);
    kernels::qmp(failing.run_dir.as_ref(), "inject-nmi");
    let next = failing.summary.generation + 1;
    events.wait("a successor", |e| runs(e, FAILED, next));
    let peak = peak_mib(host.daemon_pid());
    let path = format!("/v1/recoveries?instance={FAILED}");
    let records: Vec<RecoveryRecord> = host.control().get(&path);
    let vmcore = records.into_iter().next_back().and_then(|r| r.vmcore);
    let vmcore = vmcore.expect("a capture");
    assert_eq!(vmcore.error, None);
    (vmcore, peak)
}
