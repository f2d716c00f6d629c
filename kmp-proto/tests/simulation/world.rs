//! A daemon with its engines, the kernels, and the network, journal and backend between them, on virtual time. The
//! memory of the daemon dies with it; its journal survives.

use std::collections::BTreeMap;
use std::time::Duration;

use kmp_proto::detector::{self, Detector};
use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod, FenceOrder};
use kmp_proto::message::{Health, Side, StateProvider, capability};
use kmp_proto::morph::{self, CommitRecord, Outcome};
use kmp_proto::recovery::{self, Afterwards, CapturePolicy};
use kmp_proto::time::Instant;

mod orders;

use crate::faults::{Dice, Faults, Strike};
use crate::kernels::{Kernel, Kernels, NEW, OLD, Request};

/// Maximum time from the end of the faults until everything must be settled, ms.
const SETTLE_MS: u64 = 120_000;
/// Maximum number of events in one run; more mean a timer that is always due.
const TURNS_MAX: u64 = 100_000;
/// Downtime of the daemon when it dies, ms.
const RESTART_MS: u64 = 200;
/// Capture policy: memory is captured where possible.
const CAPTURE: CapturePolicy = CapturePolicy::On;
/// Latency of the journal and the backend, ms.
const LOCAL_MS: u64 = 3;

/// An event at some time.
#[derive(Clone, Debug)]
enum Happening {
    /// A request reaches its kernel.
    Asked(u64, Request),
    /// A probe reaches a generation.
    Probed(u64, u32),
    /// An answer reaches the daemon, if the life of the daemon that sent the request still lasts.
    Answered(u32, u64, Box<Answer>),
    ProbeAnswered(u32, u64, u32),
    /// The timeout of a request expires.
    Overdue(u32, u64),
    /// The journal or the backend is done.
    Done(u32, Local),
    /// The backend sees that a generation has ended.
    Ended(u32, u64),
    DaemonStarts,
}

/// A kernel's answer; its event is created on arrival, since events cannot be copied.
#[derive(Clone, Debug)]
struct Answer {
    request: Request,
    committed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Local {
    Record,
    FenceOf(u64),
    Captured,
    Released,
    Spawned,
}

/// The state that outlives the daemon.
#[derive(Debug, Default)]
struct Journal {
    committed: bool,
    outcome: Option<Outcome>,
    /// The current generation of the instance, once the morph is over.
    current: Option<u64>,
    recovering: Option<(u64, Option<FenceCertificate>)>,
}

/// The state that dies with the daemon.
#[derive(Default)]
struct Daemon {
    morph: Option<morph::Engine>,
    recovery: Option<recovery::Engine>,
    watches: BTreeMap<u64, Detector>,
    waiting: BTreeMap<u64, Request>,
    under_way: Vec<Local>,
}

pub(crate) struct World {
    pub(crate) faults: Faults,
    dice: Dice,
    now_ms: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    count: u64,
    /// Number of the daemon's current life.
    life: u32,
    daemon: Option<Daemon>,
    journal: Journal,
    kernels: Kernels,
    steps: usize,
}

fn config() -> morph::Config {
    morph::Config {
        phase_timeout: Duration::from_secs(5),
        expiry: Duration::from_secs(600),
        downtime_budget: Duration::from_millis(10),
        step_overhead: Duration::from_millis(2),
        preference: StateProvider::ALL,
        required_kinds: capability::MEMORY,
        possible_modes: capability::ROUNDS,
        validate_on_request: false,
    }
}

impl World {
    pub(crate) fn new(seed: u64, faults: Faults) -> Self {
        let mut world = Self {
            faults,
            dice: Dice::new(!seed),
            now_ms: 0,
            queue: BTreeMap::new(),
            count: 0,
            life: 0,
            daemon: None,
            journal: Journal::default(),
            kernels: Kernels::new(),
            steps: 0,
        };
        let engine = morph::Engine::new(config(), OLD, NEW, world.now());
        world.daemon = Some(Daemon {
            morph: Some(engine),
            ..Daemon::default()
        });
        world.watch(OLD);
        world.watch(NEW);
        world
    }

    fn now(&self) -> Instant {
        Instant::from_nanos(self.now_ms * 1_000_000)
    }

    fn healed(&self) -> bool {
        self.now_ms >= self.faults.heal_ms
    }

