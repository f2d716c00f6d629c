//! Measures the delay of the daemon's own timers, so that the daemon does not blame an instance for it.

use std::collections::VecDeque;
use std::time::Duration;

use kmp_proto::time::Instant;

/// Length of the observed time window.
const WINDOW: Duration = Duration::from_secs(60);

/// The delay of a timer that fires every `interval`.
pub(super) struct Lag {
    interval: Duration,
    last: Option<Instant>,
    /// Newest last, with falling delays: a longer delay replaces the shorter ones before it.
    recent: VecDeque<(Instant, Duration)>,
}

impl Lag {
    pub(super) fn new(interval: Duration) -> Self {
        Self {
            interval,
            last: None,
            recent: VecDeque::new(),
        }
    }

    /// Records that the timer fired.
    pub(super) fn fired(&mut self, now: Instant) {
        let Some(last) = self.last.replace(now) else {
            return;
        };
        let late = (now - last).saturating_sub(self.interval);
        while self.recent.back().is_some_and(|(_, less)| *less <= late) {
            self.recent.pop_back();
        }
        self.recent.push_back((now, late));
        while self
            .recent
            .front()
            .is_some_and(|(at, _)| now - *at > WINDOW)
        {
            self.recent.pop_front();
        }
    }

    /// Returns the maximum delay in the last minute.
    pub(super) fn longest(&self) -> Duration {
        self.recent
            .front()
            .map_or(Duration::ZERO, |(_, late)| *late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_lateness_of_the_last_minute_is_kept_and_then_forgotten() {
        let at = |ms: u64| Instant::from_nanos(1_000_000_000 + ms * 1_000_000);
        let ms = Duration::from_millis;
        let mut lag = Lag::new(ms(250));
        lag.fired(at(0));
        assert_eq!(lag.longest(), ms(0));
        lag.fired(at(550));
        assert_eq!(lag.longest(), ms(300));
        lag.fired(at(850));
        assert_eq!(lag.longest(), ms(300), "a shorter one does not replace it");
        for n in 0..260 {
            lag.fired(at(1_100 + n * 250));
        }
        assert_eq!(lag.longest(), ms(0), "over a minute ago");
        assert!(lag.recent.len() <= 2);
    }
}
