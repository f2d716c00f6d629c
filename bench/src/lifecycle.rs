//! Spawn, death and hang of an instance of the embedded backend.
//!
//! Each measurement uses a new instance: an instance that has failed before is restarted later.

use std::time::{Duration, Instant};

use kmorph_tests::resp::Client;
use kmorph_tests::{Events, Host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Found;
use crate::figure::{Bar, Figure, Of};
use crate::instances::{bare, fill, image, key_value, port, runs, spawn, terminate, verdict};
use crate::process::{children, resident_mib};

const GROUP: &str = "lifecycle";
const SPAWNS: usize = 100;
const KILLS: usize = 50;
const HANGS: u32 = 20;
/// Size of the values in an instance that is killed, bytes.
const KILLED_BYTES: usize = 48 << 20;
/// Maximum resident memory of such an instance for which the bar is valid, MiB.
const KILLED_MIB_MAX: f64 = 64.0;
/// Interval between two probes with [`CONFIG`]. The stops are spread evenly over the interval, because silence counts
/// from the first probe that is not answered.
const INTERVAL: Duration = Duration::from_millis(100);
/// A heartbeat timeout of one second.
const CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\n\
                      share_memory = true\nmemory_mib = 65536\n";

pub(crate) fn run() -> Found {
    let host = Host::with(CONFIG);
    let events = Events::follow(host.control());
    let mut figures = spawns(&host, &events);
    figures.extend(kills(&host, &events));
    figures.push(hangs(&host, &events));
    let remarks = Vec::new();
    Found { figures, remarks }
}

fn spawns(host: &Host, events: &Events) -> Vec<Figure> {
    let kernel = image(host, "6.1.0-a");
    let time = |request: &serde_json::Value, name: &str| {
        let (asked, running) = spawn(host, events, request);
        terminate(host, name);
        running.at - asked
    };
    let agents = (0..SPAWNS).map(|n| {
        let name = format!("bare-{n}");
        time(&bare(&name, &kernel), &name)
    });
    let agents = Figure::times(GROUP, "spawn to healthy, only the agent", agents);
    let servers = (0..SPAWNS).map(|n| {
        let name = format!("kv-{n}");
        time(&key_value(&name, &kernel, &[]), &name)
    });
    let servers = Figure::times(GROUP, "spawn to healthy, with kmorph-kv", servers);
    let bar = Bar::at_most(Of::P99, 100.0);
    vec![agents.bar(bar), servers.bar(bar)]
}

fn kills(host: &Host, events: &Events) -> Vec<Figure> {
    let kernel = image(host, "6.1.0-a");
    let (mut verdicts, mut healthy, mut answers) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..KILLS {
        let name = format!("kill-{n}");
        spawn(host, events, &key_value(&name, &kernel, &[]));
        let port = port(host, &name);
        fill(port, KILLED_BYTES);
        let agent = host.agent(&name);
        let resident: f64 =
            resident_mib(agent) + children(agent).into_iter().map(resident_mib).sum::<f64>();
        assert!(resident <= KILLED_MIB_MAX, "{resident} MiB are resident");
        let killed = signal(agent, Signal::SIGKILL);
        verdicts.push(events.wait("a verdict", |e| verdict(e, &name)).at - killed);
        healthy.push(events.wait("a successor", |e| runs(e, &name, 2)).at - killed);
        // The published socket has listened all the time; now the server answers.
        let mut client = Client::connect(port).expect("the port is published");
        client.call(&["PING"]).expect("the successor answers");
        answers.push(killed.elapsed());
        terminate(host, &name);
    }
    vec![
        Figure::times(GROUP, "SIGKILL to the verdict, 48 MiB of values", verdicts)
            .bar(Bar::at_most(Of::P99, 20.0)),
        Figure::times(GROUP, "SIGKILL to a healthy successor", healthy)
            .bar(Bar::at_most(Of::P99, 200.0)),
        Figure::times(GROUP, "SIGKILL to a client's answer", answers),
    ]
}

fn hangs(host: &Host, events: &Events) -> Figure {
    let kernel = image(host, "6.1.0-a");
    let verdicts: Vec<_> = (0..HANGS)
        .map(|n| {
            let name = format!("hang-{n}");
            spawn(host, events, &bare(&name, &kernel));
            std::thread::sleep(INTERVAL * n / HANGS);
            let stopped = signal(host.agent(&name), Signal::SIGSTOP);
            let judged = events.wait("a verdict", |e| verdict(e, &name)).at;
            events.wait("a successor", |e| runs(e, &name, 2));
            terminate(host, &name);
            judged - stopped
        })
        .collect();
    Figure::times(GROUP, "SIGSTOP to the verdict, timeout 1 s", verdicts)
        .bar(Bar::at_least(Of::Min, 1000.0))
        .bar(Bar::at_most(Of::Max, 1200.0))
}

/// Sends a signal; returns the time immediately before.
fn signal(pid: i32, signal: Signal) -> Instant {
    let before = Instant::now();
    kill(Pid::from_raw(pid), signal).expect("the agent lives");
    before
}
