//! CPUs that execute nothing although their instance answers: reported, and a failure if the policy says so.

use std::fmt;
use std::time::Duration;

use crate::message::CpuStall;

/// CPUs of an instance that have executed nothing for the timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StuckCpus {
    /// The CPU that has executed nothing for the longest time.
    pub cpu: u16,
    /// Number of other CPUs that execute nothing.
    pub others: u16,
    /// Duration of the stall.
    pub stalled: Duration,
}

impl StuckCpus {
    /// Returns the stuck CPUs that the instance reports, once the stall has lasted for `timeout`.
    pub(super) fn of(stall: CpuStall, timeout: Duration) -> Option<Self> {
        let stalled = Duration::from_millis(stall.stalled_ms.into());
        (stalled >= timeout).then_some(Self {
            cpu: stall.cpu,
            others: stall.count.saturating_sub(1),
            stalled,
        })
    }
}

impl fmt::Display for StuckCpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cpu, stalled) = (self.cpu, self.stalled);
        write!(
            f,
            "CPU {cpu} is stuck: it has run nothing for {stalled:.1?}"
        )?;
        match self.others {
            0 => Ok(()),
            others => write!(f, ", and {others} more CPU(s) run nothing either"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_shorter_than_the_timeout_is_none() {
        let stall = |stalled_ms| CpuStall {
            cpu: 1,
            count: 3,
            stalled_ms,
        };
        let timeout = Duration::from_secs(2);
        assert_eq!(StuckCpus::of(stall(1_999), timeout), None);
        let stuck = StuckCpus::of(stall(2_000), timeout).map(|stuck| stuck.to_string());
        let text =
            "CPU 1 is stuck: it has run nothing for 2.0s, and 2 more CPU(s) run nothing either";
        assert_eq!(stuck.as_deref(), Some(text));
    }
}
