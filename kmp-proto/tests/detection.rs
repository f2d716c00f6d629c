//! The detector on virtual time: an instance that answers, hangs, stumbles, dies.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use kmp_proto::detector::{Action, Config, Detector, Event, FIRST_ANSWER_MIN, Level, Verdict};
use kmp_proto::message::Health;
use kmp_proto::time::Instant;
use proptest::prelude::*;

const MS: u64 = 1_000_000;

/// Fate of a probe sent at a time, ms: the delay of its answer, ms, or `None` for no answer.
type Fate = Box<dyn Fn(u64) -> Option<u64>>;

struct World {
    detector: Detector,
    fate: Fate,
    answers: BTreeMap<u64, Vec<u32>>,
    now_ms: u64,
    seen: Vec<(u64, Action)>,
}

impl World {
    fn new(timeout_ms: u64, fate: Fate) -> Self {
        Self::from(0, timeout_ms, fate)
    }

    fn from(now_ms: u64, timeout_ms: u64, fate: Fate) -> Self {
        let config = Config::new(
            Duration::from_millis(timeout_ms),
            Duration::from_millis(timeout_ms * 10),
        );
        let detector = Detector::new(config, Instant::from_nanos(now_ms * MS));
        let mut world = Self {
            detector,
            fate,
            answers: BTreeMap::new(),
            now_ms,
            seen: Vec::new(),
        };
        world.tell(Event::ChannelUp);
        world
    }

    fn tell(&mut self, event: Event) {
        self.detector
            .handle(event, Instant::from_nanos(self.now_ms * MS));
        while let Some(action) = self.detector.poll_action() {
            if let Action::SendProbe { probe } = action
                && let Some(delay) = (self.fate)(self.now_ms)
            {
                self.answers
                    .entry(self.now_ms + delay)
                    .or_default()
                    .push(probe);
            }
            self.seen.push((self.now_ms, action));
        }
    }

    fn run_until(&mut self, end_ms: u64) {
        while self.now_ms < end_ms {
            self.now_ms += 1;
            for probe in self.answers.remove(&self.now_ms).unwrap_or_default() {
                self.tell(Event::Answer {
                    probe,
                    health: Health::Healthy,
                });
            }
            let due = self.detector.poll_timeout();
            if due.is_some_and(|due| due.as_nanos() <= self.now_ms * MS) {
                self.tell(Event::Tick);
            }
        }
    }

    fn verdict(&self) -> Option<(u64, &Verdict)> {
        self.seen.iter().find_map(|(at, action)| match action {
            Action::Failed(verdict) => Some((*at, verdict)),
            _ => None,
        })
    }

    fn count(&self, wanted: fn(&Action) -> bool) -> usize {
        self.seen
            .iter()
            .filter(|(_, action)| wanted(action))
            .count()
    }
}

/// Returns when the detector finds an instance healthy whose answers are healthy from `ready_ms` on, and the number of
/// probes until then.
fn found_healthy(ready_ms: u64) -> (u64, usize) {
    let never: Fate = Box::new(|_| None);
    let mut world = World::new(60_000, never);
    let (mut probe_at, mut probes) = (Some((0, 1)), 1);
    for now_ms in 1..60_000 {
        world.now_ms = now_ms;
        if let Some((sent_ms, probe)) = probe_at.take() {
            let ready = sent_ms >= ready_ms;
            let health = if ready {
                Health::Healthy
            } else {
                Health::Unhealthy
            };
            world.tell(Event::Answer { probe, health });
        }
        world.tell(Event::Tick);
        for (at, action) in world.seen.drain(..) {
            match action {
                Action::SendProbe { probe } => (probe_at, probes) = (Some((at, probe)), probes + 1),
                Action::Healthy => return (at, probes),
                other => panic!("{other:?}"),
            }
        }
    }
    panic!("never found healthy");
}

#[test]
fn a_quick_start_is_found_out_quickly_and_a_slow_one_is_not_asked_too_often() {
    for ready_ms in 0..40 {
        let (found, _) = found_healthy(ready_ms);
        assert!(
            found <= 2 * ready_ms + 6,
            "ready at {ready_ms}, found at {found}"
        );
    }
    let (found, probes) = found_healthy(5_000);
    assert!((5_000..=5_051).contains(&found), "{found}");
    assert!(probes <= 105, "{probes}");
}

