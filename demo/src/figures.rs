//! The measured figures.

use std::fmt;
use std::time::Duration;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::client::Seen;

/// One healing.
#[derive(Debug)]
pub(crate) struct Healing {
    /// The failure, in a word.
    pub(crate) what: &'static str,
    /// Time from the failure to the verdict, which the daemon records in whole milliseconds.
    pub(crate) verdict: Duration,
    /// Time from the failure to the first healthy heartbeat of the successor.
    pub(crate) healthy: Duration,
    /// Observations of the client.
    pub(crate) seen: Seen,
}

/// A morph.
#[derive(Debug)]
pub(crate) struct Morph {
    /// The release of the target kernel.
    pub(crate) to: String,
    /// Time from the freeze to the first request that the target kernel could answer, as measured by the daemon.
    pub(crate) downtime: Duration,
    /// Length of the window with the morph.
    pub(crate) watched: Duration,
    /// Observations of the client in that window.
    pub(crate) during: Seen,
    /// Observations of the client in a window of equal length without a morph.
    pub(crate) without: Seen,
}

/// All figures.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) healings: Vec<Healing>,
    pub(crate) morphs: Vec<Morph>,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let healings = &self.healings;
        let row = |name: &str, figure: &dyn Fn(&Healing) -> String| {
            let cells = healings.iter().map(figure);
            std::iter::once(name.to_owned())
                .chain(cells)
                .collect::<Vec<_>>()
        };
        let mut table = table(healings.len());
        table
            .set_header(row("healing", &|h| h.what.to_owned()))
            .add_row(row("to the verdict", &|h| verdict(h.verdict)))
            .add_row(row("to a healthy successor", &|h| time(h.healthy)))
            .add_row(row("longest gap the client saw", &|h| {
                time(h.seen.longest_gap)
            }))
            .add_row(row("failed requests", &|h| h.seen.failed.to_string()));
        writeln!(f, "{table}\n")?;
        for (number, morph) in self.morphs.iter().enumerate() {
            if number > 0 {
                write!(f, "\n\n")?;
            }
            write!(f, "{morph}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Morph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let both = [&self.during, &self.without];
        let row = |name: &str, figure: &dyn Fn(&Seen) -> String| {
            let [with, without] = both.map(figure);
            [name.to_owned(), with, without]
        };
        let mut table = table(2);
        let watched = format!("{:.1} s", self.watched.as_secs_f64());
        table
            .set_header([
                format!("morph to {}", self.to),
                format!("in {watched} with it"),
                format!("in {watched} without"),
            ])
            .add_row([
                "downtime, by the daemon".to_owned(),
                time(self.downtime),
                "-".to_owned(),
            ])
            .add_row(row("longest gap the client saw", &|s| time(s.longest_gap)))
            .add_row(row("answered requests", &|s| s.answered.to_string()))
            .add_row(row("failed requests", &|s| s.failed.to_string()));
        write!(f, "{table}")
    }
}

/// Creates a table with a column of names and `figures` columns of figures.
fn table(figures: usize) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Disabled);
    // Columns exist only after the first row.
    table.set_header(vec![""; figures + 1]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Formats the time to a verdict. The daemon records the time in truncated milliseconds: a time that appears to be
/// below 1 ms may have been up to 2 ms.
fn verdict(time_to: Duration) -> String {
    match time_to < Duration::from_millis(1) {
        true => "< 2 ms".to_owned(),
        false => time(time_to),
    }
}

/// Formats a time in a suitable unit.
pub(crate) fn time(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1000.0;
    match ms {
        ms if ms >= 1000.0 => format!("{:.2} s", ms / 1000.0),
        ms if ms >= 10.0 => format!("{ms:.0} ms"),
        ms => format!("{ms:.1} ms"),
    }
}
