use std::fmt;

use thiserror::Error;

use super::MAX_TEXT_BYTES;
use crate::dtb::MAX_BLOB_BYTES;
use crate::tree::{MAX_DEPTH, MAX_NAME_BYTES};

/// A place in a source text. Both numbers count from 1; the column counts bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The byte in the line.
    pub column: usize,
}

impl Position {
    pub(super) fn of(text: &str, offset: usize) -> Self {
        let before = &text.as_bytes()[..offset.min(text.len())];
        let line_start = before
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |at| at + 1);
        Self {
            line: 1 + before.iter().filter(|b| **b == b'\n').count(),
            column: 1 + before.len() - line_start,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// Why a text is not device tree source, and the position of the fault.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("device tree source, {position}: {fault}")]
pub struct DtsError {
    /// Position in the text.
    pub position: Position,
    /// The fault.
    pub fault: DtsFault,
}

/// A fault of a source.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DtsFault {
    /// The text is larger than [`MAX_TEXT_BYTES`].
    #[error("{0} bytes; at most {MAX_TEXT_BYTES} are read")]
    TooLarge(usize),
    /// The tree's values together exceed the maximum size of a blob.
    #[error("the values are together larger than {MAX_BLOB_BYTES} bytes, the most a blob may have")]
    ValuesTooLarge,
    /// The text is in the format of kerf 0.1, not of dtc.
    #[error("this is the text form of kerf 0.1 (generation A), not device tree source")]
    KerfText,
    /// Something else was expected.
    #[error("expected {0}")]
    Expected(&'static str),
    /// A comment or string is not terminated.
    #[error("the {0} that starts here has no end")]
    Unended(&'static str),
    /// A number does not fit into its cell.
    #[error("{value:#x} does not fit into {bits} bits")]
    Range {
        /// The number.
        value: u64,
        /// Bits of the cell.
        bits: u32,
    },
    /// An expression divides by zero, or an escape is invalid.
    #[error("the expression has no value: it divides by zero")]
    Value,
    /// Parentheses or nodes are nested too deep.
    #[error("more than {MAX_DEPTH} nested nodes or parentheses")]
    Depth,
    /// A name is too long.
    #[error("the name is longer than {MAX_NAME_BYTES} bytes")]
    Name,
    /// The name of a node or property is invalid.
    #[error(
        "{0:?} cannot be a name here: a node's may have letters, digits, one '@', and any of ,._+- ; a property's \
         letters, digits, and any of ,._+*#?-"
    )]
    BadName(String),
    /// A property contains an invalid phandle.
    #[error("{0} is not a phandle of this node: {1}")]
    Handle(String, &'static str),
    /// A property `name` differs from the node's name.
    #[error("the property name contradicts the node's name")]
    NodeName,
    /// The caller stopped the reader.
    #[error("reading was stopped")]
    Stopped,
    /// A node has two properties or children with the same name.
    #[error("{0:?} is there already; it can be changed in a node of its own below")]
    Twice(String),
    /// A label or path does not exist.
    #[error("unknown name {0:?}")]
    Unknown(String),
    /// A part of dtc's language is not supported.
    #[error("{0} is not read: {1}")]
    Unsupported(&'static str, &'static str),
}