#[test]
fn a_hang_is_found_between_the_timeout_and_a_fifth_more() {
    for hang_at in [1000, 1003, 1050, 1099, 1234] {
        let mut world = World::new(1000, Box::new(move |at| (at < hang_at).then_some(1)));
        world.run_until(5000);
        let (at, verdict) = world.verdict().unwrap();
        let after = at - hang_at;
        assert!((1000..=1200).contains(&after), "{after} ms after the hang");
        assert_eq!(verdict.level, Level::KernelDead);
        assert_eq!(world.count(|a| matches!(a, Action::Failed(_))), 1);
    }
}

#[test]
fn suspicion_probes_back_off() {
    let mut world = World::new(1000, Box::new(|at| (at < 1000).then_some(1)));
    world.run_until(3000);
    let (suspected, _) = *world
        .seen
        .iter()
        .find(|(_, a)| matches!(a, Action::Suspect { .. }))
        .as_ref()
        .unwrap();
    let probes: Vec<u64> = world
        .seen
        .iter()
        .filter(|(at, a)| at >= suspected && matches!(a, Action::SendProbe { .. }))
        .map(|(at, _)| *at)
        .collect();
    let gaps: Vec<u64> = probes.windows(2).map(|w| w[1] - w[0]).collect();
    assert!(gaps.windows(2).all(|w| w[1] >= w[0] * 2), "{gaps:?}");
}

#[test]
fn a_stumble_is_relieved_and_counted() {
    let mut world = World::new(
        1000,
        Box::new(|at| {
            if (2000..2600).contains(&at) {
                None
            } else {
                Some(1)
            }
        }),
    );
    world.run_until(10_000);
    assert!(world.verdict().is_none());
    assert_eq!(world.count(|a| matches!(a, Action::Suspect { .. })), 1);
    assert_eq!(world.count(|a| matches!(a, Action::Relieved { .. })), 1);
    assert_eq!(world.detector.counters().transient_failures, 1);
    assert_eq!(world.detector.phase(), "monitoring");
}

#[test]
fn an_exit_event_is_a_verdict_at_once() {
    let mut world = World::new(60_000, Box::new(|_| Some(1)));
    world.run_until(500);
    world.tell(Event::Ended("ended by signal 9".into()));
    let (at, verdict) = world.verdict().unwrap();
    assert_eq!(
        (at, &verdict.evidence[..]),
        (500, &["ended by signal 9".to_owned()][..])
    );
    world.run_until(1000);
    assert_eq!(world.detector.poll_timeout(), None);
}

#[test]
fn a_kernel_that_answers_without_its_agent_is_an_agent_failure() {
    let mut world = World::new(1000, Box::new(|at| (at < 1000).then_some(1)));
    world.run_until(1500);
    world.tell(Event::ChannelLost);
    world.tell(Event::KernelAnswered);
    world.run_until(5000);
    assert_eq!(world.verdict().unwrap().1.level, Level::AgentDead);
}

#[test]
fn the_evidence_is_that_of_the_verdict_and_not_of_the_first_suspicion() {
    let mut world = World::new(1000, Box::new(|at| (at < 1000).then_some(1)));
    world.run_until(1250);
    let looks = |world: &World| world.count(|action| matches!(action, Action::LookCloser));
    assert_eq!(looks(&world), 1);
    world.tell(Event::Observed { stopped: false });
    world.run_until(1900);
    assert!(looks(&world) >= 3, "{}", looks(&world));
    world.tell(Event::Observed { stopped: true });
    world.run_until(3000);
    let (_, verdict) = world.verdict().unwrap();
    assert!(verdict.evidence.iter().any(|line| line.contains("stopped")));
}

#[test]
fn losing_the_channel_is_not_losing_the_instance() {
    let mut world = World::new(1000, Box::new(|_| Some(1)));
    world.run_until(2000);
    world.tell(Event::ChannelLost);
    world.run_until(2800);
    world.tell(Event::ChannelUp);
    world.run_until(10_000);
    assert!(world.verdict().is_none());
    world.tell(Event::ChannelLost);
    world.answers.clear();
    world.run_until(20_000);
    let (at, _) = world.verdict().unwrap();
    assert!((11_000..=11_200).contains(&at), "{at}");
}

