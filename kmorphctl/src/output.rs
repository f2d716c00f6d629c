//! Prints answers and failures: tables and sentences for people, JSON for programs.
//!
//! Much of the output comes from an instance's kernel, which is untrusted: control characters are printed as
//! escapes (`\u{1b}`), never sent to the terminal.

use std::fmt::Write as _;
use std::io::{IsTerminal, StdoutLock, Write};

use comfy_table::{
    Attribute, Cell, Color, ColumnConstraint, ContentArrangement, Table, Width, presets,
};
use serde_json::{Value, json};

use crate::cli::OutputFormat;
use crate::exit::Exit;
use crate::failure::Failure;

/// Minimum width of a column of sentences, in characters; on a narrower terminal, lines are longer than the terminal.
const SENTENCES_MIN_WIDTH: u16 = 24;

/// The contents of a table's last column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LastColumn {
    /// Words, as in the other columns.
    Words,
    /// Sentences, which wrap at the width of the terminal. A file or a pipe gets each row on one
    /// line.
    Sentences,
}

/// Prints answers.
pub(crate) struct Output {
    format: OutputFormat,
    stdout: std::io::BufWriter<StdoutLock<'static>>,
    colour: bool,
    colour_stderr: bool,
    progress: bool,
}

/// The significance of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    /// Neutral.
    Plain,
    /// Normal.
    Good,
    /// Needs attention.
    Warning,
    /// An error.
    Bad,
}

/// One cell of a table.
#[derive(Clone, Debug)]
pub(crate) struct Word {
    text: String,
    tone: Tone,
}

impl Word {
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self {
            text: text.into(),
            tone,
        }
    }
}

impl<T: Into<String>> From<T> for Word {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

impl Output {
    pub(crate) fn new(format: OutputFormat) -> Self {
        let no_colour = set_and_not_empty("NO_COLOR")
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let stderr = std::io::stderr().is_terminal();
        Self {
            format,
            stdout: std::io::BufWriter::new(std::io::stdout().lock()),
            colour: !no_colour && std::io::stdout().is_terminal(),
            colour_stderr: !no_colour && stderr,
            progress: stderr && format == OutputFormat::Table,
        }
    }

    /// Returns true if the output is JSON for programs.
    pub(crate) fn is_json(&self) -> bool {
        self.format == OutputFormat::Json
    }

    /// Returns true if progress may be shown on standard error.
    pub(crate) fn shows_progress(&self) -> bool {
        self.progress
    }

    /// Prints a JSON value, indented.
    pub(crate) fn json(&mut self, value: &Value) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| Failure::internal(format!("cannot encode the answer: {error}")))?;
        self.raw(&text)
    }

    /// Prints a JSON value on one line and flushes the output: one of a series.
    pub(crate) fn json_line(&mut self, value: &Value) -> Result<(), Failure> {
        self.raw(&value.to_string())?;
        self.flush()
    }

    /// Prints a line for people.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Failure> {
        self.raw(&printable(text))
    }

    /// Prints a trusted text unchanged; adds a line end.
    pub(crate) fn raw(&mut self, text: &str) -> Result<(), Failure> {
        writeln!(self.stdout, "{text}").map_err(|error| Failure::output(&error))
    }

    /// Prints trusted bytes unchanged.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stdout
            .write_all(bytes)
            .map_err(|error| Failure::output(&error))
    }

    /// Returns a text with its tone, as part of a line.
    pub(crate) fn paint(&self, word: &Word) -> String {
        let text = printable(&word.text);
        match colour_code(word.tone) {
            Some(code) if self.colour => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
            _ => text,
        }
    }

    /// Prints `Label: value` lines; labels are trusted, values are not.
    pub(crate) fn fields(&mut self, fields: &[(&str, Word)]) -> Result<(), Failure> {
        for (label, word) in fields {
            let painted = self.paint(word);
            self.raw(&format!("{label}: {painted}"))?;
        }
        Ok(())
    }

    /// Prints a table, or `empty` if it has no rows.
    pub(crate) fn table(
        &mut self,
        header: &[&str],
        rows: Vec<Vec<Word>>,
        last: LastColumn,
        empty: &str,
    ) -> Result<(), Failure> {
        if rows.is_empty() {
            return self.line(empty);
        }
        let styled = self.colour;
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        if styled {
            table.enforce_styling();
        }
        table.set_header(header.iter().map(|title| {
            let cell = Cell::new(title);
            if styled {
                cell.add_attribute(Attribute::Bold)
            } else {
                cell
            }
        }));
        for row in rows {
            table.add_row(row.into_iter().map(|word| cell(&word, styled)));
        }
        arrange(&mut table, last);
        let text = table.trim_fmt();
        self.raw(&text)
    }

    /// Prints a hint about the next step. It is omitted from JSON output.
    pub(crate) fn hint(&mut self, text: &str) -> Result<(), Failure> {
        self.flush()?;
        if !self.is_json() {
            eprintln!("{}", printable(text));
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.stdout.flush().map_err(|error| Failure::output(&error))
    }

    /// Prints the reason of a failure and returns the exit code.
    pub(crate) fn failure(&mut self, failure: &Failure) -> Exit {
        if failure.silent {
            return failure.exit;
        }
        // Flush earlier output first; if that fails, standard error still works.
        let _ = self.stdout.flush();
        let mut stderr = std::io::stderr().lock();
        let text = if self.is_json() {
            failure_json(failure).to_string()
        } else {
            self.failure_text(failure)
        };
        let _ = writeln!(stderr, "{text}");
        failure.exit
    }

    fn failure_text(&self, failure: &Failure) -> String {
        let label = match colour_code(Tone::Bad) {
            Some(code) if self.colour_stderr => format!("\u{1b}[{code}merror\u{1b}[0m"),
            _ => "error".to_owned(),
        };
        let mut text = format!("{label}: {}", printable(&failure.message));
        if let Some(next_step) = &failure.next_step {
            let _ = write!(text, "\n  hint: {}", printable(next_step));
        }
        text
    }
}

