//! Time for the engines: nanoseconds of the caller's clock.

use std::ops::{Add, Sub};
use std::time::Duration;

/// A point on the caller's monotonic clock, in nanoseconds since any fixed origin. Arithmetic
/// saturates: no input can make it panic or wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// From nanoseconds.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// As nanoseconds.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Returns the time from `earlier` to this instant; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Returns the last multiple of `step` since the clock's origin that is not after this instant;
    /// this instant itself for a step of zero.
    pub fn floor(self, step: Duration) -> Self {
        let step = u64::try_from(step.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0 - self.0.checked_rem(step).unwrap_or(0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates_at_both_ends() {
        let end = Instant::from_nanos(u64::MAX);
        assert_eq!(end + Duration::MAX, end);
        assert_eq!(Instant::default() - end, Duration::ZERO);
        assert_eq!(
            end - Instant::from_nanos(u64::MAX - 5),
            Duration::from_nanos(5)
        );
    }

    #[test]
    fn floor_is_the_last_multiple() {
        let floor = |at, step| Instant::from_nanos(at).floor(Duration::from_nanos(step));
        assert_eq!(floor(59, 20), Instant::from_nanos(40));
        assert_eq!(floor(60, 20), Instant::from_nanos(60));
        assert_eq!(floor(7, 0), Instant::from_nanos(7));
        assert_eq!(floor(7, u64::MAX), Instant::default());
    }
}
