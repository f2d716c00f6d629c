use std::cell::Cell;

use super::draft::Label;
use super::{DtsError, DtsFault, Position};
use crate::tree::MAX_NAME_BYTES;

/// Number of steps between two calls that ask whether to go on.
const STEPS: u32 = 4096;

/// Reads a source from left to right.
pub(super) struct Scanner<'a> {
    text: &'a str,
    at: usize,
    go_on: &'a dyn Fn() -> bool,
    steps: Cell<u32>,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str, go_on: &'a dyn Fn() -> bool) -> Self {
        Self {
            text,
            at: 0,
            go_on,
            steps: Cell::new(0),
        }
    }

    /// Counts a step of the work, and asks from time to time whether to go on.
    pub(super) fn step(&self) -> Result<(), DtsError> {
        let steps = (self.steps.get() + 1) % STEPS;
        self.steps.set(steps);
        match steps == 0 && !(self.go_on)() {
            true => self.fail(DtsFault::Stopped),
            false => Ok(()),
        }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    pub(super) fn fail<T>(&self, fault: DtsFault) -> Result<T, DtsError> {
        self.fail_at(self.at, fault)
    }

    pub(super) fn fail_at<T>(&self, at: usize, fault: DtsFault) -> Result<T, DtsError> {
        Err(DtsError {
            position: Position::of(self.text, at),
            fault,
        })
    }

    /// Skips white space, comments, and a preprocessor's line markers: `# 1 "file"`.
    pub(super) fn space(&mut self) -> Result<(), DtsError> {
        self.step()?;
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start_matches([' ', '\t', '\r', '\n', '\x0b', '\x0c']);
            self.at += rest.len() - trimmed.len();
            if trimmed.starts_with("//") {
                match trimmed.find('\n') {
                    Some(end) => self.at += end + 1,
                    None => {
                        return self.fail(DtsFault::Unended("last comment, without a newline,"));
                    }
                }
            } else if let Some(comment) = trimmed.strip_prefix("/*") {
                match comment.find("*/") {
                    Some(end) => self.at += end + 4,
                    None => return self.fail(DtsFault::Unended("comment")),
                }
            } else if trimmed.starts_with('#') && self.text[..self.at].ends_with('\n') {
                match marker(trimmed) {
                    Some(length) => self.at += length,
                    None => return Ok(()),
                }
            } else if trimmed.starts_with("/include/") {
                let instead = "put it all into one text";
                return self.fail(DtsFault::Unsupported("/include/", instead));
            } else {
                return Ok(());
            }
        }
    }

    /// Takes `wanted`, after space, if it follows. Returns whether it did.
    pub(super) fn eat(&mut self, wanted: &str) -> Result<bool, DtsError> {
        self.space()?;
        let there = self.rest().starts_with(wanted);
        if there {
            self.at += wanted.len();
        }
        Ok(there)
    }

    /// Takes `wanted`, after space.
    pub(super) fn expect(&mut self, wanted: &str, name: &'static str) -> Result<(), DtsError> {
        if self.eat(wanted)? {
            return Ok(());
        }
        self.fail(DtsFault::Expected(name))
    }

    /// Takes characters as long as they satisfy `part`.
    pub(super) fn take_while(&mut self, part: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !part(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// Takes one character.
    pub(super) fn take(&mut self) -> Option<char> {
        let next = self.rest().chars().next()?;
        self.at += next.len_utf8();
        Some(next)
    }

    /// Returns the name of a node or property, after space. Empty if none follows.
    pub(super) fn name(&mut self) -> Result<&'a str, DtsError> {
        self.space()?;
        let start = self.at;
        // The text after a backslash is a name in any case.
        if self.rest().starts_with('\\') {
            self.at += 1;
        }
        let name = self.take_while(is_name);
        if name.len() > MAX_NAME_BYTES {
            return self.fail_at(start, DtsFault::Name);
        }
        Ok(name)
    }

    /// Takes labels, after space, and returns them.
    pub(super) fn labels(&mut self) -> Result<Vec<Label<'a>>, DtsError> {
        let mut labels = Vec::new();
        loop {
            self.space()?;
            let start = self.at;
            let label = self.take_while(is_label);
            let named = !label.is_empty() && !label.starts_with(|c: char| c.is_ascii_digit());
            if !named || !self.rest().starts_with(':') {
                self.at = start;
                return Ok(labels);
            }
            self.at += 1;
            labels.push((start, label));
        }
    }

    /// Reads the reference after a `&`: a label, or a path in braces.
    pub(super) fn reference(&mut self) -> Result<Reference<'a>, DtsError> {
        let start = self.at;
        if self.rest().starts_with('{') {
            self.at += 1;
            let path = self.take_while(|c| is_name(c) || c == '/');
            if path.starts_with('/') && self.take() == Some('}') {
                return Ok(Reference::Path(path));
            }
            return self.fail_at(start, DtsFault::Expected("a path, as in &{/resources}"));
        }
        match self.take_while(is_label) {
            "" => self.fail(DtsFault::Expected("a label after &")),
            label => Ok(Reference::Label(label)),
        }
    }
}

/// The target of a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reference<'a> {
    Label(&'a str),
    Path(&'a str),
}

impl Reference<'_> {
    pub(super) fn unknown(self) -> DtsFault {
        match self {
            Reference::Label(name) | Reference::Path(name) => DtsFault::Unknown(name.to_owned()),
        }
    }
}

/// Returns the length of a line marker at the start of the text: `#` or `#line`, a number, a file name, and optional
/// flags.
fn marker(text: &str) -> Option<usize> {
    let blanks = |text: &str| -> Option<usize> {
        let count = text
            .bytes()
            .take_while(|b| matches!(b, b' ' | b'\t'))
            .count();
        (count > 0).then_some(count)
    };
    let digits = |text: &str| -> Option<usize> {
        let count = text.bytes().take_while(u8::is_ascii_digit).count();
        (count > 0).then_some(count)
    };
    let rest = text.strip_prefix('#')?;
    let rest = rest.strip_prefix("line").unwrap_or(rest);
    let rest = &rest[blanks(rest)?..];
    let rest = &rest[digits(rest)?..];
    let rest = rest[blanks(rest)?..].strip_prefix('"')?;
    let mut is_escaped = false;
    let end = rest.bytes().position(|byte| {
        let is_end = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        is_end
    })?;
    let mut rest = &rest[end + 1..];
    while let Some(flag) = blanks(rest).and_then(|n| Some(n + digits(&rest[n..])?)) {
        rest = &rest[flag..];
    }
    Some(text.len() - rest.len())
}

/// Returns whether this character is valid in the name of a node or property.
fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || ",._+*#?@-".contains(c)
}

/// Returns whether the name of a node is valid.
pub(super) fn is_node_name(name: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || ",._+-@".contains(c);
    is_short(name) && name.chars().all(is_part) && name.matches('@').count() < 2
}

/// Returns whether the name of a property is valid.
pub(super) fn is_property_name(name: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || ",._+*#?-".contains(c);
    is_short(name) && name.chars().all(is_part)
}

fn is_short(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME_BYTES
}

pub(super) fn is_label(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}
