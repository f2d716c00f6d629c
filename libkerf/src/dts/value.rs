//! Property values: the text to the right of `=`.

use super::draft::Label;
use super::scan::{Reference, Scanner, is_label};
use super::{DtsError, DtsFault, expression};
use crate::dtb::MAX_BLOB_BYTES;

/// The parts of a property's value. References are resolved only after the whole text is read.
pub(super) enum Part<'a> {
    Bytes(Vec<u8>),
    /// The path of a node, as a string.
    Path(usize, Reference<'a>),
    /// The phandle of a node, as a cell.
    Handle(usize, Reference<'a>),
}

/// Returns the value if it is one cell, before references are resolved: a reference has all bits set.
pub(super) fn cell(parts: &[Part<'_>]) -> Option<u32> {
    let mut cell = Vec::new();
    for part in parts {
        match part {
            Part::Bytes(bytes) if cell.len() + bytes.len() <= 4 => cell.extend_from_slice(bytes),
            Part::Handle(..) if cell.is_empty() => cell.extend_from_slice(&[0xff; 4]),
            _ => return None,
        }
    }
    Some(u32::from_be_bytes(cell.try_into().ok()?))
}

/// Returns whether the parts contain a phandle.
pub(super) fn has_handle(parts: &[Part<'_>]) -> bool {
    parts.iter().any(|part| matches!(part, Part::Handle(..)))
}

/// Reads the parts up to the `;`, and leaves the `;`. Adds labels within the value to `labels`.
pub(super) fn read<'a>(
    scan: &mut Scanner<'a>,
    labels: &mut Vec<Label<'a>>,
) -> Result<Vec<Part<'a>>, DtsError> {
    let mut parts = Vec::new();
    loop {
        labels.append(&mut scan.labels()?);
        element(scan, &mut parts, labels)?;
        labels.append(&mut scan.labels()?);
        if !scan.eat(",")? {
            return Ok(parts);
        }
    }
}

fn element<'a>(
    scan: &mut Scanner<'a>,
    parts: &mut Vec<Part<'a>>,
    labels: &mut Vec<Label<'a>>,
) -> Result<(), DtsError> {
    if scan.eat("\"")? {
        let mut text = quoted(scan, '"')?;
        text.push(0);
        parts.push(Part::Bytes(text));
        return Ok(());
    }
    if scan.eat("[")? {
        parts.push(Part::Bytes(bytes(scan, labels)?));
        return Ok(());
    }
    if scan.eat("&")? {
        let at = scan.at();
        parts.push(Part::Path(at, scan.reference()?));
        return Ok(());
    }
    if scan.eat("/incbin/")? {
        return scan.fail(DtsFault::Unsupported("/incbin/", "write the bytes in [ ]"));
    }
    let mut bits = 32;
    if scan.eat("/bits/")? {
        let at = scan.at();
        bits = match expression::plain_number(scan)? {
            Some(8) => 8,
            Some(16) => 16,
            Some(32) => 32,
            Some(64) => 64,
            _ => return scan.fail_at(at, DtsFault::Expected("8, 16, 32 or 64 bits")),
        };
    }
    scan.expect("<", "a value: \"text\", <cells>, [bytes] or &label")?;
    cells(scan, bits, parts, labels)
}

