//! The failure detector: is this generation alive, and if not, how do we know?
//!
//! ```text
//!             first healthy answer              silence > 2 intervals
//!  Starting ────────────────────────▶ Monitoring ◀──────────────▶ Detecting
//!     │ start timeout                     │          an answer        │ silence > timeout
//!     └──────────────────────────┬────────┴───────────────────────────┘
//!                                ▼  (an exit event leads here from anywhere, at once)
//!                             Failed(verdict)
//! ```
//!
//! Invariants:
//! * Silence begins with the sending of the first probe that was not answered, or with the loss of
//!   the channel; it is judged after the timeout, a guard, and the daemon's own lateness meanwhile.
//!   So a verdict never comes earlier than the timeout after the last moment at which the instance
//!   could have answered.
//! * Losing the channel is not losing the instance, and a probe that could not be sent is never a
//!   missed heartbeat.
//! * After [`Action::Failed`] there is no further action.

use std::collections::VecDeque;
use std::time::Duration;

use crate::message::Health;
use crate::time::Instant;

/// Shortest interval between probes.
pub const INTERVAL_MIN: Duration = Duration::from_millis(50);
/// Longest interval between probes.
pub const INTERVAL_MAX: Duration = Duration::from_secs(5);
/// Added to the timeout, for an answer that was under way when the silence began.
pub const VERDICT_GUARD: Duration = Duration::from_millis(10);
/// Most by which the daemon's own lateness can put off a verdict, in timeouts.
const LAG_MAX_TIMEOUTS: u32 = 10;
/// Intervals of silence before it is a suspicion.
const SUSPICION_INTERVALS: u32 = 2;
/// Probes remembered as unanswered; more of them tell nothing new.
const OUTSTANDING_MAX: usize = 16;

/// How an instance is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Silence after which it has failed.
    pub timeout: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Time it has for its first healthy answer.
    pub start_timeout: Duration,
}

impl Config {
    /// The configuration for a timeout: ten probes in it, within [`INTERVAL_MIN`] and
    /// [`INTERVAL_MAX`].
    pub fn new(timeout: Duration, start_timeout: Duration) -> Self {
        let interval = (timeout / 10).clamp(INTERVAL_MIN, INTERVAL_MAX);
        Self {
            timeout,
            interval,
            start_timeout,
        }
    }
}

/// What the detector is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The heartbeat channel is up.
    ChannelUp,
    /// The heartbeat channel was lost.
    ChannelLost,
    /// Connecting was refused: a kernel lives there, its agent does not listen.
    KernelAnswered,
    /// A probe was answered.
    Answer {
        /// The probe.
        probe: u32,
        /// What the agent says.
        health: Health,
    },
    /// The probe could not be sent: our own queue is full.
    SendRefused {
        /// The probe.
        probe: u32,
    },
    /// The backend saw its end, or its panic.
    Ended(String),
    /// The backend sees that it executes nothing.
    Stopped,
    /// The daemon itself was late by this much.
    SelfLag(Duration),
    /// A changed policy.
    Reconfigure(Config),
    /// Time has passed.
    Tick,
}

/// What is to be done, and what was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this probe.
    SendProbe {
        /// Its number.
        probe: u32,
    },
    /// Find out whether its kernel answers, and whether it executes at all.
    LookCloser,
    /// The first healthy answer.
    Healthy,
    /// It has been silent for a while.
    Suspect {
        /// For how long.
        silence: Duration,
    },
    /// It answered again.
    Relieved {
        /// How long it was silent.
        silence: Duration,
    },
    /// The channel has not taken probes for a whole timeout; the instance is not to blame.
    TransportCongested,
    /// It has failed.
    Failed(Verdict),
}

/// The level at which an instance failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Its kernel has ended, panicked, or answers at no level.
    KernelDead,
    /// Its kernel answers, its agent does not.
    AgentDead,
}

impl Level {
    /// The name in journal, API and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::KernelDead => "kernel_dead",
            Self::AgentDead => "agent_dead",
        }
    }
}

/// A verdict with its evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The level.
    pub level: Level,
    /// What it rests on, a line each, for people.
    pub evidence: Vec<String>,
    /// How long it had been silent; zero for an exit event.
    pub silence: Duration,
}

/// Phase: no healthy answer yet.
#[derive(Debug)]
struct Starting {
    since: Instant,
}

/// Phase: it answers.
#[derive(Debug)]
struct Monitoring;

