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
//! * Silence starts when the first unanswered probe was sent, or when the channel was lost. The verdict follows after
//!   the timeout, a guard, and the delay of the daemon itself. So a verdict never comes earlier than the timeout
//!   after the last moment at which the instance could have answered.
//! * Only an [`Event::Tick`] that is not itself late leads to a verdict: after a delay, the daemon first processes
//!   all waiting events, above all answers.
//! * Losing the channel does not mean losing the instance, and a probe that could not be sent is never a missed
//!   heartbeat.
//! * Overload is a state to report, see [`Detector::overload`], and never a reason to fence. So is a stuck CPU, see
//!   [`Detector::stuck`], unless [`Config::stuck_cpu_fails`].
//! * After [`Action::Failed`] there is no further action.
//!
//! A phase is an enum variant, not a type as in a recovery or a morph: no phase of a detector creates a proof that
//! another phase needs, so types would not prevent any error.

mod events;
mod overload;
mod stuck;
mod transitions;

use std::collections::VecDeque;
use std::time::Duration;

pub use events::{Action, Event, Level, Verdict};
pub use overload::{OVERLOAD_SAMPLES, Overload, Sample};
pub use stuck::StuckCpus;
pub use transitions::TRANSITIONS;

use crate::message::{CpuStall, Health};
use crate::time::Instant;

/// Minimum interval between probes.
pub const INTERVAL_MIN: Duration = Duration::from_millis(50);
/// Interval between the first two probes of an instance that is not healthy yet. Each further interval is twice as
/// long, up to [`INTERVAL_MIN`], so that an instance that starts in a few milliseconds is noticed at once.
pub const START_INTERVAL_FIRST: Duration = Duration::from_millis(5);
/// Maximum interval between probes.
pub const INTERVAL_MAX: Duration = Duration::from_secs(5);
/// Probes of healthy instances are sent together, at multiples of this interval on the caller's clock: a daemon that
/// monitors a thousand instances wakes fifty times a second, not a thousand times.
pub const PROBE_GRID: Duration = Duration::from_millis(20);
/// Minimum interval of probes on [`PROBE_GRID`]: the grid shifts such a probe by at most 4 % of the interval.
pub const GRID_INTERVAL_MIN: Duration = Duration::from_millis(500);
/// Minimum time for the first answer of a generation that already runs: a daemon that has just started connects to all
/// of its instances at once.
pub const FIRST_ANSWER_MIN: Duration = Duration::from_secs(5);
/// Extension of the timeout, for an answer that was in transit when the silence started.
pub const VERDICT_GUARD: Duration = Duration::from_millis(10);
/// Maximum time by which the daemon's own delay can postpone a verdict, in timeouts.
const LAG_MAX_TIMEOUTS: u32 = 10;
/// Minimum delay that counts. Shorter ones are within the guard: many of them must not add up to a late verdict.
pub const LAG_MIN: Duration = Duration::from_millis(5);
/// Maximum number of consecutive verdicts that are postponed because their tick was late.
const LATE_TICKS_MAX: u32 = 8;
/// Maximum number of consecutive reconnections without an answer to a probe that still count as signs of
/// life.
const FLAPS_MAX: u32 = 3;
/// Number of silent intervals that make a suspicion.
const SUSPICION_INTERVALS: u32 = 2;
/// Maximum number of unanswered probes that the detector remembers; more of them carry no further information.
const OUTSTANDING_MAX: usize = 16;

/// The configuration of an instance's detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Silence after which the instance has failed.
    pub timeout: Duration,
    /// Interval between probes.
    pub interval: Duration,
    /// Maximum time until the first healthy answer.
    pub start_timeout: Duration,
    /// Whether the instance has failed when one of its CPUs has executed nothing for the timeout.
    pub stuck_cpu_fails: bool,
    /// Whether the instance was healthy before this watch began: its start is then over, and an unhealthy answer counts
    /// as an answer.
    pub has_served: bool,
}

impl Config {
    /// Creates the configuration for a timeout: ten probes per timeout, within [`INTERVAL_MIN`] and
    /// [`INTERVAL_MAX`].
    pub fn new(timeout: Duration, start_timeout: Duration) -> Self {
        let interval = (timeout / 10).clamp(INTERVAL_MIN, INTERVAL_MAX);
        Self {
            timeout,
            interval,
            start_timeout,
            stuck_cpu_fails: false,
            has_served: false,
        }
    }