#[test]
fn a_probe_that_could_not_be_sent_is_not_a_missed_heartbeat() {
    let mut world = World::new(1000, Box::new(|_| None));
    world.fate = Box::new(|at| (at < 500).then_some(1));
    world.run_until(499);
    for _ in 0..20 {
        world.now_ms += 100;
        world.tell(Event::Tick);
        let last = world.seen.iter().rev().find_map(|(_, a)| match a {
            Action::SendProbe { probe } => Some(*probe),
            _ => None,
        });
        world.tell(Event::SendRefused {
            probe: last.unwrap(),
        });
    }
    assert!(world.verdict().is_none());
    assert!(world.count(|a| matches!(a, Action::TransportCongested)) > 0);
}

/// A flapping channel causes many probes in little time, more than the detector remembers.
#[test]
fn an_answer_to_a_probe_that_is_no_longer_remembered_is_a_sign_of_life() {
    let mut world = World::new(1000, Box::new(|at| (at < 1000).then_some(1)));
    world.run_until(1000);
    let mut sent = Vec::new();
    while world.now_ms < 1800 {
        world.run_until(world.now_ms + 40);
        world.tell(Event::ChannelUp);
        sent.extend(
            world
                .seen
                .iter()
                .rev()
                .find_map(|(at, action)| match action {
                    Action::SendProbe { probe } => Some((*at, *probe)),
                    _ => None,
                }),
        );
    }
    let (alive_at, probe) = sent[2];
    let health = Health::Healthy;
    world.tell(Event::Answer { probe, health });
    world.run_until(5000);
    let (failed_at, _) = world.verdict().unwrap();
    assert!(failed_at > alive_at + 1000, "{alive_at} {failed_at}");
    assert!(failed_at <= 1800 + 1200, "{failed_at}");
}

/// Returns the times of the probes of an instance that started at `began_ms`, up to `end_ms`.
fn probes_of(timeout_ms: u64, began_ms: u64, end_ms: u64) -> Vec<u64> {
    let mut world = World::from(began_ms, timeout_ms, Box::new(|_| Some(1)));
    world.run_until(end_ms);
    let probes = world.seen.iter();
    probes
        .filter(|(_, action)| matches!(action, Action::SendProbe { .. }))
        .map(|(at, _)| *at)
        .collect()
}

#[test]
fn instances_watched_at_leisure_are_asked_together_and_as_often_as_before() {
    let (one, other) = (probes_of(10_000, 1, 60_000), probes_of(10_000, 13, 60_000));
    assert_eq!(one[3..], other[3..]);
    assert!((58..=62).contains(&one.len()), "{}", one.len());
    let (one, other) = (probes_of(1000, 1, 6000), probes_of(1000, 13, 6000));
    assert_ne!(one[3..], other[3..], "a short interval is kept exactly");
}

#[test]
fn an_instance_that_never_answers_fails_to_start() {
    let mut world = World::new(100, Box::new(|_| None));
    world.run_until(5000);
    let (at, verdict) = world.verdict().unwrap();
    assert!((1000..=1050).contains(&at));
    assert!(verdict.evidence[0].contains("no healthy answer"));
}

