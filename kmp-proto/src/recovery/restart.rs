//! Decides when a failed instance is restarted, and when it is quarantined.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Instant;

/// Wait before the second consecutive restart. The first restart is immediate; each further one
/// waits twice as long.
pub const BACK_OFF_FIRST: Duration = Duration::from_millis(100);
/// Maximum wait before a restart.
pub const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// Failures within [`CRASH_LOOP_WINDOW`] after which an instance is quarantined.
pub const CRASH_LOOP_FAILURES: usize = 6;
/// See [`CRASH_LOOP_FAILURES`].
pub const CRASH_LOOP_WINDOW: Duration = Duration::from_secs(300);
/// Healthy time after which earlier failures are forgotten.
pub const STABLE_AFTER: Duration = Duration::from_secs(120);

/// The decision after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Recover the instance after this wait.
    RecoverAfter(Duration),
    /// The instance crash-loops: fence it, and leave it stopped until an operator requests a restart.
    Quarantine {
        /// Number of failures within the window.
        failures: usize,
    },
}

/// The failures of one instance, across its generations.
#[derive(Clone, Debug, Default)]
pub struct RestartPolicy {
    failures: VecDeque<Instant>,
    healthy_since: Option<Instant>,
}

impl RestartPolicy {
    /// Creates an instance without a history.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records that the instance became healthy.
    pub fn healthy(&mut self, now: Instant) {
        self.healthy_since.get_or_insert(now);
    }

    /// Records that the instance failed.
    pub fn failed(&mut self, now: Instant) -> Decision {
        let stable = self
            .healthy_since
            .take()
            .is_some_and(|since| now - since >= STABLE_AFTER);
        if stable {
            self.failures.clear();
        }
        while self
            .failures
            .front()
            .is_some_and(|at| now - *at > CRASH_LOOP_WINDOW)
        {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        let failures = self.failures.len();
        if failures >= CRASH_LOOP_FAILURES {
            return Decision::Quarantine { failures };
        }
        let doublings = u32::try_from(failures)
            .unwrap_or(u32::MAX)
            .saturating_sub(2);
        let wait = match failures {
            1 => Duration::ZERO,
            _ => BACK_OFF_FIRST
                .saturating_mul(2u32.saturating_pow(doublings))
                .min(BACK_OFF_MAX),
        };
        Decision::RecoverAfter(wait)
    }

    /// Forgets earlier failures, at an operator's request.
    pub fn forgive(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn the_first_restart_is_immediate_then_waits_double_then_quarantine() {
        let mut policy = RestartPolicy::new();
        let mut waits = Vec::new();
        for n in 0..CRASH_LOOP_FAILURES as u64 {
            match policy.failed(at(n * 1000)) {
                Decision::RecoverAfter(wait) => waits.push(wait.as_millis()),
                Decision::Quarantine { failures } => assert_eq!(failures, CRASH_LOOP_FAILURES),
            }
            policy.healthy(at(n * 1000 + 10));
        }
        assert_eq!(waits, [0, 100, 200, 400, 800]);
        policy.forgive();
        assert_eq!(
            policy.failed(at(99_000)),
            Decision::RecoverAfter(Duration::ZERO)
        );
    }

    #[test]
    fn a_stable_instance_starts_with_a_clean_slate() {
        let mut policy = RestartPolicy::new();
        policy.failed(at(0));
        policy.failed(at(1));
        policy.healthy(at(10));
        let later = at(10) + STABLE_AFTER;
        assert_eq!(policy.failed(later), Decision::RecoverAfter(Duration::ZERO));
    }
}
