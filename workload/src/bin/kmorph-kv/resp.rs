//! RESP, version 2: parses commands and writes replies.
//!
//! The parser keeps its position between reads, so it scans a large command that arrives in pieces only once. It
//! stores ranges of the input, not copies.

use std::ops::Range;

/// Maximum length of an inline command and of a length line, in bytes.
const MAX_LINE_BYTES: usize = 64 * 1024;
/// Maximum number of arguments of one command.
const MAX_ARGUMENTS: usize = 1024 * 1024;
/// Maximum number of arguments for which space is reserved in advance.
const RESERVED_ARGUMENTS: usize = 64;
/// Maximum size of a command, as a multiple of the maximum length of an argument.
const COMMAND_TO_BULK: usize = 4;

/// The result of parsing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// A command: its arguments, as ranges of the input. Never empty.
    Command(Vec<Range<usize>>),
    /// A command that is too large; it was skipped, and the connection continues.
    TooLarge,
    /// The command is incomplete.
    Incomplete,
    /// Not RESP; the text goes to the client, and the connection is closed.
    Invalid(String),
}

/// Parses commands from a growing input.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    /// Start of the current command: everything before it can be dropped.
    start: usize,
    /// End of the parsed input.
    at: usize,
    /// Number of arguments that are still missing.
    missing: usize,
    /// Length of the current argument, once known.
    bulk: Option<usize>,
    arguments: Vec<Range<usize>>,
    /// True if the current command is too large: its arguments are not kept.
    too_large: bool,
    /// Number of bytes of its current argument that are still to be skipped.
    skip: usize,
}

/// Limits on the size of the input, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum length of an argument; a longer one is an error.
    pub(crate) bulk: usize,
    /// Maximum size of a command: a larger one is skipped.
    pub(crate) command: usize,
}

impl Parser {
    /// Returns the start of the current command.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// Returns whether the current command is being skipped.
    pub(crate) fn is_skipping(&self) -> bool {
        self.too_large
    }

    /// Records that the caller has dropped the first `count` bytes of the input, all before [`Parser::start`].
    pub(crate) fn dropped(&mut self, count: usize) {
        self.start -= count;
        self.at -= count;
        for range in &mut self.arguments {
            *range = range.start - count..range.end - count;
        }
    }

    /// Parses the next command of `input`, which begins with the same bytes as in the previous call.
    pub(crate) fn next(&mut self, input: &[u8], limits: Limits) -> Parsed {
        let parsed = self.advance(input, limits);
        let most = limits.bulk * COMMAND_TO_BULK + MAX_LINE_BYTES;
        if parsed == Parsed::Incomplete && self.at - self.start > most {
            return Parsed::Invalid("Protocol error: the command is too long".to_owned());
        }
        parsed
    }

    fn advance(&mut self, input: &[u8], limits: Limits) -> Parsed {
        loop {
            if self.missing == 0 {
                match self.begin(input) {
                    Ok(Some(inline)) if inline.is_empty() => {
                        self.start = self.at;
                        continue;
                    }
                    Ok(Some(inline)) => {
                        self.start = self.at;
                        return Parsed::Command(inline);
                    }
                    Ok(None) if self.missing == 0 => return Parsed::Incomplete,
                    Ok(None) => {}
                    Err(text) => return Parsed::Invalid(text),
                }
            }
            match self.argument(input, limits) {
                Ok(true) if self.missing == 0 => {
                    self.start = self.at;
                    if std::mem::take(&mut self.too_large) {
                        return Parsed::TooLarge;
                    }
                    return Parsed::Command(std::mem::take(&mut self.arguments));
                }
                Ok(true) => {}
                Ok(false) => return Parsed::Incomplete,
                Err(text) => return Parsed::Invalid(text),
            }
        }
    }

    /// Reads the first line: an inline command is returned whole.
    fn begin(&mut self, input: &[u8]) -> Result<Option<Vec<Range<usize>>>, String> {
        let from = self.at;
        let Some(line) = self.line(input)? else {
            return Ok(None);
        };
        let Some(b'*') = input.get(from) else {
            return Ok(Some(words(input, line)));
        };
        let count = number(&input[line.start + 1..line.end])
            .filter(|count| *count <= MAX_ARGUMENTS as i64)
            .ok_or("Protocol error: invalid multibulk length")?;
        self.missing = usize::try_from(count).unwrap_or(0);
        self.arguments = Vec::with_capacity(self.missing.min(RESERVED_ARGUMENTS));
        // `*0` and `*-1` are not commands.
        Ok((self.missing == 0).then(Vec::new))
    }