/// Phase: it is silent.
#[derive(Debug)]
struct Detecting {
    back_off: Duration,
}

#[derive(Debug)]
enum Phase {
    Starting(Starting),
    Monitoring(Monitoring),
    Detecting(Detecting),
    Failed,
}

/// The detector of one generation.
#[derive(Debug)]
pub struct Detector {
    config: Config,
    phase: Phase,
    outstanding: VecDeque<(u32, Instant)>,
    next_probe: u32,
    probe_due: Option<Instant>,
    lost_at: Option<Instant>,
    congested_since: Option<Instant>,
    kernel_answered: bool,
    stopped: bool,
    lag: Duration,
    counters: Counters,
    actions: VecDeque<Action>,
}

/// Figures for status displays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Probes sent.
    pub sent: u64,
    /// Probes answered.
    pub answered: u64,
    /// Suspicions that went away by themselves.
    pub transient_failures: u64,
}

impl Detector {
    /// Begins to watch a generation spawned at `now`, over a channel that is not up yet.
    pub fn new(config: Config, now: Instant) -> Self {
        Self {
            config,
            phase: Phase::Starting(Starting { since: now }),
            outstanding: VecDeque::new(),
            next_probe: 1,
            probe_due: None,
            lost_at: None,
            congested_since: None,
            kernel_answered: false,
            stopped: false,
            lag: Duration::ZERO,
            counters: Counters::default(),
            actions: VecDeque::new(),
        }
    }

