//! Values in upstream's file, parsed like its `lib/parse.c` does. Each error names the expected format.

/// Maximum number of CPUs in a list. Upstream has no limit, and a list such as `0-99999999999` fills its memory.
const CPUS_MAX: usize = 65_536;
/// Maximum amount of memory, in bytes: physical addresses of x86 have at most 52 bits.
const MEMORY_MAX_BYTES: u64 = 1 << 52;

/// Returns the number at the start of `text`, and the text after it.
fn number(text: &str) -> Result<(u64, &str), String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = text.split_at(digits);
    match number.parse() {
        Ok(number) => Ok((number, rest)),
        Err(_) if digits > 0 => Err(format!("{number} is too large")),
        Err(_) => Err(format!("{text:?} does not begin with a number")),
    }
}

/// Returns a size in bytes: a plain number, or one with K, M, G or T and an optional B.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = number(text)?;
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KB" => 10,
        "M" | "MB" => 20,
        "G" | "GB" => 30,
        "T" | "TB" => 40,
        _ => {
            return Err(format!(
                "{unit:?} is not K, M, G or T, optionally followed by B"
            ));
        }
    };
    let bytes = number.checked_mul(1 << shift);
    bytes
        .filter(|bytes| *bytes <= MEMORY_MAX_BYTES)
        .ok_or_else(|| format!("{text} exceeds what a machine can address"))
}

/// Returns a time in milliseconds: a plain number, or one with ms, s or m.
pub(super) fn milliseconds(text: &str) -> Result<u64, String> {
    let (number, unit) = number(text)?;
    let scale = match unit {
        "" | "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return Err(format!("{unit:?} is not ms, s or m")),
    };
    let time = number.checked_mul(scale);
    time.ok_or_else(|| format!("{text} is too large"))
}

/// Returns a whole number from `least` to 2^32 - 1.
pub(super) fn whole(text: &str, least: u64) -> Result<u64, String> {
    let (number, rest) = number(text)?;
    if !rest.is_empty() {
        return Err(format!("{rest:?} is not allowed after the number"));
    }
    if !(least..=u64::from(u32::MAX)).contains(&number) {
        return Err(format!("{number} is not from {least} to {}", u32::MAX));
    }
    Ok(number)
}

/// CPU numbers and ranges, such as `12-15,20`: returned in ascending order, without duplicates.
pub(super) fn cpus(text: &str) -> Result<Vec<u64>, String> {
    let mut cpus = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (first, after) = number(rest)?;
        let (last, after) = match after.strip_prefix('-') {
            Some(after) => number(after)?,
            None => (first, after),
        };
        if last < first {
            return Err(format!("{first}-{last} is a descending range"));
        }
        let more = usize::try_from(last - first).unwrap_or(usize::MAX);
        if more >= CPUS_MAX - cpus.len() {
            return Err(format!("the list names more than {CPUS_MAX} CPUs"));
        }
        cpus.extend(first..=last);
        rest = match after.strip_prefix(',') {
            Some(after) => after,
            None if after.is_empty() => after,
            None => return Err(format!("{after:?} is not allowed after a CPU")),
        };
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// Words separated by commas.
pub(super) fn words(text: &str) -> Result<Vec<String>, String> {
    // Upstream accepts a comma at the end too.
    let text = text.strip_suffix(',').unwrap_or(text);
    let words: Vec<_> = text
        .split(',')
        .map(|word| word.trim_matches(is_space).to_owned())
        .collect();
    match words.iter().any(String::is_empty) {
        true => Err("empty item in the comma-separated list".to_owned()),
        false => Ok(words),
    }
}

/// Characters that C's `isspace` accepts.
pub(super) fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_upstreams() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1 << 10),
            ("128MB", 128 << 20),
            ("4Gb", 4 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "lots",
            "-1",
            "4GiB",
            "1.5G",
            "4 GB",
            "4B",
            "99999999999999999999",
            "9000000T",
            "5000T",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_and_numbers_are_upstreams() {
        assert_eq!(milliseconds("100"), Ok(100));
        assert_eq!(milliseconds("250ms"), Ok(250));
        assert_eq!(milliseconds("2s"), Ok(2000));
        assert_eq!(milliseconds("3m"), Ok(180_000));
        for text in ["", "s", "1h", "1 s", "18446744073709551615m"] {
            assert!(milliseconds(text).is_err(), "{text}");
        }
        assert_eq!(whole("4294967295", 1), Ok(4_294_967_295));
        for text in ["0", "4294967296", "5x", "", "+1"] {
            assert!(whole(text, 1).is_err(), "{text}");
        }
    }

    #[test]
    fn lists_are_upstreams() {
        assert_eq!(cpus("20,12-15,13,"), Ok(vec![12, 13, 14, 15, 20]));
        assert_eq!(cpus("0-65535").map(|cpus| cpus.len()), Ok(CPUS_MAX));
        for text in [
            ",1",
            "1,,2",
            "3-1",
            "1-",
            "a",
            "1 2",
            "0-65536",
            "0-18446744073709551615",
        ] {
            assert!(cpus(text).is_err(), "{text}");
        }
        let two = vec!["0000:09:00.0".to_owned(), "x".to_owned()];
        assert_eq!(words("0000:09:00.0 ,\tx,"), Ok(two));
        for text in [",a", "a,,b", "a, ,b", ","] {
            assert!(words(text).is_err(), "{text}");
        }
    }
}
