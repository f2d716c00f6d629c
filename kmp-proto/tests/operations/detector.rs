//! The failure detector under any events and at any time.

use std::time::Duration;

use kmp_proto::detector::{
    Action, Config, Detector, Event, Sample, TRANSITIONS, VERDICT_GUARD, Verdict,
};
use kmp_proto::message::Health;
use kmp_proto::time::Instant;

use super::{Choices, assert_row};

/// Maximum number of actions that one event causes.
const ACTIONS_MAX: usize = 4;
/// Maximum number of unanswered probes that the detector remembers.
const MISSED_MAX: usize = 16;
/// Maximum number of ticks at one moment until no timer is due.
const TICKS_MAX: usize = 3;

struct World {
    detector: Detector,
    now: Instant,
    /// Probes that can still be answered, with the times of their sending.
    under_way: Vec<(u32, Instant)>,
    last_probe: u32,
    /// Time of sending of the last answered probe: the instance was alive then.
    alive_at: Option<Instant>,
    failed: bool,
}

/// Drives a detector through the events that `bytes` encode.
///
/// # Panics
/// If a rule is broken.
pub fn run(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let now = Instant::from_nanos(1_000_000_000);
    let mut world = World {
        detector: Detector::new(config(choices.byte()), now),
        now,
        under_way: Vec::new(),
        last_probe: 0,
        alive_at: None,
        failed: false,
    };
    while let Some(choice) = choices.next() {
        match choice {
            0..96 => world.advance(choice, choices.byte()),
            96..160 => world.answer_last(),
            _ => {
                let event = world.any_event(choice, &mut choices);
                world.tell(event);
            }
        }
    }
}

fn config(choice: u8) -> Config {
    let timeout = Duration::from_millis(100 << (choice % 10));
    Config::new(timeout, timeout.saturating_mul(10))
}

impl World {
    fn advance(&mut self, choice: u8, ms: u8) {
        self.now = self.now + Duration::from_millis(u64::from(ms) << (choice % 6));
        // Mostly, the daemon is on time and delivers each tick when it is due. Otherwise, the daemon is late.
        for tick in 0.. {
            let due = self.detector.poll_timeout();
            if choice.is_multiple_of(8) || due.is_none_or(|due| due > self.now) {
                break;
            }
            assert!(tick < TICKS_MAX, "always due: {:?}", self.detector);
            self.tell(Event::Tick);
        }
    }

    fn answer_last(&mut self) {
        let (probe, health) = (self.last_probe, Health::Healthy);
        self.tell(Event::Answer { probe, health });
    }

    fn any_event(&self, choice: u8, choices: &mut Choices<'_>) -> Event {
        let probe = u32::from(choices.byte());
        match choice % 12 {
            0 | 1 => Event::ChannelUp,
            2 => Event::ChannelLost,
            3 => Event::KernelAnswered,
            4 => Event::Observed {
                stopped: choices.bit(),
            },
            5 => Event::SendRefused {
                probe: self.last_probe,
            },
            6 => Event::SendRefused { probe },
            7 => Event::SelfLag(Duration::from_millis(
                u64::from(probe) << (choices.byte() % 8),
            )),
            8 => Event::Reconfigure(config(choices.byte())),
            9 => Event::Sample(Sample {
                pressure_cpu: u16::from(probe as u8) << 8,
                pressure_memory: u16::from(choices.byte()) << 8,
                pressure_io: u16::from(choices.byte()) << 8,
                workload_down: choices.bit(),
            }),
            10 => Event::Answer {
                probe,
                health: [Health::Healthy, Health::Degraded, Health::Unhealthy]
                    [usize::from(choices.byte() % 3)],
            },
            _ if probe > 250 => Event::Ended("ended by signal 9".to_owned()),
            _ => Event::Tick,
        }
    }

    fn tell(&mut self, event: Event) {
        let (before, name) = (self.detector.phase(), event.name());
        self.note(&event);
        let (ended, ticked) = (
            matches!(event, Event::Ended(_)),
            matches!(event, Event::Tick),
        );
        self.detector.handle(event, self.now);
        let mut effects = Vec::new();
        while let Some(action) = self.detector.poll_action() {
            assert!(!self.failed, "{action:?} after the verdict");
            effects.push(action.name());
            match action {
                Action::SendProbe { probe } => {
                    assert!(probe > self.last_probe);
                    self.last_probe = probe;
                    self.under_way.push((probe, self.now));
                }
                Action::Failed(verdict) => {
                    assert!(ended || ticked, "a verdict on {name}");
                    if ticked {
                        self.judged(before, &verdict);
                    }
                    self.failed = true;
                }
                _ => {}
            }
        }
        assert!(effects.len() <= ACTIONS_MAX, "{effects:?}");
        assert!(self.detector.missed() <= MISSED_MAX);
        let after = self.detector.phase();
        assert_row(TRANSITIONS.iter(), before, name, after, &effects);
        if self.failed {
            assert_eq!((after, self.detector.poll_timeout()), ("failed", None));
        }
    }

    /// An answer proves that the instance was alive when the probe was sent.
    fn note(&mut self, event: &Event) {
        match event {
            Event::Answer { probe, .. } => {
                let answered = self.under_way.iter().find(|(sent, _)| sent == probe);
                self.alive_at = self.alive_at.max(answered.map(|(_, at)| *at));
            }
            Event::SendRefused { probe } => self.under_way.retain(|(sent, _)| sent != probe),
            Event::ChannelLost => self.under_way.clear(),
            _ => {}
        }
    }

    /// A verdict of silence must not be early.
    fn judged(&self, before: &str, verdict: &Verdict) {
        let config = self.detector.config();
        assert!(!verdict.evidence.is_empty());
        if before == "starting" {
            assert!(verdict.silence >= config.start_timeout);
            return;
        }
        let least = config.timeout + VERDICT_GUARD;
        assert!(verdict.silence >= least, "{verdict:?}");
        let since = self.alive_at.map(|at| self.now - at);
        assert!(since.is_some_and(|since| since >= least), "{since:?}");
    }
}
