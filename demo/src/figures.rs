//! What was measured.

use std::fmt;
use std::time::Duration;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::client::Seen;

/// One healing.
#[derive(Debug)]
pub(crate) struct Healing {
    /// What had happened, in a word.
    pub(crate) what: &'static str,
    /// From then to the verdict. The daemon notes it in whole milliseconds.
    pub(crate) verdict: Duration,
    /// From then to the first healthy heartbeat of the successor.
    pub(crate) healthy: Duration,
    /// What the client saw.
    pub(crate) seen: Seen,
}

/// The morph.
#[derive(Debug)]
pub(crate) struct Morph {
    /// The release of the target kernel.
    pub(crate) to: String,
    /// From the freeze to the first request the target kernel could answer, as the daemon measured it.
    pub(crate) downtime: Duration,
    /// The time that was watched, with the morph in it.
    pub(crate) watched: Duration,
    /// What the client saw in it.
    pub(crate) during: Seen,
    /// What it saw in an equal time without a morph.
    pub(crate) without: Seen,
}

/// All of them.
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

/// A table of names and `figures` columns of figures.
fn table(figures: usize) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Disabled);
    // Columns exist from the first row on.
    table.set_header(vec![""; figures + 1]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The time to a verdict. The daemon writes down the millisecond it falls into, without its fraction:
/// what looks shorter than one may have been up to two.
fn verdict(time_to: Duration) -> String {
    match time_to < Duration::from_millis(1) {
        true => "< 2 ms".to_owned(),
        false => time(time_to),
    }
}

/// A time in the unit that suits it.
pub(crate) fn time(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1000.0;
    match ms {
        ms if ms >= 1000.0 => format!("{:.2} s", ms / 1000.0),
        ms if ms >= 10.0 => format!("{ms:.0} ms"),
        ms => format!("{ms:.1} ms"),
    }
}
