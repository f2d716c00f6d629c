//! Output of the demo: the same text on a terminal and in a log, bold only on a terminal.

use std::io::{IsTerminal, Write};

use crate::figures::Figures;
use crate::trouble::Trouble;

const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

/// Output of the demo; see the module.
pub(crate) struct Stage {
    styled: bool,
    steps: u32,
}

impl Stage {
    /// Creates a stage on standard output, styled like kmorphctl: on a terminal that is not dumb, unless `NO_COLOR` is
    /// set to a non-empty value.
    pub(crate) fn new() -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        Self {
            styled: std::io::stdout().is_terminal() && set("NO_COLOR").is_none() && !dumb,
            steps: 0,
        }
    }

    fn line(&self, style: &str, text: &str) -> Result<(), Trouble> {
        let mut out = std::io::stdout().lock();
        let written = if self.styled && !style.is_empty() {
            writeln!(out, "{style}{text}{PLAIN}")
        } else {
            writeln!(out, "{text}")
        };
        written.map_err(Trouble::Output)
    }

    /// Prints the heading of the next step.
    pub(crate) fn step(&mut self, text: &str) -> Result<(), Trouble> {
        self.steps += 1;
        self.line("", "")?;
        self.line(BOLD, &format!("{}. {text}", self.steps))
    }

    /// Prints a sentence.
    pub(crate) fn say(&self, text: &str) -> Result<(), Trouble> {
        self.line("", text)
    }

    /// Prints a command, before it runs.
    pub(crate) fn command(&self, text: &str) -> Result<(), Trouble> {
        self.line(BOLD, &format!("$ {text}"))
    }

    /// Prints the closing: the measured figures.
    pub(crate) fn closing(&mut self, figures: &Figures) -> Result<(), Trouble> {
        self.line("", "")?;
        self.line(BOLD, "What was measured")?;
        self.say(&figures.to_string())?;
        self.say("\nIt all happened as told, and everything that was started is gone again.")
    }
}
