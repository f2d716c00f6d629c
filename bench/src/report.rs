//! A run as a table for people, as JSON for programs, and as a section of a document.

use std::io;
use std::path::Path;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::figure::{Figure, HEADINGS};
use crate::machine::Machine;

/// Marks of the beginning and the end of the section that [`Report::write_into`] replaces.
const BEGIN: &str = "<!-- begin: written by kmorph-bench, not by hand -->\n";
const END: &str = "<!-- end -->\n";

/// A run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) figures: Vec<Figure>,
    /// Reasons of missing measurements, and results besides the figures.
    pub(crate) remarks: Vec<String>,
}

impl Report {
    /// Returns true if some bar is not kept.
    pub(crate) fn failed(&self) -> bool {
        self.figures.iter().any(Figure::failed)
    }

    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(presets::ASCII_MARKDOWN)
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_header(HEADINGS);
        for figure in &self.figures {
            table.add_row(figure.cells());
        }
        table.to_string()
    }

    /// Returns the section of a document.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("{}.\n\n{}\n", self.machine, self.table());
        if !self.remarks.is_empty() {
            text.push('\n');
        }
        for remark in &self.remarks {
            text.push_str(&format!("- {remark}\n"));
        }
        text
    }

    /// Replaces the section between the marks in the document at `path`.
    ///
    /// # Errors
    /// Errors of the system; `InvalidData` without the marks. The document is not changed in that case.
    pub(crate) fn write_into(&self, path: &Path) -> io::Result<()> {
        let before = std::fs::read_to_string(path)?;
        let after = replaced(&before, &self.markdown()).ok_or_else(|| {
            let text = format!(
                "{path:?} has no lines {:?} and {:?}",
                BEGIN.trim(),
                END.trim()
            );
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        std::fs::write(path, after)
    }
}

fn replaced(document: &str, section: &str) -> Option<String> {
    let (head, rest) = document.split_once(BEGIN)?;
    let (_, tail) = rest.split_once(END)?;
    Some(format!("{head}{BEGIN}{section}{END}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_section_of_a_document_is_replaced() {
        let document = format!("head\n{BEGIN}old\n{END}tail\n");
        let once = replaced(&document, "new\n").unwrap();
        assert_eq!(once, format!("head\n{BEGIN}new\n{END}tail\n"));
        assert_eq!(replaced("no marks", "new"), None);
    }
}
