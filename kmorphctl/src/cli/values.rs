//! Parsers for single values. Their errors name the expected format.

use jiff::{SpanRelativeTo, Timestamp};
use kmorph_control_api::{POLICY_MAX_TIMEOUT_S, POLICY_MIN_HEARTBEAT_S, PublishRequest};

/// Minimum morph timeout, seconds.
const MORPH_TIMEOUT_MIN_S: f64 = 1.0;
/// Maximum wait of a command, seconds: a day.
const WAIT_MAX_S: f64 = 86_400.0;
/// Maximum interval between two pings, seconds.
const INTERVAL_MAX_S: f64 = 3600.0;
/// Maximum downtime budget, milliseconds; it is sent as microseconds in 32 bits.
const BUDGET_MAX_MS: f64 = 3_600_000.0;

fn number_within(text: &str, low: f64, high: f64, unit: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|value: &f64| value.is_finite() && (low..=high).contains(value))
        .ok_or_else(|| format!("must be a number of {unit} from {low} to {high}"))
}

pub(super) fn heartbeat_timeout(text: &str) -> Result<f64, String> {
    number_within(
        text,
        POLICY_MIN_HEARTBEAT_S,
        POLICY_MAX_TIMEOUT_S,
        "seconds",
    )
}

pub(super) fn morph_timeout(text: &str) -> Result<f64, String> {
    number_within(text, MORPH_TIMEOUT_MIN_S, POLICY_MAX_TIMEOUT_S, "seconds")
}

pub(super) fn wait_seconds(text: &str) -> Result<f64, String> {
    number_within(text, 0.0, WAIT_MAX_S, "seconds")
}

/// Time to wait for one answer of the daemon, seconds.
pub(super) fn answer_timeout(text: &str) -> Result<f64, String> {
    number_within(text, 0.1, WAIT_MAX_S, "seconds")
}

pub(super) fn interval(text: &str) -> Result<f64, String> {
    number_within(text, 0.0, INTERVAL_MAX_S, "seconds")
}

/// Converts milliseconds, as typed, to microseconds, as sent.
pub(super) fn budget_us(text: &str) -> Result<u32, String> {
    let us = number_within(text, 0.001, BUDGET_MAX_MS, "milliseconds")? * 1000.0;
    // In range by the check above: at most 3.6e9, below 2^32.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok(us.round() as u32)
}

/// A size in bytes: a number, or one with K, M, G or T (powers of 1024; `MB` and `MiB` are the same).
pub(super) fn memory(text: &str) -> Result<u64, String> {
    let wanted = || "must be a size such as 256M, 16GB or a number of bytes".to_owned();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wanted()),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(wanted)
}

pub(super) fn environment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("must be NAME=VALUE".to_owned()),
    }
}

/// `[ADDRESS:]HOST_PORT:PORT`; an IPv6 address in brackets.
pub(super) fn publish(text: &str) -> Result<PublishRequest, String> {
    let wanted = || "must be [ADDRESS:]HOST_PORT:PORT, such as 127.0.0.1:6379:6379".to_owned();
    let (rest, port) = text.rsplit_once(':').ok_or_else(wanted)?;
    let (address, host_port) = rest.rsplit_once(':').unwrap_or(("127.0.0.1", rest));
    let bare = address
        .strip_prefix('[')
        .and_then(|inner| inner.strip_suffix(']'))
        .filter(|inner| inner.contains(':'));
    let address: std::net::IpAddr = match bare {
        Some(inner) => inner.parse().map_err(|_| wanted())?,
        None => std::net::IpAddr::V4(address.parse().map_err(|_| wanted())?),
    };
    let port = port.parse().ok().filter(|port| *port != 0);
    Ok(PublishRequest {
        address: address.to_string(),
        host_port: host_port.parse().map_err(|_| wanted())?,
        port: port.ok_or_else(wanted)?,
    })
}

/// An RFC 3339 time, or an age before now, as RFC 3339 in UTC with milliseconds: the daemon compares it with times in
/// that format.
pub(super) fn since(text: &str) -> Result<String, String> {
    since_at(text, Timestamp::now())
}

fn since_at(text: &str, now: Timestamp) -> Result<String, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(format!("{time:.3}"));
    }
    let wanted =
        "must be an RFC 3339 time such as 2026-01-31T08:00:00Z, or an age such as 10m, 2h, 3d";
    text.parse::<jiff::Span>()
        .ok()
        .filter(|span| !span.is_negative())
        .and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()).ok())
        .and_then(|age| now.checked_sub(age).ok())
        .map(|time| format!("{time:.3}"))
        .ok_or_else(|| wanted.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_and_bounded() {
        assert_eq!(memory("256M"), Ok(256 << 20));
        assert_eq!(memory("16GB"), Ok(16 << 30));
        assert_eq!(memory("1GiB"), Ok(1 << 30));
        assert_eq!(memory("4096"), Ok(4096));
        for bad in ["", "0", "M", "-1M", "1.5G", "1X", "99999999999999T", "1 G"] {
            assert!(memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn published_ports_name_both_sides() {
        let full = publish("0.0.0.0:80:8080").unwrap();
        assert_eq!(
            (full.address.as_str(), full.host_port, full.port),
            ("0.0.0.0", 80, 8080)
        );
        assert_eq!(publish("0:6379").unwrap().address, "127.0.0.1");
        assert_eq!(publish("[::1]:80:80").unwrap().address, "::1");
        for bad in [
            "80",
            "a:80:80",
            "80:0",
            "80:65536",
            "::1:80:80",
            "[1.2.3.4]:1:1",
            "",
        ] {
            assert!(publish(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn since_takes_a_time_or_an_age() {
        let now: Timestamp = "2026-01-31T08:00:00Z".parse().unwrap();
        let at = |text| since_at(text, now);
        assert_eq!(at("10m").unwrap(), "2026-01-31T07:50:00.000Z");
        assert_eq!(at("2h").unwrap(), "2026-01-31T06:00:00.000Z");
        assert_eq!(at("3d").unwrap(), "2026-01-28T08:00:00.000Z");
        assert_eq!(
            at("2026-01-31T09:00:00+02:00").unwrap(),
            "2026-01-31T07:00:00.000Z"
        );
        for bad in ["", "yesterday", "-5m", "5", "99999999999h", "2026-01-31"] {
            assert!(at(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_budget_is_typed_in_milliseconds_and_sent_in_microseconds() {
        assert_eq!(budget_us("10"), Ok(10_000));
        assert_eq!(budget_us("0.5"), Ok(500));
        for bad in ["0", "-1", "nan", "inf", "1e12"] {
            assert!(budget_us(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn timeouts_keep_the_ranges_of_the_policy() {
        assert_eq!(heartbeat_timeout("0.1"), Ok(0.1));
        assert!(heartbeat_timeout("0.05").is_err());
        assert!(heartbeat_timeout("3601").is_err());
        assert!(morph_timeout("0.5").is_err());
        assert!(wait_seconds("nan").is_err());
    }
}
