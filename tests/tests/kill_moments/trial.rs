//! One blow, and the checks of its outcome.

use std::time::{Duration, Instant};

use kmorph_control_api::{
    HeartbeatStatus, InstanceState, InstanceStatus, PortState, RecoveryRecord,
};
use kmorph_tests::Host;
use kmorph_tests::resp::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::writer::{KEY, Writer};

/// Number of answered heartbeats that prove the watch of an instance: they take longer than its heartbeat timeout.
const WATCHED: u64 = 14;
/// A heartbeat timeout that a busy machine meets, and a pool with ample resources.
const CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 3.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";

/// A process to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Victim {
    /// `kmorphd`.
    Daemon,
    /// The agent of the serving generation.
    Source,
    /// The agent of the generation that is to take over, if it exists yet.
    Target,
}

/// The operation in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Course {
    /// A morph that proceeds automatically to its commit.
    Morph,
    /// The recovery after the death of an agent.
    Recovery,
}

/// A blow; see the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blow {
    /// The operation in progress.
    pub(crate) course: Course,
    /// The processes to kill.
    pub(crate) victims: &'static [Victim],
    /// The moment, as a fraction of the undisturbed duration of the course.
    pub(crate) part: f64,
}

/// A host with one instance, which receives one blow after the other.
pub(crate) struct Trial {
    host: Host,
    port: u16,
    morph_takes: Duration,
    recovery_takes: Duration,
    next_number: u64,
}

impl Trial {
    /// Prepares a host, and measures the durations of a morph and a recovery.
    pub(crate) fn prepare() -> Self {
        let host = Host::with(CONFIG);
        let port = host.spawn_kv("web");
        let begun = Instant::now();
        let morphed = host.control().morph("web", &host.kernel("6.12.0-b"));
        assert!(morphed.error.is_none(), "{morphed:?}");
        let morph_takes = begun.elapsed();
        let begun = Instant::now();
        let before = host.running("web").summary.generation;
        end(host.agent("web"));
        host.successor_of("web", before);
        Self {
            host,
            port,
            morph_takes,
            recovery_takes: begun.elapsed(),
            next_number: 1,
        }
    }

    /// Deals `blow`, restarts the daemon twice, and checks the rules.
    pub(crate) fn run(&mut self, number: usize, blow: Blow) {
        let scene = Scene::set(self);
        let wait = match blow.course {
            Course::Morph => {
                begin_morph(&self.host, &self.host.kernel("6.12.0-b"));
                self.morph_takes.mul_f64(blow.part)
            }
            Course::Recovery => {
                end(scene.source);
                self.recovery_takes.mul_f64(blow.part)
            }
        };
        // Not a wait for an event: the test varies the moment of the blow.
        std::thread::sleep(wait);
        let mut killed = self.strike(&scene, blow.victims);
        if blow.course == Course::Recovery {
            killed.push(scene.before.summary.generation);
        }
        self.restart_twice(number);
        let what = format!("moment {number}: {blow:?} after {wait:?}, killed {killed:?}");
        self.check(scene, &killed, &what);
    }

    /// Makes the daemon die immediately before `step` of a morph.
    pub(crate) fn run_at_step(&mut self, step: &str) {
        let scene = Scene::set(self);
        let kernel = self.host.kernel("6.12.0-b");
        let died = self.host.die_before(step, kmorph_tests::DEADLINE, |host| {
            begin_morph(host, &kernel);
        });
        assert!(died, "the morph did not come to {step}");
        self.host.start();
        self.host.restart_by_kill();
        self.check(scene, &[], &format!("killed before {step}"));
    }

    /// Kills all victims at once; returns the killed generations.
    fn strike(&mut self, scene: &Scene, victims: &[Victim]) -> Vec<u64> {
        let mut killed = Vec::new();
        for victim in victims {
            match victim {
                Victim::Daemon => self.host.kill_daemon(),
                Victim::Source if end(scene.source) => {
                    killed.push(scene.before.summary.generation);
                }
                Victim::Target => {
                    let target = scene.before.summary.generation + 1;
                    if self.agent_of(target).is_some_and(end) {
                        killed.push(target);
                    }
                }
                Victim::Source => {}
            }
        }
        killed
    }