    /// Returns the configuration for a detector that starts again when its generation has already run for `age`: the
    /// start timeout counts from the generation's start. The remaining time is at least the timeout and
    /// [`FIRST_ANSWER_MIN`].
    #[must_use]
    pub fn already_runs_for(self, age: Duration) -> Self {
        let least = self.timeout.max(FIRST_ANSWER_MIN).min(self.start_timeout);
        Self {
            start_timeout: self.start_timeout.saturating_sub(age).max(least),
            ..self
        }
    }
}

/// Phase: no healthy answer yet.
#[derive(Debug)]
struct Starting {
    began: Mark,
    back_off: Duration,
}

/// Phase: the instance answers.
#[derive(Debug)]
struct Monitoring;

/// Phase: the instance is silent.
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

/// The start of a silence, with the daemon's total delay at that time: only later delay postpones
/// the verdict.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Instant,
    lag: Duration,
}

/// The detector of one generation.
#[derive(Debug)]
pub struct Detector {
    config: Config,
    phase: Phase,
    outstanding: VecDeque<(u32, Mark)>,
    next_probe: u32,
    /// Bit mask of the last probes that could not be sent; the lowest bit is the newest.
    refused: u64,
    probe_due: Option<Instant>,
    lost: Option<Mark>,
    flaps: u32,
    congested_since: Option<Instant>,
    kernel_answered: bool,
    stopped: bool,
    /// The last answer reported that the workload does not do its work.
    unhealthy: bool,
    /// Total delay of the daemon since the beginning.
    lag: Duration,
    /// The caller has reported the delay of the next tick, so the detector does not measure it again.
    lag_told: Option<Duration>,
    /// The verdict is postponed until this time, because its tick was late.
    hearing_until: Option<Instant>,
    late_ticks: u32,
    load: overload::Watch,
    stuck: Option<StuckCpus>,
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
    /// Suspicions that cleared by themselves.
    pub transient_failures: u64,
}

impl Detector {
    /// Begins to watch a generation spawned at `now`, over a channel that is not up yet.
    pub fn new(config: Config, now: Instant) -> Self {
        let lag = Duration::ZERO;
        Self {
            config,
            phase: Phase::Starting(Starting {
                began: Mark { at: now, lag },
                back_off: START_INTERVAL_FIRST,
            }),
            outstanding: VecDeque::new(),
            next_probe: 1,
            refused: 0,
            probe_due: None,
            lost: None,
            flaps: 0,
            congested_since: None,
            kernel_answered: false,
            stopped: false,
            unhealthy: false,
            lag,
            lag_told: None,
            hearing_until: None,
            late_ticks: 0,
            load: overload::Watch::default(),
            stuck: None,
            counters: Counters::default(),
            actions: VecDeque::new(),
        }
    }

