//! Many concurrent recoveries: the time until all instances run again, the latency of the daemon's answers meanwhile,
//! and its memory. The floor is the time of as many plain spawns, with the same concurrency.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kmorph_control_api::{InstanceState, InstanceSummary};
use kmorph_tests::{Control, Host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};
use crate::instances::bare;
use crate::process::{cpu_time, forget_peak, peak_mib, resident_mib};

const GROUP: &str = "recoveries";
/// One heartbeat per second. The number of concurrent recoveries is that of the spawns.
const CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 10.0\nmemory_mib = 64\n[pool]\n\
                      share_cpus = true\nshare_memory = true\nmemory_mib = 1048576\n[limits]\nstart_timeout_s = 300.0\n\
                      recoveries = 8\n";
/// Number of concurrent spawns.
const SPAWNS_AT_ONCE: usize = 8;
/// Delay between the last spawn and the first measurement.
const SETTLE: Duration = Duration::from_secs(5);
/// Interval between two requests for the list.
const LIST_PAUSE: Duration = Duration::from_millis(10);
/// Timeout until all instances run again.
const PATIENCE: Duration = Duration::from_secs(600);

/// The parameters of a measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Number of instances.
    pub(crate) instances: usize,
    /// Number of instances that are killed.
    pub(crate) killed: usize,
    /// Maximum time until all instances run again.
    pub(crate) bar: Duration,
}

pub(crate) fn run(plan: &Plan) -> Found {
    let host = Host::with(CONFIG);
    let daemon = host.daemon_pid();
    let kernel = host.kernel("6.1.0-a");
    let spawn = |numbers| spawn(&host, &kernel, numbers);
    spawn(0..plan.instances - plan.killed);
    let began = Instant::now();
    spawn(plan.instances - plan.killed..plan.instances);
    let floor = began.elapsed();
    std::thread::sleep(SETTLE);

    let agents: Vec<i32> = (0..plan.killed).map(|n| host.agent(&name(n))).collect();
    let (resident, cpu) = (resident_mib(daemon), cpu_time(daemon));
    forget_peak(daemon);
    let lister = Lister::start(host.control(), plan.instances);
    let began = Instant::now();
    for agent in agents {
        kill(Pid::from_raw(agent), Signal::SIGKILL).expect("the agent runs");
    }
    let healed = lister.all_well(plan.killed).duration_since(began);
    // Survivors receive the last notices a little later.
    std::thread::sleep(SETTLE);
    let lists = lister.stop();
    let growth = peak_mib(daemon) / resident;
    let cpu = (cpu_time(daemon) - cpu).as_secs_f64();

    let title = |what: &str| {
        format!(
            "{} of {} instances killed: {what}",
            plan.killed, plan.instances
        )
    };
    let ratio = healed.as_secs_f64() / floor.as_secs_f64();
    let figures = vec![
        Figure::times(GROUP, title("until all run"), [healed])
            .bar(Bar::at_most(Of::Max, plan.bar.as_secs_f64() * 1000.0)),
        Figure::single(
            GROUP,
            title("that, against as many spawns"),
            Unit::Ratio,
            ratio,
        ),
        Figure::times(GROUP, title("the list, meanwhile"), lists).bar(Bar::at_most(Of::Max, 100.0)),
        Figure::single(
            GROUP,
            title("most memory of the daemon, against before"),
            Unit::Ratio,
            growth,
        )
        .bar(Bar::at_most(Of::Max, 1.5)),
    ];
    let remark = format!(
        "recoveries: {} spawns beside {} instances took {floor:.2?}; the daemon used {cpu:.2} s of CPU time \
         from the kill until {SETTLE:?} after the last recovery, and had {resident:.1} MiB resident before",
        plan.killed,
        plan.instances - plan.killed
    );
    let remarks = vec![remark];
    Found { figures, remarks }
}

fn name(n: usize) -> String {
    format!("i-{n}")
}

fn spawn(host: &Host, kernel: &std::path::Path, numbers: std::ops::Range<usize>) {
    let control = host.control();
    let numbers: Vec<usize> = numbers.collect();
    for batch in numbers.chunks(SPAWNS_AT_ONCE) {
        let begun: Vec<_> = batch
            .iter()
            .map(|n| control.request("POST", "/v1/instances", Some(&bare(&name(*n), kernel))))
            .map(|reply| reply.ok::<kmorph_control_api::Operation>().id)
            .collect();
        for id in begun {
            let ended = control.finished(&id);
            assert!(ended.error.is_none(), "{ended:?}");
        }
    }
}

/// Requests the list repeatedly, on a thread of its own.
struct Lister {
    stop: Arc<AtomicBool>,
    lists: std::sync::mpsc::Receiver<(Instant, Vec<InstanceSummary>)>,
    thread: std::thread::JoinHandle<Vec<Duration>>,
}

impl Lister {
    fn start(control: &Control, instances: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, lists) = std::sync::mpsc::channel();
        let (control, stopped) = (control.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut took = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let list: Vec<InstanceSummary> = control.get("/v1/instances");
                let answered = Instant::now();
                took.push(answered - asked);
                assert_eq!(list.len(), instances);
                let _ = sender.send((answered, list));
                std::thread::sleep(LIST_PAUSE);
            }
            took
        });
        Self {
            stop,
            lists,
            thread,
        }
    }

    /// Returns when the list first showed that this number has been recovered and all instances run.
    fn all_well(&self, recovered: usize) -> Instant {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (at, list) = self.lists.recv_timeout(left).expect("all run in the end");
            let recoveries: u64 = list.iter().map(|one| one.recoveries).sum();
            let run = list.iter().all(|one| one.state == InstanceState::Running);
            if run && recoveries >= recovered as u64 {
                return at;
            }
        }
    }

    fn stop(self) -> Vec<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the lister did not panic")
    }
}