    fn at(&mut self, ms: u64, happening: Happening) {
        self.count += 1;
        self.queue.insert((self.now_ms + ms, self.count), happening);
    }

    /// Sends a message over the network, which may lose, delay or duplicate the message.
    fn send(&mut self, happening: &Happening) {
        let (loss, twice, delay) = match self.healed() {
            true => (0, 0, 5),
            false => (
                self.faults.loss,
                self.faults.duplication,
                self.faults.delay_ms,
            ),
        };
        let copies = 1 + u64::from(self.dice.percent(twice));
        for _ in 0..copies {
            if !self.dice.percent(loss) {
                let ms = 1 + self.dice.below(delay);
                self.at(ms, happening.clone());
            }
        }
    }

    /// Runs until everything is settled: one kernel serves, and no operation is under way.
    pub(crate) fn run(&mut self) {
        self.pump();
        let mut turns = 0;
        while !self.settled() {
            turns += 1;
            assert!(turns < TURNS_MAX, "always due");
            let timer = self.daemon.as_ref().and_then(Daemon::due_ms);
            let next = self.queue.keys().next().map(|(at, _)| *at);
            let at = timer
                .into_iter()
                .chain(next)
                .min()
                .expect("something is due");
            self.now_ms = self.now_ms.max(at);
            assert!(
                self.now_ms < self.faults.heal_ms + SETTLE_MS,
                "not settled: {:?}, {:?}",
                self.journal,
                self.kernels
            );
            match self.queue.first_entry() {
                Some(entry) if entry.key().0 <= self.now_ms => {
                    let happening = entry.remove();
                    self.happen(happening);
                }
                _ => self.tick(),
            }
            self.pump();
            self.check();
        }
        self.check_end();
    }

    /// Checks that at most one kernel serves.
    fn check(&self) {
        let serving = self.kernels.serving();
        assert!(serving.len() <= 1, "these serve at once: {serving:?}");
    }

    fn settled(&self) -> bool {
        let Some(daemon) = &self.daemon else {
            return false;
        };
        let current = self.journal.current;
        self.healed()
            && daemon.morph.is_none()
            && daemon.recovery.is_none()
            && current.is_some_and(|generation| self.kernels.serving() == [generation])
    }

    /// After the commit record, the target kernel or a successor of the target serves; before, the source or a
    /// successor.
    fn check_end(&self) {
        let outcome = self.journal.outcome.as_ref().expect("it is over");
        let (current, committed) = (self.journal.current, self.journal.committed);
        match outcome {
            Outcome::Committed | Outcome::CommittedButFailed(_) => {
                assert!(committed && !self.kernels.alive(OLD));
                assert_ne!(current, Some(OLD));
            }
            Outcome::RolledBack(_) | Outcome::SourceFailed { .. } => {
                assert!(!committed && !self.kernels.alive(NEW));
                assert_ne!(current, Some(NEW));
            }
            Outcome::OperatorActionNeeded { .. } => panic!("every fence is confirmed here"),
        }
    }

    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.journal.outcome.as_ref()
    }

    pub(crate) fn current(&self) -> Option<u64> {
        self.journal.current
    }

    pub(crate) fn steps(&self) -> usize {
        self.steps
    }

    fn happen(&mut self, happening: Happening) {
        let mine = |life: u32| life == self.life && self.daemon.is_some();
        match happening {
            Happening::Asked(id, request) => {
                let committed = self.journal.committed;
                if self.kernels.ask(request, committed).is_some() {
                    let answer = Box::new(Answer { request, committed });
                    self.send(&Happening::Answered(self.life, id, answer));
                }
            }
            Happening::Probed(generation, probe) if self.kernels.alive(generation) => {
                self.send(&Happening::ProbeAnswered(self.life, generation, probe));
            }
            Happening::Answered(life, id, answer) if mine(life) => self.answered(id, &answer),
            Happening::ProbeAnswered(life, generation, probe) if mine(life) => {
                let health = Health::Healthy;
                self.tell_watch(generation, detector::Event::Answer { probe, health });
            }
            Happening::Overdue(life, id) if mine(life) => {
                if let Some(request) = self.daemon.as_mut().unwrap().waiting.remove(&id) {
                    let text = "no answer in time".to_owned();
                    self.tell_morph(morph::Event::Unanswered(request.side(), text));
                }
            }
            Happening::Done(life, local) if mine(life) => self.done(local),
            Happening::Ended(life, generation) if mine(life) => {
                self.tell_watch(generation, detector::Event::Ended("it ended".to_owned()));
            }
            Happening::DaemonStarts => self.start_daemon(),
            _ => {}
        }
    }