    /// The phase's name in API and logs.
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Starting(_) => "starting",
            Phase::Monitoring(_) => "monitoring",
            Phase::Detecting(_) => "detecting_failure",
            Phase::Failed => "failed",
        }
    }

    /// The configuration in force.
    pub fn config(&self) -> Config {
        self.config
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Probes not answered in a row.
    pub fn missed(&self) -> usize {
        self.outstanding.len()
    }

    /// The next action, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Event::Tick`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if matches!(self.phase, Phase::Failed) {
            return None;
        }
        [self.probe_due, self.judgement_due(), self.suspicion_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Takes an event.
    pub fn handle(&mut self, event: Event, now: Instant) {
        if matches!(self.phase, Phase::Failed) {
            return;
        }
        match event {
            Event::ChannelUp => {
                self.lost_at = self.lost_at.filter(|_| !self.outstanding.is_empty());
                self.probe_due = Some(now);
            }
            Event::ChannelLost => {
                self.lost_at.get_or_insert(now);
                self.probe_due = None;
            }
            Event::KernelAnswered => self.kernel_answered = true,
            Event::Stopped => self.stopped = true,
            Event::Answer { probe, health } => self.answered(probe, health, now),
            Event::SendRefused { probe } => self.refused(probe, now),
            Event::Ended(how) => self.fail(Level::KernelDead, vec![how], Duration::ZERO),
            Event::SelfLag(late) => {
                let most = self.config.timeout.saturating_mul(LAG_MAX_TIMEOUTS);
                self.lag = self.lag.saturating_add(late).min(most);
            }
            Event::Reconfigure(config) => {
                self.config = config;
                self.probe_due = self.probe_due.map(|due| due.min(now + config.interval));
            }
            Event::Tick => {}
        }
        self.judge(now);
        self.probe(now);
    }

    /// Since when it has been silent, if it is.
    fn silent_since(&self) -> Option<Instant> {
        let oldest = self.outstanding.front().map(|(_, sent)| *sent);
        [oldest, self.lost_at].into_iter().flatten().min()
    }

    fn judgement_due(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Starting(starting) => {
                Some(starting.since + self.config.start_timeout.saturating_add(self.lag))
            }
            Phase::Monitoring(_) | Phase::Detecting(_) => {
                let patience = self.config.timeout.saturating_add(VERDICT_GUARD);
                self.silent_since()
                    .map(|since| since + patience.saturating_add(self.lag))
            }
            Phase::Failed => None,
        }
    }

    fn suspicion_due(&self) -> Option<Instant> {
        let Phase::Monitoring(_) = self.phase else {
            return None;
        };
        let patience = self.config.interval.saturating_mul(SUSPICION_INTERVALS);
        self.silent_since()
            .map(|since| since + patience.saturating_add(self.lag))
    }

    fn judge(&mut self, now: Instant) {
        if self.suspicion_due().is_some_and(|due| due <= now) {
            let silence = self
                .silent_since()
                .map_or(Duration::ZERO, |since| now - since);
            self.actions.push_back(Action::Suspect { silence });
            self.actions.push_back(Action::LookCloser);
            self.phase = Phase::Detecting(Detecting {
                back_off: self.config.interval,
            });
        }
        if self.judgement_due().is_some_and(|due| due <= now) {
            self.condemn(now);
        }
    }

    fn condemn(&mut self, now: Instant) {
        let mut evidence = Vec::new();
        let silence = match &self.phase {
            Phase::Starting(starting) => {
                let waited = now - starting.since;
                evidence.push(format!(
                    "no healthy answer within {waited:.1?} of its start"
                ));
                waited
            }
            _ => {
                let silence = self
                    .silent_since()
                    .map_or(Duration::ZERO, |since| now - since);
                let timeout = self.config.timeout;
                evidence.push(format!(
                    "silent for {silence:.3?} (timeout {timeout:?}), {} probes unanswered",
                    self.outstanding.len()
                ));
                silence
            }
        };
        if self.lost_at.is_some() {
            evidence.push("its channel was lost and did not come back".to_owned());
        }
        if self.lag > Duration::ZERO {
            evidence.push(format!(
                "judged {:?} later for the daemon's own lateness",
                self.lag
            ));
        }
        let level = if self.stopped {
            evidence.push("it executes nothing: stopped".to_owned());
            Level::KernelDead
        } else if self.kernel_answered {
            evidence.push("its kernel answers, its agent does not".to_owned());
            Level::AgentDead
        } else {
            evidence.push("its kernel was not seen to answer".to_owned());
            Level::KernelDead
        };
        self.fail(level, evidence, silence);
    }

    fn fail(&mut self, level: Level, evidence: Vec<String>, silence: Duration) {
        self.phase = Phase::Failed;
        self.actions.push_back(Action::Failed(Verdict {
            level,
            evidence,
            silence,
        }));
    }

    fn answered(&mut self, probe: u32, health: Health, now: Instant) {
        let Some(at) = self.outstanding.iter().position(|(p, _)| *p == probe) else {
            return;
        };
        let silence = self
            .silent_since()
            .map_or(Duration::ZERO, |since| now - since);
        self.outstanding.drain(..=at);
        self.counters.answered += 1;
        self.lost_at = None;
        self.congested_since = None;
        self.kernel_answered = false;
        self.stopped = false;
        self.lag = Duration::ZERO;
        self.phase = match std::mem::replace(&mut self.phase, Phase::Failed) {
            Phase::Starting(_) if health != Health::Unhealthy => {
                self.actions.push_back(Action::Healthy);
                Phase::Monitoring(Monitoring)
            }
            Phase::Detecting(_) => {
                self.counters.transient_failures += 1;
                self.actions.push_back(Action::Relieved { silence });
                self.probe_due = Some(now + self.config.interval);
                Phase::Monitoring(Monitoring)
            }
            other => other,
        };
    }

    /// A probe that was never sent says nothing about the instance.
    fn refused(&mut self, probe: u32, now: Instant) {
        self.outstanding.retain(|(p, _)| *p != probe);
        self.counters.sent = self.counters.sent.saturating_sub(1);
        let since = *self.congested_since.get_or_insert(now);
        if now - since > self.config.timeout {
            self.congested_since = Some(now);
            self.actions.push_back(Action::TransportCongested);
        }
    }

    fn probe(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Failed) || self.probe_due.is_none_or(|due| due > now) {
            return;
        }
        let probe = self.next_probe;
        self.next_probe = self.next_probe.wrapping_add(1);
        if self.outstanding.len() == OUTSTANDING_MAX {
            // The oldest marks the beginning of the silence: drop the second oldest instead.
            self.outstanding.remove(1);
        }
        self.outstanding.push_back((probe, now));
        self.counters.sent += 1;
        self.actions.push_back(Action::SendProbe { probe });
        let wait = match &mut self.phase {
            Phase::Detecting(detecting) => {
                let wait = detecting.back_off;
                detecting.back_off = wait.saturating_mul(2).min(self.config.timeout);
                wait
            }
            // Until it is healthy, ask often: its start is what is being waited for.
            Phase::Starting(_) => INTERVAL_MIN.min(self.config.interval),
            Phase::Monitoring(_) | Phase::Failed => self.config.interval,
        };
        self.probe_due = Some(now + wait);
    }
}
