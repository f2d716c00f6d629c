//! Extends the configured timeouts by the CPU time that the host owes an instance.
//!
//! ```text
//!  silent (or not healthy yet) ──┬── the time in which its threads waited for a CPU of the host ──┐
//!                                └── the time that passed ───────────────── the lesser of both ───┴─▶ added to the timeout
//! ```
//!
//! A timeout limits how an instance uses its time. A busy host gives it little: a guest that boots in 5 s takes a
//! minute, and a guest that serves answers heartbeats late. A failure verdict would then end a kernel that serves, and
//! its successor would start on the same busy host. So time in which the instance was ready to run but did not run
//! does not count, up to a bound: an instance that hangs in a spin loop waits for CPUs too. Time in which a thread did
//! not run at all has a separate bound: such a thread does not spin.

mod owed;

use std::time::Duration;

use kmorph_backends::contract::ThreadTime;
use kmp_proto::detector::Config;
use kmp_proto::time::Instant;

use owed::{Owed, Readings};

/// Maximum extension for waits between which its threads ran, in timeouts.
pub(super) const HELD_UP_MAX_TIMEOUTS: u32 = 4;
/// Maximum extension for time in which a thread was ready and did not run at all. Linux 6.18 left the threads of a
/// QEMU waiting for 7 s on a machine with a load of seven.
pub(super) const STARVED_MAX: Duration = Duration::from_secs(60);

/// The extension of timeouts for one generation.
#[derive(Debug)]
pub(super) struct Patience {
    config: Config,
    /// Since this silence began, or since the start.
    readings: Readings,
    /// The debt that the detector already knows.
    told: Owed,
}

