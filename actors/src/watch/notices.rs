//! What the owner of a watch is told of health and load: bounded, however fast an agent changes its mind.

use std::time::Duration;

use kmp_proto::message::HealthStatus;
use kmp_proto::time::Instant;

/// Words of an agent about its health that its owner is told in a [`HEALTH_WINDOW`]; the last one is
/// told at its end in any case. An agent that changes its mind at line rate fills no log.
pub(super) const HEALTH_NOTICES_MAX: u32 = 10;
/// Time in which they are counted.
pub(super) const HEALTH_WINDOW: Duration = Duration::from_secs(10);
/// Shortest time between two notices to the owner that the instance is, or is no longer, overloaded: an agent
/// whose figures jump fills no log.
const OVERLOAD_NOTICE_MIN: Duration = Duration::from_secs(10);
/// What the owner was told of the agent's health, see [`HEALTH_NOTICES_MAX`].
#[derive(Default)]
pub(super) struct HealthNotices {
    /// Notices in this window; none when there is no window under way.
    pub(super) told: u32,
    /// The last word, for the end of the window.
    pub(super) held: Option<HealthStatus>,
}

/// What the owner was told of the instance's load, see [`OVERLOAD_NOTICE_MIN`].
#[derive(Default)]
pub(super) struct LoadNotices {
    overloaded: bool,
    told_at: Option<Instant>,
}

impl LoadNotices {
    /// Whether the owner is to be told, now that it is `overloaded` or not.
    pub(super) fn changed(&mut self, overloaded: bool, now: Instant) -> bool {
        let soon = self
            .told_at
            .is_some_and(|at| now - at < OVERLOAD_NOTICE_MIN);
        if overloaded == self.overloaded || soon {
            return false;
        }
        (self.overloaded, self.told_at) = (overloaded, Some(now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_that_jumps_is_told_of_once_in_a_while() {
        let mut load = LoadNotices::default();
        let begin = Instant::from_nanos(0);
        assert!(!load.changed(false, begin), "as it was before");
        assert!(load.changed(true, begin));
        let mut told = Vec::new();
        for second in 1..=25 {
            let overloaded = second % 2 == 1;
            if load.changed(overloaded, begin + Duration::from_secs(second)) {
                told.push((second, overloaded));
            }
        }
        assert_eq!(told, [(10, false), (21, true)]);
    }
}
