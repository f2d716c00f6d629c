//! Repeated failures: reported when they begin and when they end, not each time.

use std::fmt;
use std::time::Duration;

use kmp_proto::time::Instant;

/// A run of consecutive failures.
#[derive(Debug, Default)]
pub(crate) struct Repeated(Option<Row>);

#[derive(Debug)]
struct Row {
    began: Instant,
    times: u32,
}

/// A run of failures that has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Over {
    /// Number of failures, at least 1.
    times: u32,
    /// Time from the first failure to the end.
    lasted: Duration,
}

impl Repeated {
    /// Records a failure. True for the first one of a run: the caller reports it.
    pub(crate) fn failed(&mut self, now: Instant) -> bool {
        let row = self.0.get_or_insert(Row {
            began: now,
            times: 0,
        });
        row.times = row.times.saturating_add(1);
        row.times == 1
    }

    /// Ends the run, after a success or when the caller stops trying. `None` if nothing had failed.
    pub(crate) fn end(&mut self, now: Instant) -> Option<Over> {
        let row = self.0.take()?;
        Some(Over {
            times: row.times,
            lasted: now - row.began,
        })
    }
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.times {
            1 => f.write_str("once")?,
            times => write!(f, "{times} times")?,
        }
        write!(f, " in {:.1?}", self.lasted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_of_a_row_and_its_end_are_said() {
        let mut failures = Repeated::default();
        let begin = Instant::from_nanos(0);
        assert_eq!(failures.end(begin), None);
        let at = |half_seconds: u64| begin + Duration::from_millis(half_seconds * 500);
        let said: Vec<bool> = (0..4).map(|n| failures.failed(at(n))).collect();
        assert_eq!(said, [true, false, false, false]);
        let over = failures.end(at(4)).unwrap();
        assert_eq!(over.to_string(), "4 times in 2.0s");
        assert!(failures.failed(at(5)), "another row");
        assert_eq!(failures.end(at(5)).unwrap().to_string(), "once in 0.0ns");
        assert_eq!(failures.end(at(6)), None);
    }
}
