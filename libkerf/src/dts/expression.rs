//! Numbers, and expressions in parentheses: C expressions on unsigned 64-bit values.

use super::scan::Scanner;
use super::{DtsError, DtsFault};
use crate::tree::MAX_DEPTH;

/// The binary operators, weakest binding first. Longer ones precede their prefixes.
const LEVELS: &[&[&str]] = &[
    &["||"],
    &["&&"],
    &["|"],
    &["^"],
    &["&"],
    &["==", "!="],
    &["<=", ">=", "<", ">"],
    &["<<", ">>"],
    &["+", "-"],
    &["*", "/", "%"],
];

/// Reads a number or an expression in parentheses, after space. Returns `None` if neither follows.
pub(super) fn number(scan: &mut Scanner<'_>) -> Result<Option<u64>, DtsError> {
    scan.space()?;
    match scan.rest().chars().next() {
        Some('(' | '\'' | '0'..='9') => unary(scan, 0).map(Some),
        _ => Ok(None),
    }
}

fn ternary(scan: &mut Scanner<'_>, depth: usize) -> Result<u64, DtsError> {
    let condition = binary(scan, 0, depth)?;
    if !scan.eat("?")? {
        return Ok(condition);
    }
    if depth > MAX_DEPTH {
        return scan.fail(DtsFault::Depth);
    }
    let yes = ternary(scan, depth + 1)?;
    scan.expect(":", "':' of a condition")?;
    let no = ternary(scan, depth + 1)?;
    Ok(if condition != 0 { yes } else { no })
}

fn binary(scan: &mut Scanner<'_>, level: usize, depth: usize) -> Result<u64, DtsError> {
    let Some(operators) = LEVELS.get(level) else {
        return unary(scan, depth);
    };
    let mut left = binary(scan, level + 1, depth)?;
    loop {
        scan.space()?;
        let at = scan.at();
        let Some(operator) = operators.iter().find(|op| follows(scan.rest(), op)) else {
            return Ok(left);
        };
        scan.expect(operator, "an operator")?;
        let right = binary(scan, level + 1, depth)?;
        match apply(operator, left, right) {
            Some(value) => left = value,
            None => return scan.fail_at(at, DtsFault::Value),
        }
    }
}

/// Returns whether this operator follows, and not a longer one with this prefix.
fn follows(rest: &str, operator: &str) -> bool {
    let Some(after) = rest.strip_prefix(operator) else {
        return false;
    };
    match operator {
        "|" | "&" => !after.starts_with(operator),
        "<" | ">" => !after.starts_with(operator),
        _ => true,
    }
}

fn apply(operator: &str, left: u64, right: u64) -> Option<u64> {
    Some(match operator {
        "||" => u64::from(left != 0 || right != 0),
        "&&" => u64::from(left != 0 && right != 0),
        "|" => left | right,
        "^" => left ^ right,
        "&" => left & right,
        "==" => u64::from(left == right),
        "!=" => u64::from(left != right),
        "<=" => u64::from(left <= right),
        ">=" => u64::from(left >= right),
        "<" => u64::from(left < right),
        ">" => u64::from(left > right),
        "<<" => shifted(right, |by| left.checked_shl(by)),
        ">>" => shifted(right, |by| left.checked_shr(by)),
        "+" => left.wrapping_add(right),
        "-" => left.wrapping_sub(right),
        "*" => left.wrapping_mul(right),
        "/" => left.checked_div(right)?,
        _ => left.checked_rem(right)?,
    })
}

/// Returns the result of a shift; zero for shifts by 64 bits or more.
fn shifted(by: u64, shift: impl Fn(u32) -> Option<u64>) -> u64 {
    u32::try_from(by).ok().and_then(shift).unwrap_or(0)
}

/// Reads a plain number, after space. Returns `None` if none follows.
pub(super) fn plain_number(scan: &mut Scanner<'_>) -> Result<Option<u64>, DtsError> {
    scan.space()?;
    match scan.rest().starts_with(|c: char| c.is_ascii_digit()) {
        true => literal(scan).map(Some),
        false => Ok(None),
    }
}

fn unary(scan: &mut Scanner<'_>, depth: usize) -> Result<u64, DtsError> {
    if depth > MAX_DEPTH {
        return scan.fail(DtsFault::Depth);
    }
    if scan.eat("(")? {
        let value = ternary(scan, depth + 1)?;
        scan.expect(")", "')'")?;
        return Ok(value);
    }
    if scan.eat("-")? {
        return unary(scan, depth + 1).map(u64::wrapping_neg);
    }
    if scan.eat("~")? {
        return unary(scan, depth + 1).map(|value| !value);
    }
    if scan.eat("!")? {
        return unary(scan, depth + 1).map(|value| u64::from(value == 0));
    }
    literal(scan)
}

fn literal(scan: &mut Scanner<'_>) -> Result<u64, DtsError> {
    let start = scan.at();
    if scan.rest().starts_with('\'') {
        return character(scan);
    }
    let word = scan.take_while(|c| c.is_ascii_alphanumeric());
    let digits = word.trim_end_matches(['u', 'U', 'l', 'L']);
    let suffix = &word[digits.len()..];
    let value = match digits.get(..2) {
        Some("0x" | "0X") => u64::from_str_radix(&digits[2..], 16),
        _ if digits.len() > 1 && digits.starts_with('0') => u64::from_str_radix(&digits[1..], 8),
        _ => digits.parse(),
    };
    match value {
        Ok(value) if matches!(suffix, "" | "U" | "L" | "UL" | "LL" | "ULL") => Ok(value),
        _ => scan.fail_at(start, DtsFault::Expected("a number below 2^64")),
    }
}

fn character(scan: &mut Scanner<'_>) -> Result<u64, DtsError> {
    let start = scan.at();
    scan.take();
    let bytes = super::value::quoted(scan, '\'')?;
    match bytes.as_slice() {
        [byte] => Ok(u64::from(*byte)),
        _ => scan.fail_at(start, DtsFault::Expected("one character")),
    }
}