proptest! {
    #[test]
    fn an_instance_that_answers_in_time_is_never_condemned(
        timeout in 200u64..3000, delays in proptest::collection::vec(0u64..1000, 1..30),
    ) {
        let slowest = timeout * 9 / 10;
        let world_fate = move |at: u64| {
            let delay = delays[usize::try_from(at % 97).unwrap() % delays.len()];
            Some(1 + delay % slowest)
        };
        let mut world = World::new(timeout, Box::new(world_fate));
        world.run_until(timeout * 20);
        prop_assert!(world.verdict().is_none());
    }

    #[test]
    fn the_daemons_own_lateness_never_condemns(late in 1u64..5000) {
        let mut world = World::new(1000, Box::new(|_| Some(1)));
        world.run_until(2000);
        // The daemon sleeps: the instance answers probes, but the daemon does not read the answers.
        world.now_ms += late;
        world.tell(Event::SelfLag(Duration::from_millis(late)));
        world.tell(Event::Tick);
        prop_assert!(world.verdict().is_none());
        let waiting: Vec<_> = world.answers.range(..=world.now_ms).flat_map(|(_, p)| p.clone()).collect();
        for probe in waiting {
            world.tell(Event::Answer { probe, health: Health::Healthy });
        }
        world.run_until(12_000);
        prop_assert!(world.verdict().is_none());
    }

    #[test]
    fn loss_delay_and_death_end_in_the_right_verdict_and_never_early(
        loss in 0u64..50, death in 2000u64..6000, seed: u64,
    ) {
        let dice = move |at: u64| {
            let mut x = seed ^ at.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            x ^= x >> 29;
            x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
            x >> 33
        };
        let fate = move |at: u64| (at < death && dice(at) % 100 >= loss).then_some(1 + dice(at) % 20);
        let mut world = World::new(1000, Box::new(fate));
        world.run_until(20_000);
        let (at, verdict) = world.verdict().unwrap();
        // A whole timeout of silence precedes every verdict.
        prop_assert!(verdict.silence >= Duration::from_secs(1));
        prop_assert!(at <= death + 20 + 1000 + 200);
    }
}

/// An instance that runs already has the rest of its start time, but at least its timeout and the time that a daemon
/// needs after its own start.
#[test]
fn what_runs_already_has_only_the_rest_of_its_time_to_start() {
    let seconds = Duration::from_secs;
    let start_timeout = |timeout: u64, start: u64, age: Duration| {
        let config = Config::new(seconds(timeout), seconds(start));
        config.already_runs_for(age).start_timeout
    };
    assert_eq!(start_timeout(1, 30, Duration::ZERO), seconds(30));
    assert_eq!(start_timeout(1, 30, seconds(20)), seconds(10));
    assert_eq!(start_timeout(1, 30, seconds(29)), FIRST_ANSWER_MIN);
    assert_eq!(start_timeout(10, 30, Duration::MAX), seconds(10));
    assert_eq!(start_timeout(60, 30, Duration::MAX), seconds(30));
}

#[test]
fn an_agent_that_answers_without_a_workload_is_not_called_dead() {
    let config = Config::new(Duration::from_secs(1), Duration::from_secs(10));
    let mut detector = Detector::new(config, Instant::default());
    let at = |ms: u64| Instant::from_nanos(ms * MS);
    detector.handle(Event::ChannelUp, at(0));
    let mut verdict = None;
    for ms in 0..11_000 {
        detector.handle(Event::Tick, at(ms));
        while let Some(action) = detector.poll_action() {
            match action {
                Action::SendProbe { probe } => {
                    let health = Health::Unhealthy;
                    detector.handle(Event::Answer { probe, health }, at(ms));
                }
                Action::Failed(found) => verdict = Some(found),
                _ => {}
            }
        }
    }
    let verdict = verdict.unwrap();
    assert_eq!(verdict.level, Level::WorkloadFailed);
    let text = verdict.evidence.join("; ");
    assert!(
        text.contains("its agent answers that it is unhealthy"),
        "{text}"
    );
}

/// A generation that was healthy under an earlier watch has started: a later failure of its workload is no failed
/// start.
#[test]
fn what_was_healthy_before_its_watch_began_is_not_judged_by_its_start() {
    let began = |has_served| {
        let mut config = Config::new(Duration::from_secs(1), Duration::from_secs(10));
        config.has_served = has_served;
        let mut detector = Detector::new(config, Instant::default());
        detector.handle(Event::ChannelUp, Instant::default());
        let Some(Action::SendProbe { probe }) = detector.poll_action() else {
            panic!("a probe is due");
        };
        let health = Health::Unhealthy;
        detector.handle(Event::Answer { probe, health }, Instant::from_nanos(MS));
        (detector.phase(), detector.poll_action())
    };
    assert_eq!(began(true), ("monitoring", Some(Action::Healthy)));
    assert_eq!(began(false), ("starting", None));
}
