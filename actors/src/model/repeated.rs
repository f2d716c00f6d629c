//! A failure that repeats: said as it begins and as it ends, and not each time.

use std::fmt;
use std::time::Duration;

use kmp_proto::time::Instant;

/// Failures in a row.
#[derive(Debug, Default)]
pub(crate) struct Repeated(Option<Row>);

#[derive(Debug)]
struct Row {
    began: Instant,
    times: u32,
}

/// A row of failures that is over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Over {
    /// How often it failed, at least once.
    times: u32,
    /// From the first failure to the end.
    lasted: Duration,
}

impl Repeated {
    /// Notes a failure. True when it is the first of a row: that one is to be said.
    pub(crate) fn failed(&mut self, now: Instant) -> bool {
        let row = self.0.get_or_insert(Row {
            began: now,
            times: 0,
        });
        row.times = row.times.saturating_add(1);
        row.times == 1
    }

    /// Ends the row: it went well, or is not tried any more. None when nothing had failed.
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