    fn answered(&mut self, id: u64, answer: &Answer) {
        // A second answer to the same request is ignored.
        if self.daemon.as_mut().unwrap().waiting.remove(&id).is_none() {
            return;
        }
        // The answer was true when it was sent: a copy of that kernel produces the same event.
        let mut then = Kernels::new();
        if answer.request == Request::Resume {
            then.set(NEW, Kernel::Dead);
        }
        if let Some(event) = then.ask(answer.request, answer.committed) {
            self.tell_morph(event);
        }
    }

    /// The journal or the backend has finished; the daemon learns of the result at the same moment.
    fn done(&mut self, local: Local) {
        let under_way = &mut self.daemon.as_mut().unwrap().under_way;
        let Some(at) = under_way.iter().position(|one| *one == local) else {
            return;
        };
        under_way.remove(at);
        self.take_effect(local);
        match local {
            Local::Record => {
                let record = CommitRecord::restore_from_journal(OLD, NEW);
                self.tell_morph(morph::Event::RecordDurable(record));
            }
            Local::FenceOf(generation) => self.fenced(generation),
            Local::Captured if self.dice.percent(30) => {
                let reason = "the disk is full".to_owned();
                self.tell_recovery(recovery::Event::CaptureFailed(reason));
            }
            Local::Captured => self.tell_recovery(recovery::Event::Captured),
            Local::Released => self.tell_recovery(recovery::Event::Released),
            Local::Spawned => {
                let spawned = self.kernels.serving()[0];
                self.journal.current = Some(spawned);
                self.tell_recovery(recovery::Event::SuccessorStarted);
                self.watch(spawned);
            }
        }
    }

    fn take_effect(&mut self, local: Local) {
        match local {
            Local::Record => self.journal.committed = true,
            Local::FenceOf(generation) => self.kernels.set(generation, Kernel::Dead),
            Local::Spawned => {
                // The journal holds a spawn before the backend makes it, so that a restart finds it.
                self.journal.current = Some(self.kernels.spawn());
                self.journal.recovering = None;
            }
            Local::Captured | Local::Released => {}
        }
    }

    fn fenced(&mut self, fenced: u64) {
        let order = FenceOrder::new(fenced);
        let proof = order.confirm(FenceMethod::ProcessesKilled, Confirmation::ProcessesGone, 1);
        let daemon = self.daemon.as_mut().unwrap();
        daemon.watches.remove(&fenced);
        if daemon.morph.is_some() {
            let side = if fenced == OLD {
                Side::Source
            } else {
                Side::Target
            };
            self.tell_morph(morph::Event::Fenced(side, proof));
        } else {
            self.journal.recovering = Some((fenced, Some(proof.clone())));
            self.tell_recovery(recovery::Event::Fenced(proof));
        }
    }

    fn tick(&mut self) {
        let now = self.now();
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        let due: Vec<u64> = daemon
            .watches
            .iter()
            .filter(|(_, watch)| watch.poll_timeout().is_some_and(|at| at <= now))
            .map(|(generation, _)| *generation)
            .collect();
        for generation in due {
            self.tell_watch(generation, detector::Event::Tick);
        }
        self.tell_morph(morph::Event::Tick);
    }

    fn watch(&mut self, generation: u64) {
        let (timeout, start) = (Duration::from_secs(1), Duration::from_secs(5));
        let watch = Detector::new(detector::Config::new(timeout, start), self.now());
        self.daemon
            .as_mut()
            .unwrap()
            .watches
            .insert(generation, watch);
        self.tell_watch(generation, detector::Event::ChannelUp);
    }

    fn tell_watch(&mut self, generation: u64, event: detector::Event) {
        let now = self.now();
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        if let Some(watch) = daemon.watches.get_mut(&generation) {
            watch.handle(event, now);
        }
    }

