//! Formats figures for people: times, ages, sizes, CPU lists.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Returns an age or duration in milliseconds: `120ms`, `62s`, `5m 3s`, `2h 4m`, `3d 4h`.
pub(crate) fn age_ms(ms: u64) -> String {
    if ms < 1000 {
        return format!("{ms}ms");
    }
    age_s(ms / 1000)
}

/// Returns an age in seconds. Up to two minutes it is in seconds, like the timeouts.
pub(crate) fn age_s(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// Returns a duration in microseconds: `850 µs`, `1.25 ms`, `3.10 s`.
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{}.{:02} ms", us / 1000, us % 1000 / 10),
        _ => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
    }
}

/// Milliseconds with a fraction.
pub(crate) fn millis(ms: f64) -> String {
    if ms < 1000.0 {
        format!("{ms:.1} ms")
    } else {
        format!("{:.2} s", ms / 1000.0)
    }
}

/// Seconds of a policy: without a fraction if it is zero.
pub(crate) fn seconds(s: f64) -> String {
    format!("{s}s")
}

/// Returns a size in powers of 1024.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut size = bytes;
    let mut below = 0;
    let mut unit = 0;
    while size >= 1024 && unit + 1 < UNITS.len() {
        below = size % 1024;
        size /= 1024;
        unit += 1;
    }
    match below * 10 / 1024 {
        0 => format!("{size} {}", UNITS[unit]),
        tenth => format!("{size}.{tenth} {}", UNITS[unit]),
    }
}

/// Formats CPUs in the kernel's list format: `0-3,8`; `-` for none.
pub(crate) fn cpu_list(cpus: &[u16]) -> String {
    let mut sorted = cpus.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for cpu in sorted {
        match ranges.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(cpu) => *end = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    if ranges.is_empty() {
        return "-".to_owned();
    }
    let show = |(low, high): &(u16, u16)| {
        if low == high {
            low.to_string()
        } else {
            format!("{low}-{high}")
        }
    };
    ranges.iter().map(show).collect::<Vec<_>>().join(",")
}

/// Returns an RFC 3339 time in the local time zone; unchanged if it does not parse.
pub(crate) fn local_time(rfc3339: &str) -> String {
    match rfc3339.parse::<Timestamp>() {
        Ok(time) => time
            .to_zoned(TimeZone::system())
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
        Err(_) => rfc3339.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_keep_seconds_up_to_two_minutes() {
        assert_eq!(age_ms(120), "120ms");
        assert_eq!(age_ms(62_400), "62s");
        assert_eq!(age_s(303), "5m 3s");
        assert_eq!(age_s(7_440), "2h 4m");
        assert_eq!(age_s(3 * 86_400 + 4 * 3600), "3d 4h");
    }

    #[test]
    fn sizes_and_durations_show_what_matters() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(256 << 20), "256 MiB");
        assert_eq!(bytes(3 << 29), "1.5 GiB");
        assert_eq!(bytes(u64::MAX), "16383.9 PiB");
        assert_eq!(micros(850), "850 µs");
        assert_eq!(micros(1250), "1.25 ms");
        assert_eq!(micros(3_100_000), "3.10 s");
        assert_eq!(seconds(1.0), "1s");
        assert_eq!(seconds(0.5), "0.5s");
    }

    #[test]
    fn cpus_are_shown_as_ranges() {
        assert_eq!(cpu_list(&[]), "-");
        assert_eq!(cpu_list(&[3, 0, 1, 2, 8]), "0-3,8");
        assert_eq!(cpu_list(&[u16::MAX]), "65535");
    }
}