    /// Returns the agent's process ID of a generation that may not be the active one.
    fn agent_of(&self, generation: u64) -> Option<i32> {
        let config = self
            .host
            .path(&format!("run/instances/web/{generation}/agent.json"));
        let config = config.as_os_str().as_encoded_bytes().to_owned();
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|p| p.file_name().to_str()?.parse::<i32>().ok());
        pids.into_iter().find(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == config)
        })
    }

    fn restart_twice(&mut self, number: usize) {
        self.host.kill_daemon();
        self.host.start();
        // The progress of the first restarted daemon varies as well.
        std::thread::sleep(Duration::from_millis(number as u64 * 37 % 400));
        self.host.restart_by_kill();
    }

    fn check(&mut self, scene: Scene, killed: &[u64], what: &str) {
        let after = self.settled();
        let acknowledged = scene.writer.stop();
        let recovered: Vec<_> = self
            .recoveries()
            .into_iter()
            .filter(|r| r.id > scene.last_recovery)
            .collect();
        // If the daemon dies before a recovery starts its successor, the next recovery is of that successor; the next
        // death can interrupt that recovery too.
        let never_started =
            |recovery: &RecoveryRecord| recovery.evidence == ["it was never started"];
        let unborn: Vec<_> = recovered.iter().filter(|r| never_started(r)).collect();
        for recovery in &recovered {
            let failed = recovery.failed_generation;
            let is_unborn = unborn.iter().any(|r| r.failed_generation == failed);
            if is_unborn && !killed.is_empty() {
                continue;
            }
            assert!(
                killed.contains(&failed),
                "{what}: recovered without a cause: {recovery:?}"
            );
        }
        let port = &after.summary.published[0];
        assert_eq!(port.state, PortState::Open, "{what}: {port:?}");
        let mut client = Client::connect(self.port).unwrap_or_else(|e| panic!("{what}: {e}"));
        let found = client
            .call(&["GET", KEY])
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let found: u64 = found.parse().unwrap_or(0);
        if recovered.is_empty() {
            assert!(
                found >= acknowledged,
                "{what}: {acknowledged} was acknowledged, {found} is left"
            );
            let kept = client.call(&["GET", "kept"]).unwrap();
            assert_eq!(kept, scene.mark, "{what}");
        }
        self.next_number = found.max(acknowledged) + 1_000;
    }

    fn recoveries(&self) -> Vec<RecoveryRecord> {
        self.host.control().get("/v1/recoveries?instance=web")
    }

    /// Waits until the instance runs and has answered heartbeats for longer than its timeout.
    fn settled(&self) -> InstanceStatus {
        let control = self.host.control();
        let mut since = None;
        control.wait("it to run and to be watched", || {
            let now = control.instance("web");
            let beat: HeartbeatStatus = control.get("/v1/instances/web/heartbeat");
            let generation = now.summary.generation;
            if now.summary.state != InstanceState::Running {
                since = None;
                return None;
            }
            let (of, from) = *since.get_or_insert((generation, beat.answered));
            if of != generation {
                since = None;
                return None;
            }
            (beat.answered >= from + WATCHED).then_some(now)
        })
    }
}

/// The state before the blow.
struct Scene {
    before: InstanceStatus,
    source: i32,
    last_recovery: u64,
    mark: String,
    writer: Writer,
}

impl Scene {
    fn set(trial: &Trial) -> Self {
        let before = trial.host.running("web");
        let mark = format!("generation {}", before.summary.generation);
        let mut client = Client::connect(trial.port).unwrap();
        assert_eq!(client.call(&["SET", "kept", &mark]).unwrap(), "OK");
        let recoveries = trial.recoveries();
        Self {
            source: before.processes["agent"],
            before,
            last_recovery: recoveries.iter().map(|r| r.id).max().unwrap_or(0),
            mark,
            writer: Writer::start(trial.port, trial.next_number),
        }
    }
}

/// Begins a morph that proceeds automatically to its commit. The daemon may die before it answers. If a busy machine
/// keeps the instance from answering for a moment, the morph is refused and requested again.
fn begin_morph(host: &Host, kernel: &std::path::Path) {
    let body = json!({
        "kernel": kernel, "auto_validate": true, "auto_commit": true, "force": true,
    });
    let (path, body) = ("/v1/instances/web/morph", body.to_string());
    let control = host.control();
    control.wait("the morph to begin", || {
        let reply = control.try_request("POST", path, Some(&body));
        reply.is_none_or(|reply| reply.status < 300).then_some(())
    });
}

/// Kills a process; returns true if the process existed.
fn end(pid: i32) -> bool {
    kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok()
}