    /// Returns the phase's name in API and logs.
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Starting(_) => "starting",
            Phase::Monitoring(_) => "monitoring",
            Phase::Detecting(_) => "detecting_failure",
            Phase::Failed => "failed",
        }
    }

    /// Returns the configuration in force.
    pub fn config(&self) -> Config {
        self.config
    }

    /// Returns the counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Returns the number of consecutive unanswered probes.
    pub fn missed(&self) -> usize {
        self.outstanding.len()
    }

    /// Returns the overload according to the instance's own figures, with the evidence; `None` without one.
    pub fn overload(&self) -> Option<&Overload> {
        self.load.overload()
    }

    /// Returns the CPUs that have executed nothing for the timeout, according to the last answer.
    pub fn stuck(&self) -> Option<&StuckCpus> {
        self.stuck.as_ref()
    }

    /// Returns the next action, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Returns the time at which [`Event::Tick`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if matches!(self.phase, Phase::Failed) {
            return None;
        }
        [self.probe_due, self.judgement_due(), self.suspicion_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Handles an event.
    pub fn handle(&mut self, event: Event, now: Instant) {
        if matches!(self.phase, Phase::Failed) {
            return;
        }
        match event {
            Event::ChannelUp => self.channel_up(now),
            Event::ChannelLost => self.channel_lost(now),
            Event::KernelAnswered => self.kernel_answered = true,
            Event::Observed { stopped } => self.stopped = stopped,
            Event::Answer { probe, health } => self.answered(probe, health, now),
            Event::SendRefused { probe } => self.refused(probe, now),
            Event::Ended(how) => self.fail(Verdict {
                level: Level::KernelDead,
                evidence: vec![how],
                silence: Duration::ZERO,
                ended: true,
            }),
            Event::SelfLag(late) => {
                self.lag_told = Some(self.lag_told.map_or(late, |told| told.max(late)));
                self.was_late(late);
            }
            Event::Reconfigure(config) => {
                self.config = config;
                self.probe_due = self.probe_due.map(|due| due.min(now + config.interval));
            }
            Event::Sample(sample) => self.load.take(sample, now),
            Event::Stall(stall) => self.stalled(stall),
            Event::Tick => {
                self.tick(now);
                self.probe(now);
            }
        }
    }

    fn mark(&self, at: Instant) -> Mark {
        Mark { at, lag: self.lag }
    }

    fn was_late(&mut self, late: Duration) {
        if late >= LAG_MIN {
            self.lag = self.lag.saturating_add(late);
        }
    }

    /// HELLO is a sign of life, except for an agent that repeatedly sends nothing else.
    fn channel_up(&mut self, now: Instant) {
        if self.flaps < FLAPS_MAX {
            self.lost = None;
            self.flaps += 1;
        }
        self.probe_due = Some(now);
        self.probe(now);
    }

    /// The instance could have answered until now, so the silence counts from here. A second loss
    /// in the same silence does not postpone it again.
    fn channel_lost(&mut self, now: Instant) {
        self.outstanding.clear();
        let mark = self.mark(now);
        self.lost.get_or_insert(mark);
        self.probe_due = None;
    }

    fn tick(&mut self, now: Instant) {
        let late = self.lag_told.take().unwrap_or_else(|| {
            let late = self.poll_timeout().map_or(Duration::ZERO, |due| now - due);
            self.was_late(late);
            late
        });
        let judging = self.judgement_due().is_some_and(|due| due <= now);
        if judging && late >= LAG_MIN && self.late_ticks < LATE_TICKS_MAX {
            self.late_ticks += 1;
            let hearing = late.min(self.config.timeout).max(VERDICT_GUARD);
            self.hearing_until = Some(now + hearing);
            return;
        }
        self.judge(now);
    }

    /// Returns the start of the current silence, if any.
    fn silence(&self) -> Option<Mark> {
        let oldest = self.outstanding.front().map(|(_, sent)| *sent);
        [oldest, self.lost]
            .into_iter()
            .flatten()
            .min_by_key(|mark| mark.at)
    }

    fn silent_for(&self, now: Instant) -> Duration {
        self.silence().map_or(Duration::ZERO, |mark| now - mark.at)
    }

    /// Returns the daemon's delay since `mark`, up to the maximum.
    fn lag_since(&self, mark: Mark) -> Duration {
        let most = self.config.timeout.saturating_mul(LAG_MAX_TIMEOUTS);
        self.lag.saturating_sub(mark.lag).min(most)
    }

    /// Returns the time at which the silence since `mark` has lasted for `patience`, extended by the daemon's delay.
    fn due(&self, mark: Mark, patience: Duration) -> Instant {
        mark.at + patience.saturating_add(self.lag_since(mark))
    }

    /// Returns the current silence: its start and its limit.
    fn at_issue(&self) -> Option<(Mark, Duration)> {
        match &self.phase {
            Phase::Starting(starting) => Some((starting.began, self.config.start_timeout)),
            Phase::Monitoring(_) | Phase::Detecting(_) => {
                let patience = self.config.timeout.saturating_add(VERDICT_GUARD);
                self.silence().map(|mark| (mark, patience))
            }
            Phase::Failed => None,
        }
    }

    fn judgement_due(&self) -> Option<Instant> {
        let (mark, patience) = self.at_issue()?;
        let due = self.due(mark, patience);
        Some(self.hearing_until.map_or(due, |until| due.max(until)))
    }

    fn suspicion_due(&self) -> Option<Instant> {
        let Phase::Monitoring(_) = self.phase else {
            return None;
        };
        let patience = self.config.interval.saturating_mul(SUSPICION_INTERVALS);
        self.silence().map(|mark| self.due(mark, patience))
    }

    fn judge(&mut self, now: Instant) {
        if self.suspicion_due().is_some_and(|due| due <= now) {
            let silence = self.silent_for(now);
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
                let waited = now - starting.began.at;
                evidence.push(format!("no healthy answer within {waited:.1?}"));
                waited
            }
            _ => {
                let silence = self.silent_for(now);
                let timeout = self.config.timeout;
                evidence.push(format!(
                    "silent for {silence:.3?} (timeout {timeout:?}), {} probes unanswered",
                    self.outstanding.len()
                ));
                silence
            }
        };
        if self.lost.is_some() {
            evidence.push("its channel was lost and did not come back".to_owned());
        }
        let lag = self
            .at_issue()
            .map_or(Duration::ZERO, |(mark, _)| self.lag_since(mark));
        if lag > Duration::ZERO {
            evidence.push(format!(
                "the verdict waited {lag:.1?} longer, because kmorphd itself was late"
            ));
        }
        if let Some(overload) = self.load.overload() {
            evidence.push(format!("before that, {overload}"));
        }
        let level = if self.stopped {
            evidence.push("it executes nothing: stopped".to_owned());
            Level::KernelDead
        } else if self.unhealthy && self.silent_for(now) < self.config.timeout {
            evidence.push("its agent answers that it is unhealthy".to_owned());
            Level::WorkloadFailed
        } else if self.kernel_answered {
            evidence.push("its kernel answers, its agent does not".to_owned());
            Level::AgentDead
        } else {
            evidence.push("its kernel was not seen to answer".to_owned());
            Level::KernelDead
        };
        self.fail(Verdict {
            level,
            evidence,
            silence,
            ended: false,
        });
    }

    /// Handles the stuck CPUs of an answer. An instance that was not healthy yet fails only by its start timeout.
    fn stalled(&mut self, stall: Option<CpuStall>) {
        let timeout = self.config.timeout;
        self.stuck = stall.and_then(|stall| StuckCpus::of(stall, timeout));
        let Some(stuck) = self.stuck.filter(|_| self.config.stuck_cpu_fails) else {
            return;
        };
        if let Phase::Monitoring(_) | Phase::Detecting(_) = self.phase {
            let policy = "policy has an instance with a stuck CPU fail";
            self.fail(Verdict {
                level: Level::KernelDead,
                evidence: vec![format!("{stuck} (timeout {timeout:?})"), policy.to_owned()],
                silence: Duration::ZERO,
                ended: false,
            });
        }
    }

    fn fail(&mut self, verdict: Verdict) {
        self.phase = Phase::Failed;
        self.actions.push_back(Action::Failed(verdict));
    }

    /// Returns the number of remembered probes that had been sent when `probe` was sent; zero if `probe` was already
    /// answered or never sent. A late answer counts even if newer probes have displaced its probe.
    fn sent_with(&self, probe: u32) -> usize {
        let back = self.next_probe.wrapping_sub(1).wrapping_sub(probe);
        let sent = match self.refused.checked_shr(back) {
            Some(refused) => refused & 1 == 0,
            None => self.outstanding.iter().any(|(sent, _)| *sent == probe),
        };
        let age_of = |probe: u32| self.next_probe.wrapping_sub(probe);
        let older = |(sent, _): &(u32, Mark)| age_of(*sent) >= age_of(probe);
        match sent {
            true => self.outstanding.partition_point(older),
            false => 0,
        }
    }

    fn answered(&mut self, probe: u32, health: Health, now: Instant) {
        let heard = self.sent_with(probe);
        if heard == 0 {
            return;
        }
        let silence = self.silent_for(now);
        self.outstanding.drain(..heard);
        self.counters.answered += 1;
        self.lost = None;
        self.flaps = 0;
        self.congested_since = None;
        self.kernel_answered = false;
        self.stopped = false;
        self.unhealthy = health == Health::Unhealthy;
        self.hearing_until = None;
        self.late_ticks = 0;
        self.phase = match std::mem::replace(&mut self.phase, Phase::Failed) {
            Phase::Starting(_) if health != Health::Unhealthy || self.config.has_served => {
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

    /// A probe that could not be sent says nothing about the instance.
    fn refused(&mut self, probe: u32, now: Instant) {
        self.outstanding.retain(|(p, _)| *p != probe);
        let back = self.next_probe.wrapping_sub(1).wrapping_sub(probe);
        self.refused |= 1u64.checked_shl(back).unwrap_or(0);
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
        self.refused <<= 1;
        if self.outstanding.len() == OUTSTANDING_MAX {
            // The oldest marks the beginning of the silence: drop the second oldest instead.
            self.outstanding.remove(1);
        }
        let mark = self.mark(now);
        self.outstanding.push_back((probe, mark));
        self.counters.sent += 1;
        self.actions.push_back(Action::SendProbe { probe });
        let wait = match &mut self.phase {
            Phase::Detecting(detecting) => {
                // The state at the suspicion may have changed by the time of the verdict.
                if !self.actions.contains(&Action::LookCloser) {
                    self.actions.push_back(Action::LookCloser);
                }
                let wait = detecting.back_off;
                detecting.back_off = wait.saturating_mul(2).min(self.config.timeout);
                wait
            }
            // Probe often until the instance is healthy, because others wait for its start.
            Phase::Starting(starting) => {
                let wait = starting.back_off;
                starting.back_off = wait.saturating_mul(2).min(INTERVAL_MIN);
                wait.min(self.config.interval)
            }
            Phase::Monitoring(_) | Phase::Failed => self.config.interval,
        };
        let due = now + wait;
        self.probe_due = Some(if wait < GRID_INTERVAL_MIN {
            due
        } else {
            due.floor(PROBE_GRID)
        });
    }
}