    fn tell_morph(&mut self, event: morph::Event) {
        let now = self.now();
        if let Some(engine) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.morph.as_mut())
        {
            engine.handle(event, now);
        }
    }

    fn tell_recovery(&mut self, event: recovery::Event) {
        let now = self.now();
        if let Some(engine) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.recovery.as_mut())
        {
            engine.handle(event, now);
        }
    }

    /// Executes the orders of the engines until none is left; faults occur in between.
    fn pump(&mut self) {
        loop {
            let Some(daemon) = &mut self.daemon else {
                return;
            };
            if let Some(action) = daemon.morph.as_mut().and_then(morph::Engine::poll_action) {
                if self.struck() {
                    continue;
                }
                self.do_morph(action);
            } else if let Some(action) = daemon
                .recovery
                .as_mut()
                .and_then(recovery::Engine::poll_action)
            {
                if self.struck() {
                    continue;
                }
                self.do_recovery(action);
            } else {
                let watches = daemon.watches.iter_mut();
                let found = watches
                    .filter_map(|(generation, watch)| Some((*generation, watch.poll_action()?)))
                    .next();
                let Some((generation, action)) = found else {
                    return;
                };
                self.do_watch(generation, action);
            }
        }
    }

    /// Applies the faults before this action. Returns true if the daemon has died, and the action with it.
    fn struck(&mut self) -> bool {
        let step = self.steps;
        self.steps += 1;
        let strikes: Vec<Strike> = self
            .faults
            .strikes
            .iter()
            .filter(|(at, _)| *at == step)
            .map(|(_, strike)| *strike)
            .collect();
        for strike in strikes {
            match strike {
                Strike::KillSource => self.kill(OLD),
                Strike::KillTarget => self.kill(NEW),
                Strike::KillServing => {
                    for generation in self.kernels.serving() {
                        self.kill(generation);
                    }
                }
                Strike::AskForRollback => {
                    self.tell_morph(morph::Event::RollbackRequested("asked".to_owned()));
                }
                Strike::KillDaemon => self.kill_daemon(),
            }
        }
        self.daemon.is_none()
    }

    fn kill(&mut self, generation: u64) {
        if self.kernels.alive(generation) {
            self.kernels.set(generation, Kernel::Dead);
            // Half of the deaths are visible to the backend; the others only cause silence.
            if self.dice.percent(50) {
                self.at(1, Happening::Ended(self.life, generation));
            }
        }
    }

    /// Kills the daemon. Work under way has taken effect or not; no report arrives.
    fn kill_daemon(&mut self) {
        let Some(daemon) = self.daemon.take() else {
            return;
        };
        for local in daemon.under_way {
            if self.dice.percent(50) {
                self.take_effect(local);
            }
        }
        self.life += 1;
        self.at(RESTART_MS, Happening::DaemonStarts);
    }

    /// Finishes or rolls back the operations that the journal holds.
    fn start_daemon(&mut self) {
        let mut daemon = Daemon::default();
        let mut watched = Vec::new();
        match (&self.journal.outcome, &self.journal.recovering) {
            (None, _) => {
                daemon.morph = Some(match self.journal.committed {
                    true => {
                        let record = CommitRecord::restore_from_journal(OLD, NEW);
                        morph::Engine::resume_committed(record, self.now())
                    }
                    false => morph::Engine::resume_uncommitted(OLD, NEW),
                });
                watched.extend([OLD, NEW]);
            }
            (Some(_), Some((_, Some(proof)))) => {
                daemon.recovery = Some(recovery::Engine::resume_fenced(
                    proof.clone(),
                    CAPTURE,
                    Afterwards::Respawn,
                ));
            }
            (Some(_), Some((failed, None))) => {
                daemon.recovery =
                    Some(recovery::Engine::new(*failed, CAPTURE, Afterwards::Respawn));
            }
            (Some(_), None) => watched.extend(self.journal.current),
        }
        self.daemon = Some(daemon);
        for generation in watched {
            self.watch(generation);
        }
    }
}

impl Daemon {
    /// Returns when the next timer of an engine is due, in whole milliseconds.
    fn due_ms(&self) -> Option<u64> {
        let watches = self.watches.values().filter_map(Detector::poll_timeout);
        let morph = self.morph.as_ref().and_then(morph::Engine::poll_timeout);
        let due = watches.chain(morph).min()?;
        Some(due.as_nanos().div_ceil(1_000_000))
    }
}
