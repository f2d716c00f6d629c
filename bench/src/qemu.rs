//! Real kernels in QEMU: spawn, panic, and morphs from 6.1 to 6.12. Requires the packages and kernels of
//! `scripts/setup-tests`; a remark reports that they are missing.

use std::time::{Duration, Instant};

use kmorph_control_api::MorphStatus;
use kmorph_tests::resp::{Client, Seen, Steady};
use kmorph_tests::{Events, Host, kernels};
use serde_json::json;

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};
use crate::instances::{fill, key_value, port, runs, spawn, terminate, verdict};
use crate::morph::{NAME, committed, downtime, morph};

const GROUP: &str = "qemu";
const SERIES: [&str; 2] = ["6.1", "6.12"];
const SPAWNS: usize = 5;
const PANICS: usize = 5;
const MORPHS: usize = 5;
/// Size of the values in the morphed instance, MiB: they are copied by rounds.
const VALUES_MIB: usize = 32;
/// Interval between two requests of the client: software emulation answers only slightly faster.
const PACE: Duration = Duration::from_millis(5);
/// Silence is not measured here; a guest without KVM on a busy machine is slow.
const CONFIG: &str = "backend = \"qemu\"\n[defaults]\nheartbeat_timeout_s = 5.0\n\
                      memory_mib = 256\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";

pub(crate) fn run() -> Found {
    let present = |series: &&str| kernels::cache().join("kernels").join(series).is_file();
    if let Some(missing) = SERIES.iter().find(|series| !present(series)) {
        let remark =
            format!("qemu: not measured, there is no kernel {missing}: run scripts/setup-tests");
        let (figures, remarks) = (Vec::new(), vec![remark]);
        return Found { figures, remarks };
    }
    let host = Host::with(CONFIG);
    let events = Events::follow(host.control());
    let mut found = Found::default();
    for series in SERIES {
        found.figures.push(spawns(&host, &events, series));
    }
    found.figures.extend(panics(&host, &events));
    morphs(&host, &events, &mut found);
    found
}

fn spawns(host: &Host, events: &Events, series: &str) -> Figure {
    let kernel = kernels::debian(series);
    // The first spawn builds the guest's image, which is cached.
    let times: Vec<_> = (0..=SPAWNS)
        .map(|n| {
            let name = format!("s{n}");
            let (asked, running) = spawn(host, events, &key_value(&name, &kernel, &[]));
            terminate(host, &name);
            running.at - asked
        })
        .skip(1)
        .collect();
    Figure::times(GROUP, format!("Linux {series}: spawn to healthy"), times)
        .bar(Bar::at_most(Of::Max, 8000.0))
}

fn panics(host: &Host, events: &Events) -> Vec<Figure> {
    let kernel = kernels::debian("6.1");
    let (mut verdicts, mut healthy, mut answers) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..PANICS {
        let name = format!("p{n}");
        let mut request = key_value(&name, &kernel, &[]);
        request["kernel_cmdline"] = json!(kernels::PANICS_ON_NMI);
        spawn(host, events, &request);
        let port = port(host, &name);
        let run_dir = host.control().instance(&name).run_dir;
        let told = Instant::now();
        kernels::qmp(run_dir.as_ref(), "inject-nmi");
        verdicts.push(events.wait("a verdict", |e| verdict(e, &name)).at - told);
        healthy.push(events.wait("a successor", |e| runs(e, &name, 2)).at - told);
        let mut client = Client::connect(port).expect("the port is published");
        client.call(&["PING"]).expect("the successor answers");
        answers.push(told.elapsed());
        terminate(host, &name);
    }
    vec![
        Figure::times(GROUP, "Linux 6.1: panic to the verdict", verdicts),
        Figure::times(GROUP, "Linux 6.1: panic to a healthy successor", healthy)
            .bar(Bar::at_most(Of::Max, 10_000.0)),
        Figure::times(GROUP, "Linux 6.1: panic to a client's answer", answers),
    ]
}

fn morphs(host: &Host, events: &Events, found: &mut Found) {
    let [old, new] = SERIES.map(kernels::debian);
    spawn(host, events, &key_value(NAME, &old, &[]));
    let port = port(host, NAME);
    fill(port, VALUES_MIB << 20);
    let mut runs = Runs::default();
    for _ in 0..MORPHS {
        let client = Steady::start(port, PACE);
        // The first answers are late, because the connection is new.
        std::thread::sleep(PACE * 20);
        let (begin, end, operation) = morph(host, events, &new, true);
        let quiet = Instant::now();
        std::thread::sleep(end - begin);
        let seen = client.stop();
        runs.with.push(seen.longest_gap_between(begin, end));
        runs.without
            .push(seen.longest_gap_between(quiet, quiet + (end - begin)));
        runs.took.push(end - begin);
        runs.ended.push(committed(host, &operation));
        runs.seen.push(seen);
        morph(host, events, &old, true);
    }
    terminate(host, NAME);
    found.figures.extend(runs.figures());
    let failures: Vec<_> = runs
        .seen
        .iter()
        .flat_map(|s| s.first_failure.clone())
        .collect();
    found.remarks.push(format!(
        "qemu: {VALUES_MIB} MiB of values, one request each {PACE:?}; the connection does not move and \
         breaks once: {failures:?}"
    ));
}

/// Measurements of the morphs from 6.1 to 6.12.
#[derive(Default)]
struct Runs {
    with: Vec<Duration>,
    without: Vec<Duration>,
    took: Vec<Duration>,
    ended: Vec<MorphStatus>,
    seen: Vec<Seen>,
}

impl Runs {
    fn figures(&self) -> Vec<Figure> {
        let name = |what: &str| format!("6.1 to 6.12: {what}");
        let times = |what: &str, times: &[Duration]| {
            Figure::times(GROUP, name(what), times.iter().copied())
        };
        let count = |what: &str, of: fn(&Seen) -> u64| {
            let counts = self.seen.iter().map(of);
            let counts = counts.map(|n| f64::from(u32::try_from(n).unwrap_or(u32::MAX)));
            Figure::of(GROUP, name(what), Unit::Times, counts.collect())
        };
        let mut figures = vec![
            times("client's longest gap, with a morph", &self.with),
            times("client's longest gap, without", &self.without),
            count("requests that failed", |seen| seen.failed),
            count("wrong answers", |seen| seen.wrong).bar(Bar::at_most(Of::Max, 0.0)),
            times("a whole morph", &self.took),
        ];
        figures.extend(downtime(GROUP, &self.ended, name));
        figures
    }
}
