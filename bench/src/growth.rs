//! The daemon's memory over many morphs: it grows until the bounded history is full, and then stays constant.

use kmorph_tests::Host;

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};
use crate::instances::{key_value, spawn};
use crate::process::resident_mib;

const GROUP: &str = "growth";
/// One heartbeat per second.
const CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 10.0\nmemory_mib = 64\n[pool]\n\
                      share_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";
/// Number of parts of the run; the daemon's memory is sampled after each.
const PARTS: usize = 10;
/// Number of parts in which the bounded history may still fill up.
const FILLING: usize = 4;
/// Maximum growth of the daemon's memory after these parts, MiB.
const PLATEAU_MIB: f64 = 1.0;

pub(crate) fn run(morphs: usize) -> Found {
    let host = Host::with(CONFIG);
    let events = kmorph_tests::Events::follow(host.control());
    let kernels = ["6.1.0-a", "6.12.0-b"].map(|release| host.kernel(release));
    spawn(&host, &events, &key_value("web", &kernels[0], &[]));
    drop(events);
    let resident = || resident_mib(host.daemon_pid());
    let mut seen = vec![resident()];
    for _ in 0..PARTS {
        for n in 0..morphs / PARTS {
            let ended = host.control().morph("web", &kernels[(n + 1) % 2]);
            assert!(ended.error.is_none(), "{ended:?}");
        }
        seen.push(resident());
        eprintln!("  {:.1} MiB", resident());
    }
    let filled = seen[FILLING];
    let most = seen[FILLING..].iter().copied().fold(filled, f64::max);
    let title = |what: &str| format!("{morphs} morphs: {what}");
    let single = |what: &str, value| Figure::single(GROUP, title(what), Unit::Mebibytes, value);
    let figures = vec![
        single("the daemon's memory before", seen[0]),
        single("at the end", seen[PARTS]),
        single(
            "most in the last six tenths, over that before them",
            most - filled,
        )
        .bar(Bar::at_most(Of::Max, PLATEAU_MIB)),
    ];
    let course: Vec<String> = seen.iter().map(|mib| format!("{mib:.1}")).collect();
    let remarks = vec![format!(
        "growth: resident memory in MiB, after each tenth of the morphs: {}",
        course.join(", ")
    )];
    Found { figures, remarks }
}