    fn argument(&mut self, input: &[u8], limits: Limits) -> Result<bool, String> {
        if self.skip > 0 {
            return Ok(self.skipped(input));
        }
        let len = match self.bulk {
            Some(len) => len,
            None => {
                let Some(line) = self.line(input)? else {
                    return Ok(false);
                };
                let text = &input[line];
                if text.first() != Some(&b'$') {
                    let found = text.first().map_or(' ', |byte| char::from(*byte));
                    return Err(format!(
                        "Protocol error: expected '$', got '{}'",
                        found.escape_default()
                    ));
                }
                let len = number(&text[1..])
                    .and_then(|len| usize::try_from(len).ok())
                    .filter(|len| *len <= limits.bulk)
                    .ok_or("Protocol error: invalid bulk length")?;
                self.bulk = Some(len);
                len
            }
        };
        let end = self.at + len;
        if self.too_large || end + 2 - self.start > limits.command {
            self.too_large = true;
            self.arguments = Vec::new();
            self.skip = len + 2;
            return Ok(self.skipped(input));
        }
        if input.len() < end + 2 {
            return Ok(false);
        }
        if &input[end..end + 2] != b"\r\n" {
            return Err("Protocol error: expected CRLF after a bulk string".to_owned());
        }
        self.arguments.push(self.at..end);
        self.at = end + 2;
        self.bulk = None;
        self.missing -= 1;
        Ok(true)
    }

    /// Skips the available part of an argument that is not kept. Returns whether the argument is complete.
    fn skipped(&mut self, input: &[u8]) -> bool {
        let here = self.skip.min(input.len() - self.at);
        self.skip -= here;
        self.at += here;
        // The parsed part of the command is not needed.
        self.start = self.at;
        if self.skip > 0 {
            return false;
        }
        self.bulk = None;
        self.missing -= 1;
        true
    }

    /// Returns the next line without its end.
    fn line(&mut self, input: &[u8]) -> Result<Option<Range<usize>>, String> {
        let rest = &input[self.at..];
        let searched = &rest[..rest.len().min(MAX_LINE_BYTES)];
        let Some(len) = searched.iter().position(|byte| *byte == b'\n') else {
            if rest.len() >= MAX_LINE_BYTES {
                return Err("Protocol error: too big inline request".to_owned());
            }
            return Ok(None);
        };
        let start = self.at;
        self.at += len + 1;
        let end = start + len;
        let end = if searched[..len].ends_with(b"\r") {
            end - 1
        } else {
            end
        };
        Ok(Some(start..end))
    }
}

fn words(input: &[u8], line: Range<usize>) -> Vec<Range<usize>> {
    let mut words = Vec::new();
    let mut begin = None;
    for at in line.clone() {
        match (input[at].is_ascii_whitespace(), begin) {
            (false, None) => begin = Some(at),
            (true, Some(from)) => {
                words.push(from..at);
                begin = None;
            }
            _ => {}
        }
    }
    words.extend(begin.map(|from| from..line.end));
    words
}