fn failure_json(failure: &Failure) -> Value {
    json!({ "error": {
        "exit_code": failure.exit.code(),
        "code": failure.code,
        "message": failure.message,
        "next_step": failure.next_step,
    } })
}

/// Places columns two spaces apart; only sentences wrap.
fn arrange(table: &mut Table, last: LastColumn) {
    table.set_content_arrangement(match last {
        LastColumn::Words => ContentArrangement::Disabled,
        LastColumn::Sentences => ContentArrangement::Dynamic,
    });
    let columns = table.column_count();
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if last == LastColumn::Sentences {
            column.set_constraint(match index + 1 == columns {
                true => ColumnConstraint::LowerBoundary(Width::Fixed(SENTENCES_MIN_WIDTH)),
                false => ColumnConstraint::ContentWidth,
            });
        }
    }
}

fn cell(word: &Word, styled: bool) -> Cell {
    let cell = Cell::new(printable(&word.text));
    let colour = match word.tone {
        Tone::Plain => return cell,
        Tone::Good => Color::Green,
        Tone::Warning => Color::Yellow,
        Tone::Bad => Color::Red,
    };
    if styled { cell.fg(colour) } else { cell }
}

fn colour_code(tone: Tone) -> Option<u8> {
    match tone {
        Tone::Plain => None,
        Tone::Good => Some(32),
        Tone::Warning => Some(33),
        Tone::Bad => Some(31),
    }
}

fn set_and_not_empty(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// Returns the text without characters that control a terminal.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => shown.push('\n'),
            '\t' => shown.push(' '),
            _ if character.is_control() || steers_direction(character) => {
                shown.extend(character.escape_default());
            }
            _ => shown.push(character),
        }
    }
    shown
}

/// Returns true for bidirectional controls, which change the visible order of a line.
fn steers_direction(character: char) -> bool {
    matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_instance_says_cannot_steer_the_terminal() {
        assert_eq!(
            printable("6.9.0\u{1b}[2J\u{7}\r"),
            "6.9.0\\u{1b}[2J\\u{7}\\r"
        );
        assert_eq!(printable("a\u{202e}b"), "a\\u{202e}b");
        assert_eq!(printable("plain – text µs"), "plain – text µs");
    }

    #[test]
    fn a_failure_for_programs_carries_its_exit_code() {
        let failure = Failure::new(Exit::NotFound, "no web").hint("list");
        let shown = failure_json(&failure);
        assert_eq!(shown["error"]["exit_code"], 4);
        assert_eq!(shown["error"]["next_step"], "list");
    }
}
