//! Limits how often a watch reports health and load to its owner.

use std::time::Duration;

use kmp_proto::message::HealthStatus;
use kmp_proto::time::Instant;

/// Maximum number of health reports to the owner per [`HEALTH_WINDOW`]; the last one always follows at the end of the
/// window. An agent whose health flaps cannot flood the log.
pub(super) const HEALTH_NOTICES_MAX: u32 = 10;
/// Length of the window.
pub(super) const HEALTH_WINDOW: Duration = Duration::from_secs(10);
/// Minimum time between two reports that an overload began or ended: an agent whose figures jump cannot flood the log.
const OVERLOAD_NOTICE_MIN: Duration = Duration::from_secs(10);
/// Health reports to the owner, see [`HEALTH_NOTICES_MAX`].
#[derive(Default)]
pub(super) struct HealthNotices {
    /// Reports in this window; zero if there is no window.
    pub(super) told: u32,
    /// The last report, held for the end of the window.
    pub(super) held: Option<HealthStatus>,
}

/// Load reports to the owner, see [`OVERLOAD_NOTICE_MIN`].
#[derive(Default)]
pub(super) struct LoadNotices {
    overloaded: bool,
    told_at: Option<Instant>,
}

impl LoadNotices {
    /// Returns whether to report the new state `overloaded` to the owner.
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