/// Parses a decimal number as the protocol and INCR do: an optional `-`, no spaces, no leading
/// zeros.
pub(crate) fn number(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let canonical = match digits {
        [b'0'] => text.len() == 1,
        [b'1'..=b'9', rest @ ..] => rest.len() < 19 && rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    canonical
        .then(|| std::str::from_utf8(text).ok()?.parse().ok())
        .flatten()
}

/// Writes `+text`.
pub(crate) fn simple(out: &mut Vec<u8>, text: &str) {
    out.push(b'+');
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Writes `-text`; line ends in it become spaces.
pub(crate) fn error(out: &mut Vec<u8>, text: &str) {
    out.push(b'-');
    out.extend(text.bytes().map(|byte| match byte {
        b'\r' | b'\n' => b' ',
        other => other,
    }));
    out.extend_from_slice(b"\r\n");
}

/// Writes `:value`.
pub(crate) fn integer(out: &mut Vec<u8>, value: i64) {
    prefixed(out, b':', value);
}

/// Writes a bulk string.
pub(crate) fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    prefixed(out, b'$', i64::try_from(bytes.len()).unwrap_or(i64::MAX));
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// Writes a bulk string, or the null bulk string.
pub(crate) fn bulk_or_null(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        Some(bytes) => bulk(out, bytes),
        None => out.extend_from_slice(b"$-1\r\n"),
    }
}

/// Writes the header of an array of `len` replies.
pub(crate) fn array(out: &mut Vec<u8>, len: usize) {
    prefixed(out, b'*', i64::try_from(len).unwrap_or(i64::MAX));
}

fn prefixed(out: &mut Vec<u8>, prefix: u8, value: i64) {
    use std::io::Write;
    out.push(prefix);
    // A write to a vector cannot fail.
    let _ = write!(out, "{value}\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        bulk: 1000,
        command: usize::MAX,
    };

    /// Feeds `input` in pieces of `step` bytes, and drops consumed bytes after each.
    fn commands(input: &[u8], step: usize) -> (Vec<Vec<Vec<u8>>>, Option<String>) {
        commands_within(LIMITS, input, step)
    }

    /// As [`commands`]; a command that was skipped has no arguments.
    fn commands_within(
        limits: Limits,
        input: &[u8],
        step: usize,
    ) -> (Vec<Vec<Vec<u8>>>, Option<String>) {
        let mut parser = Parser::default();
        let mut buffer = Vec::new();
        let mut out = Vec::new();
        for piece in input.chunks(step) {
            buffer.extend_from_slice(piece);
            loop {
                match parser.next(&buffer, limits) {
                    Parsed::Command(args) => {
                        out.push(
                            args.into_iter()
                                .map(|range| buffer[range].to_vec())
                                .collect(),
                        );
                    }
                    Parsed::TooLarge => out.push(Vec::new()),
                    Parsed::Incomplete => break,
                    Parsed::Invalid(text) => return (out, Some(text)),
                }
            }
            let start = parser.start();
            buffer.drain(..start);
            parser.dropped(start);
        }
        (out, None)
    }

    #[test]
    fn commands_are_the_same_however_the_stream_is_split() {
        let input = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\n\r\n*1\r\nPING\r\n\r\n*0\r\n  get  k \n\
                      *2\r\n$3\r\nGET\r\n$0\r\n\r\n";
        let (whole, error) = commands(input, input.len());
        assert_eq!(error, None);
        let expected: Vec<Vec<&[u8]>> = vec![
            vec![b"SET", b"k", b"\r\n*1"],
            vec![b"PING"],
            vec![b"get", b"k"],
            vec![b"GET", b""],
        ];
        assert_eq!(whole, expected);
        for step in 1..input.len() {
            assert_eq!(commands(input, step), (whole.clone(), None), "step {step}");
        }
    }

    #[test]
    fn a_command_without_room_is_skipped_however_it_arrives() {
        let large = "x".repeat(200);
        let input = format!(
            "*1\r\n$4\r\nPING\r\n*4\r\n$3\r\nSET\r\n$1\r\nk\r\n$200\r\n{large}\r\n$2\r\nNX\r\n*1\r\n$4\r\nPING\r\n"
        );
        let limits = Limits {
            command: 100,
            ..LIMITS
        };
        let ping = || vec![b"PING".to_vec()];
        for step in 1..input.len() {
            let (found, error) = commands_within(limits, input.as_bytes(), step);
            assert_eq!(
                (found, error),
                (vec![ping(), Vec::new(), ping()], None),
                "step {step}"
            );
        }
    }

    #[test]
    fn what_is_not_resp_is_refused_with_its_reason() {
        for (input, expected) in [
            (&b"*x\r\n"[..], "Protocol error: invalid multibulk length"),
            (b"*99999999\r\n", "Protocol error: invalid multibulk length"),
            (b"*1\r\n:1\r\n", "Protocol error: expected '$', got ':'"),
            (b"*1\r\n$1001\r\n", "Protocol error: invalid bulk length"),
            (b"*1\r\n$-1\r\n", "Protocol error: invalid bulk length"),
            (
                b"*1\r\n$1\r\nabc",
                "Protocol error: expected CRLF after a bulk string",
            ),
        ] {
            let (none, error) = commands(input, input.len());
            assert!(none.is_empty());
            assert_eq!(error.as_deref(), Some(expected));
        }
        let long = [&b"*100\r\n"[..], &b"$1000\r\n"[..], &[b'x'; 1000], b"\r\n"];
        let long = [long[0], &long[1..].concat().repeat(99)].concat();
        let (_, error) = commands(&long, 4096);
        assert_eq!(
            error.as_deref(),
            Some("Protocol error: the command is too long")
        );
        let (_, error) = commands(&vec![b'x'; MAX_LINE_BYTES + 1], 4096);
        assert_eq!(
            error.as_deref(),
            Some("Protocol error: too big inline request")
        );
    }

    #[test]
    fn only_canonical_numbers_are_numbers() {
        for (text, value) in [
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("-0", None),
            ("01", None),
            ("+1", None),
            (" 1", None),
            ("", None),
            ("-", None),
        ] {
            assert_eq!(number(text.as_bytes()), value, "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic_and_alike_in_any_split(
            input in proptest::collection::vec(
                proptest::sample::select(&b"*$\r\n0123 abGET-"[..]), 0..200),
            step in 1usize..20,
        ) {
            let whole = commands(&input, input.len().max(1));
            proptest::prop_assert_eq!(commands(&input, step), whole);
        }
    }
}