impl Patience {
    /// Starts with the configured timeouts.
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            readings: Readings::default(),
            told: Owed::default(),
        }
    }

    /// Returns the configuration without extensions.
    pub(super) fn config(&self) -> Config {
        self.config
    }

    /// Changes the configuration. Returns the detector's new configuration.
    pub(super) fn reconfigure(&mut self, config: Config) -> Config {
        self.config = config;
        self.effective()
    }

    /// Adds the accounts of the threads of an instance that is silent or not healthy yet. Returns the detector's new
    /// configuration if it has changed by at least an interval between two probes.
    pub(super) fn waits(&mut self, threads: &[ThreadTime], now: Instant) -> Option<Config> {
        self.readings.take(threads, now);
        let owed = self.readings.owed().all();
        (owed >= self.told.all() + self.config.interval).then(|| self.effective())
    }

    /// Clears the debt after an answer. Returns the detector's new configuration, if it changes.
    pub(super) fn over(&mut self) -> Option<Config> {
        self.readings = Readings::default();
        (self.told != Owed::default()).then(|| self.effective())
    }

    /// Returns the evidence for a verdict.
    pub(super) fn evidence(&self) -> Option<String> {
        (self.told != Owed::default()).then(|| {
            format!(
                "for {:.1?} of that it waited for a CPU of the host, which does not count, up to \
                 {HELD_UP_MAX_TIMEOUTS} timeouts and {STARVED_MAX:?} without any CPU",
                self.told.all()
            )
        })
    }

    fn effective(&mut self) -> Config {
        self.told = self.readings.owed();
        let Owed { waited, starved } = self.told;
        let starved = starved.min(STARVED_MAX);
        let more = |timeout: Duration| {
            let most = timeout.saturating_mul(HELD_UP_MAX_TIMEOUTS);
            timeout
                .saturating_add(waited.min(most))
                .saturating_add(starved)
        };
        Config {
            timeout: more(self.config.timeout),
            start_timeout: more(self.config.start_timeout),
            ..self.config
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmp_proto::detector::{Action, Detector, Event};

    const TIMEOUT: Duration = Duration::from_secs(3);
    const START: Duration = Duration::from_secs(30);

    fn at(seconds: u64) -> Instant {
        Instant::from_nanos(seconds * 1_000_000_000)
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// One thread that also ran.
    fn waited(waited: Duration, until: Instant) -> [ThreadTime; 1] {
        [ThreadTime {
            thread: 1,
            ran: until - at(0),
            waited,
            runnable: true,
        }]
    }

    #[test]
    fn what_the_host_held_up_does_not_count_and_more_than_passed_is_not_owed() {
        let mut patience = Patience::new(Config::new(TIMEOUT, START));
        assert_eq!(
            patience.waits(&waited(seconds(100), at(1)), at(1)),
            None,
            "the beginning"
        );
        let config = patience.waits(&waited(seconds(101), at(3)), at(3)).unwrap();
        assert_eq!(config.timeout, seconds(4), "it waited for one of two");
        // Three threads wait at the same time.
        let config = patience.waits(&waited(seconds(107), at(5)), at(5)).unwrap();
        assert_eq!(config.timeout, seconds(6));
        assert_eq!(config.start_timeout, seconds(33));
        assert_eq!(config.interval, patience.config().interval);
        assert_eq!(
            patience.waits(&waited(seconds(107), at(6)), at(6)),
            None,
            "nothing new"
        );
        assert!(
            patience
                .evidence()
                .unwrap()
                .contains("for 3.0s of that it waited")
        );

        assert_eq!(patience.over(), Some(patience.config()));
        assert_eq!(patience.over(), None);
        assert_eq!(patience.evidence(), None);
        assert_eq!(
            patience.waits(&waited(seconds(200), at(90)), at(90)),
            None,
            "a new silence"
        );
    }

    #[test]
    fn it_ends() {
        let mut patience = Patience::new(Config::new(TIMEOUT, START));
        let mut last = patience.config();
        for second in 1..1000 {
            last = patience
                .waits(&waited(seconds(second), at(second)), at(second))
                .unwrap_or(last);
        }
        assert_eq!(last.timeout, seconds(15));
        assert_eq!(last.start_timeout, seconds(150));
    }

    /// The kernel reports a wait when it ends. Until then nothing changes, and there is no verdict.
    #[test]
    fn one_that_gets_no_cpu_at_all_is_not_failed_until_it_has_had_its_time() {
        let silent_for = |starved: u64| {
            let mut patience = Patience::new(Config::new(TIMEOUT, START));
            let mut detector = Detector::new(patience.config(), at(0));
            detector.handle(Event::ChannelUp, at(0));
            let mut now = at(0);
            loop {
                let passed = now - at(0);
                let runs = passed >= seconds(starved);
                let threads = [ThreadTime {
                    thread: 1,
                    ran: if runs { passed } else { Duration::ZERO },
                    waited: if runs {
                        seconds(starved)
                    } else {
                        Duration::ZERO
                    },
                    runnable: true,
                }];
                if let Some(config) = patience.waits(&threads, now) {
                    detector.handle(Event::Reconfigure(config), now);
                }
                detector.handle(Event::Tick, now);
                while let Some(action) = detector.poll_action() {
                    if let Action::Failed(verdict) = action {
                        return verdict.silence.as_secs();
                    }
                }
                now = detector.poll_timeout().unwrap();
            }
        };
        assert_eq!(silent_for(0), START.as_secs());
        assert!((START.as_secs() + 18..=START.as_secs() + 21).contains(&silent_for(20)));
        assert!((START.as_secs() + 59..=START.as_secs() + 62).contains(&silent_for(100_000)));
    }

    /// A boot on a host that gives it a tenth of the time fails at the bound and not after 30 s. A boot that gets all
    /// the CPU time and makes no progress fails after 30 s. The test reads the accounts when a watch does: at the
    /// start, and when the detector is due.
    #[test]
    fn a_slow_boot_is_not_a_failed_one() {
        let failed_after = |waited_percent: u32| {
            let mut patience = Patience::new(Config::new(TIMEOUT, START));
            let mut detector = Detector::new(patience.config(), at(0));
            let mut now = at(0);
            loop {
                let passed = now - at(0);
                let threads = [ThreadTime {
                    thread: 1,
                    ran: passed,
                    waited: passed * waited_percent / 100,
                    runnable: true,
                }];
                if let Some(config) = patience.waits(&threads, now) {
                    detector.handle(Event::Reconfigure(config), now);
                }
                detector.handle(Event::Tick, now);
                while let Some(action) = detector.poll_action() {
                    if let Action::Failed(_) = action {
                        return (now - at(0)).as_secs();
                    }
                }
                now = detector.poll_timeout().unwrap();
            }
        };
        assert_eq!(failed_after(0), 30);
        assert!((58..=60).contains(&failed_after(50)));
        assert_eq!(failed_after(90), 150);
    }
}