fn cells<'a>(
    scan: &mut Scanner<'a>,
    bits: u32,
    parts: &mut Vec<Part<'a>>,
    labels: &mut Vec<Label<'a>>,
) -> Result<(), DtsError> {
    let mut bytes = Vec::new();
    while !scan.eat(">")? {
        labels.append(&mut scan.labels()?);
        if bits == 32 && scan.eat("&")? {
            let at = scan.at();
            parts.push(Part::Bytes(std::mem::take(&mut bytes)));
            parts.push(Part::Handle(at, scan.reference()?));
            continue;
        }
        let at = scan.at();
        let Some(value) = expression::number(scan)? else {
            if scan.eat(">")? {
                break;
            }
            return scan.fail(DtsFault::Expected("a number, an expression in ( ), or '>'"));
        };
        let above = u64::MAX.checked_shl(bits).unwrap_or(0);
        // In a negative number of this size, all higher bits are set.
        if value & above != 0 && value & above != above {
            return scan.fail_at(at, DtsFault::Range { value, bits });
        }
        let first = 8 - bits as usize / 8;
        bytes.extend_from_slice(&value.to_be_bytes()[first..]);
        if bytes.len() > MAX_BLOB_BYTES {
            return scan.fail_at(at, DtsFault::ValuesTooLarge);
        }
    }
    parts.push(Part::Bytes(bytes));
    Ok(())
}

/// Reads hexadecimal bytes up to and including the `]`.
fn bytes<'a>(scan: &mut Scanner<'a>, labels: &mut Vec<Label<'a>>) -> Result<Vec<u8>, DtsError> {
    let mut bytes = Vec::new();
    while !scan.eat("]")? {
        let start = scan.at();
        let word = scan.take_while(is_label);
        // A label may follow bytes without space: it starts in place of a byte, with a letter.
        let is_label = scan.rest().starts_with(':');
        let mut at = 0;
        while at < word.len() {
            let pair = word.get(at..at + 2).unwrap_or("");
            if is_label && !word[at..].starts_with(|c: char| c.is_ascii_digit()) {
                labels.push((start + at, &word[at..]));
                scan.take();
                break;
            }
            match u8::from_str_radix(pair, 16) {
                Ok(byte) => bytes.push(byte),
                Err(_) => return bad_byte(scan, start + at),
            }
            at += 2;
        }
        if word.is_empty() || is_label && at == word.len() {
            return bad_byte(scan, scan.at());
        }
    }
    Ok(bytes)
}

fn bad_byte<T>(scan: &Scanner<'_>, at: usize) -> Result<T, DtsError> {
    scan.fail_at(at, DtsFault::Expected("two hexadecimal digits, or ']'"))
}

/// Reads the bytes of a text up to and including the closing quote; the opening one was already taken.
pub(super) fn quoted(scan: &mut Scanner<'_>, quote: char) -> Result<Vec<u8>, DtsError> {
    let start = scan.at();
    let mut bytes = Vec::new();
    loop {
        match scan.take() {
            None => return scan.fail_at(start, DtsFault::Unended("text")),
            Some('\\') => bytes.push(escaped(scan)?),
            Some(c) if c == quote => return Ok(bytes),
            Some(c) => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn escaped(scan: &mut Scanner<'_>) -> Result<u8, DtsError> {
    let at = scan.at();
    let digits = |scan: &mut Scanner<'_>, radix: u32, most: usize| {
        let rest = scan.rest();
        let count = rest
            .chars()
            .take(most)
            .take_while(|c| c.is_digit(radix))
            .count();
        for _ in 0..count {
            scan.take();
        }
        u32::from_str_radix(&rest[..count], radix)
            .ok()
            .and_then(|value| u8::try_from(value & 0xff).ok())
    };
    if scan.rest().starts_with(|c: char| c.is_digit(8)) {
        return digits(scan, 8, 3).map_or_else(|| scan.fail_at(at, DtsFault::Value), Ok);
    }
    match scan.take() {
        Some('a') => Ok(7),
        Some('b') => Ok(8),
        Some('t') => Ok(b'\t'),
        Some('n') => Ok(b'\n'),
        Some('v') => Ok(11),
        Some('f') => Ok(12),
        Some('r') => Ok(b'\r'),
        Some('x') => match digits(scan, 16, 2) {
            Some(byte) => Ok(byte),
            None => scan.fail_at(at, DtsFault::Expected("hexadecimal digits after \\x")),
        },
        Some(c) if c.is_ascii() => Ok(c as u8),
        _ => scan.fail_at(at, DtsFault::Expected("an ASCII character after \\")),
    }
}
