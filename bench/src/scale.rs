//! Many instances in one daemon: the cost of watching them, and whether the detector raises no false alarm on a busy
//! machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kmorph_control_api::{Event, EventKind, HeartbeatStatus, InstanceState, InstanceSummary};
use kmorph_tests::{Events, Host};

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};
use crate::instances::bare;
use crate::process::{available_mib, cpu_time, proportional_mib, resident_mib};

const GROUP: &str = "scale";
/// Ten probes per timeout: one heartbeat per second.
const CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 10.0\nmemory_mib = 64\n[pool]\n\
                      share_cpus = true\nshare_memory = true\nmemory_mib = 1048576\n[limits]\nstart_timeout_s = 300.0\n";
const MB_PER_MIB: f64 = 1.048_576;
/// Number of concurrent spawns.
const SPAWNS_AT_ONCE: usize = 8;
/// Delay between the last spawn and the first measurement.
const SETTLE: Duration = Duration::from_secs(5);

/// The parameters of a measurement.
pub(crate) struct Plan {
    pub(crate) instances: usize,
    pub(crate) quiet: Duration,
    pub(crate) loaded: Duration,
}

pub(crate) fn run(plan: &Plan) -> Found {
    let host = Host::with(CONFIG);
    let daemon = host.daemon_pid();
    let alone = resident_mib(daemon);
    let before = available_mib();
    spawn_all(&host, plan.instances);
    std::thread::sleep(SETTLE);
    let agent = proportional_mib(host.agent(&name(0)));
    let events = Events::follow(host.control());

    let (quiet, rate) = watch(&host, plan.quiet);
    let resident = resident_mib(daemon);
    let alarms_quiet = alarms(&events);
    let load = Load::start();
    let (loaded, _) = watch(&host, plan.loaded);
    drop(load);
    let alarms_loaded = alarms(&events);
    let quiet_stream = alarms_quiet.is_empty() && alarms_loaded.is_empty();
    let disturbed = disturbed(&host, plan.instances);
    assert!(
        disturbed.is_empty() || !quiet_stream,
        "not told of: {disturbed:?}"
    );

    let n = plan.instances;
    let title = |what: &str| format!("{n} instances: {what}");
    let single = |what: &str, unit, value| Figure::single(GROUP, title(what), unit, value);
    let times = |what: &str, alarms: &[Event]| {
        let alarms = f64::from(u32::try_from(alarms.len()).unwrap_or(u32::MAX));
        single(what, Unit::Times, alarms).bar(Bar::at_most(Of::Max, 0.0))
    };
    let figures = vec![
        single("CPU of the daemon, of one core", Unit::Percent, quiet)
            .bar(Bar::at_most(Of::Max, 5.0)),
        single(
            "memory of the daemon",
            Unit::Megabytes,
            resident * MB_PER_MIB,
        )
        .bar(Bar::at_most(Of::Max, 100.0)),
        single("CPU of the daemon, all cores loaded", Unit::Percent, loaded),
        times("false alarms, quiet", &alarms_quiet),
        times("false alarms, all cores loaded", &alarms_loaded),
        single("heartbeats a second and instance", Unit::Times, rate)
            .bar(Bar::at_least(Of::Min, 0.98))
            .bar(Bar::at_most(Of::Max, 1.02)),
        single("one agent (PSS)", Unit::Mebibytes, agent),
    ];
    let mut remarks = vec![format!(
        "scale: quiet for {:?}, all cores loaded for {:?}; the daemon without an instance has \
         {alone:.1} MiB resident; the instances took {:.0} MiB of the machine's memory",
        plan.quiet,
        plan.loaded,
        before - available_mib()
    )];
    remarks.extend(
        alarms_quiet
            .iter()
            .chain(&alarms_loaded)
            .take(10)
            .map(|event| {
                let instance = event.instance.as_deref().unwrap_or("-");
                format!(
                    "scale: alarm at {}: {instance}: {}",
                    event.at, event.message
                )
            }),
    );
    Found { figures, remarks }
}

fn name(n: usize) -> String {
    format!("i-{n}")
}

fn spawn_all(host: &Host, instances: usize) {
    let kernel = host.kernel("6.1.0-a");
    let control = host.control();
    let names: Vec<String> = (0..instances).map(name).collect();
    for batch in names.chunks(SPAWNS_AT_ONCE) {
        let begun: Vec<_> = batch
            .iter()
            .map(|name| control.request("POST", "/v1/instances", Some(&bare(name, &kernel))))
            .map(|reply| reply.ok::<kmorph_control_api::Operation>().id)
            .collect();
        for id in begun {
            let ended = control.finished(&id);
            assert!(ended.error.is_none(), "{ended:?}");
        }
    }
}

/// Watches for `time`; returns the daemon's share of one core, percent, and the heartbeats per second that one instance
/// answers.
fn watch(host: &Host, time: Duration) -> (f64, f64) {
    let answered = || -> u64 {
        let path = format!("/v1/instances/{}/heartbeat", name(0));
        host.control().get::<HeartbeatStatus>(&path).answered
    };
    let (began, cpu, first) = (Instant::now(), cpu_time(host.daemon_pid()), answered());
    std::thread::sleep(time);
    let used = (cpu_time(host.daemon_pid()) - cpu).as_secs_f64();
    let (last, elapsed) = (answered(), began.elapsed().as_secs_f64());
    let beats = f64::from(u32::try_from(last - first).unwrap_or(u32::MAX));
    (used / elapsed * 100.0, beats / elapsed)
}

/// Returns the events since the last call that report trouble of an instance, although all are healthy.
fn alarms(events: &Events) -> Vec<Event> {
    let arrived = events.drain().into_iter().map(|arrived| arrived.event);
    arrived
        .filter(|event| match event.kind {
            EventKind::InstanceState => event.detail["state"] != "running",
            EventKind::Ports
            | EventKind::Daemon
            | EventKind::Operation
            | EventKind::Policy
            | EventKind::Resources
            | EventKind::Vmcore => false,
            EventKind::Detector | EventKind::Recovery | EventKind::Morph | EventKind::Gap => true,
        })
        .collect()
}

/// Returns the instances that do not run as spawned, from the list: the list shows trouble that the events may have
/// missed.
fn disturbed(host: &Host, instances: usize) -> Vec<InstanceSummary> {
    let list: Vec<InstanceSummary> = host.control().get("/v1/instances");
    assert_eq!(list.len(), instances);
    let well = |one: &InstanceSummary| one.state == InstanceState::Running && one.recoveries == 0;
    list.into_iter().filter(|one| !well(one)).collect()
}

/// Busy loops, one per core, that end on drop.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cores)
            .map(|_| {
                let stop = stop.clone();
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::black_box((0..10_000_u64).sum::<u64>());
                    }
                })
            })
            .collect();
        Self { stop, threads }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
