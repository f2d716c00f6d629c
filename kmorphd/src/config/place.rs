//! The position of a key in the file, so that errors found after parsing can name it too.

use std::fmt;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

/// Line and column in a text, both from 1, the column in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    line: usize,
    column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

impl Place {
    /// The place of the value of `key`, as `table.key`; of the table for a table. `None` when the text does not set
    /// it.
    pub(super) fn of(text: &str, key: &str) -> Option<Self> {
        let document = DeTable::parse(text).ok()?;
        let mut table = document.get_ref();
        let mut words = key.split('.');
        let mut word = words.next()?;
        loop {
            let (_, value) = table.iter().find(|(name, _)| name.get_ref() == word)?;
            let Some(next) = words.next() else {
                return Some(Self::at(text, &value.span()));
            };
            let DeValue::Table(inner) = value.get_ref() else {
                return None;
            };
            (table, word) = (inner, next);
        }
    }

    fn at(text: &str, span: &Range<usize>) -> Self {
        let before = text.get(..span.start).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_however_its_table_is_written() {
        let place = |text: &str, key: &str| Place::of(text, key).map(|p| (p.line, p.column));
        assert_eq!(place("backend = \"x\"", "backend"), Some((1, 11)));
        let text = "# é\n[limits]\nrecoveries =  0 # é\n[pool]\ncpus = [\n 1]\n";
        assert_eq!(place(text, "limits.recoveries"), Some((3, 15)));
        assert_eq!(place(text, "pool.cpus"), Some((5, 8)));
        assert_eq!(place(text, "pool"), Some((4, 1)));
        assert_eq!(
            place("limits.recoveries = 0", "limits.recoveries"),
            Some((1, 21))
        );
        assert_eq!(
            place("limits = { recoveries = 0 }", "limits.recoveries"),
            Some((1, 25))
        );
        assert_eq!(place(text, "limits.start_timeout_s"), None);
        assert_eq!(place(text, "pool.cpus.x"), None);
    }
}
