use super::{DtsError, DtsFault, Position};
use crate::tree::MAX_NAME_BYTES;

/// Reads a source from left to right.
pub(super) struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
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

    /// Skips white space and comments.
    pub(super) fn space(&mut self) -> Result<(), DtsError> {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start_matches([' ', '\t', '\r', '\n', '\x0b', '\x0c']);
            self.at += rest.len() - trimmed.len();
            if trimmed.starts_with("//") {
                self.at += trimmed.find('\n').unwrap_or(trimmed.len());
            } else if let Some(comment) = trimmed.strip_prefix("/*") {
                match comment.find("*/") {
                    Some(end) => self.at += end + 4,
                    None => return self.fail(DtsFault::Unended("comment")),
                }
            } else {
                return Ok(());
            }
        }
    }

    /// Whether `wanted` comes next, after space. It is taken if so.
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

    /// Takes as many characters as satisfy `part`.
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

    /// The name of a node or property, after space. Empty when there is none.
    pub(super) fn name(&mut self) -> Result<&'a str, DtsError> {
        self.space()?;
        let start = self.at;
        let name = self.take_while(is_name);
        if name.len() > MAX_NAME_BYTES {
            return self.fail_at(start, DtsFault::Name);
        }
        Ok(name)
    }

    /// Skips labels, after space, and says what they were.
    pub(super) fn labels(&mut self) -> Result<Vec<&'a str>, DtsError> {
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
            labels.push(label);
        }
    }

    /// What follows a `&`: a label, or a path in braces.
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

/// What a source points at.
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

/// Whether a source may have this character in the name of a node or property.
pub(super) fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || ",._+*#?@-".contains(c)
}

fn is_label(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}
