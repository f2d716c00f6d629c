//! Wall-clock times for the journal and for people.

use crate::platform::ambient;

/// Returns the current time, RFC 3339 in UTC with milliseconds.
pub fn now_rfc3339() -> String {
    let now = ambient::calendar();
    format!("{now:.3}")
}

/// Returns the current time plus `after`, in the same form.
pub fn rfc3339_in(after: std::time::Duration) -> String {
    let now = ambient::calendar();
    // Falls back to the current time if the sum is out of range.
    let then = now.checked_add(after).unwrap_or(now);
    format!("{then:.3}")
}

/// Returns a time in the same form; empty if it is out of the calendar's range.
pub fn rfc3339(time: std::time::SystemTime) -> String {
    let time = jiff::Timestamp::try_from(time);
    time.map_or_else(|_| String::new(), |time| format!("{time:.3}"))
}

/// Returns nanoseconds since the Unix epoch; 0 if the clock is set before it.
pub fn now_unix_ns() -> u64 {
    u64::try_from(ambient::calendar().as_nanosecond()).unwrap_or(0)
}

/// Returns seconds since the time `since`, as written by [`now_rfc3339`]; 0 if it does not parse or
/// is in the future.
pub fn seconds_since(since: &str) -> u64 {
    let Ok(then) = since.parse::<jiff::Timestamp>() else {
        return 0;
    };
    let seconds = ambient::calendar().as_second() - then.as_second();
    u64::try_from(seconds).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_time_reads_back() {
        let text = now_rfc3339();
        assert!(text.ends_with('Z') && text.len() == 24, "{text}");
        assert!(seconds_since(&text) <= 1);
        assert_eq!(seconds_since("garbage"), 0);
    }
}
