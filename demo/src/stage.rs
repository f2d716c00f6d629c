//! What is printed: the same words on a terminal and in a log, bold only on a terminal.

use std::io::{IsTerminal, Write};

use crate::figures::Figures;
use crate::trouble::Trouble;

const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

/// See the module.
pub(crate) struct Stage {
    styled: bool,
    steps: u32,
}

impl Stage {
    /// A stage on standard output. Styled as kmorphctl does it: on a terminal that is not dumb, unless
    /// `NO_COLOR` is set to something.
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

    /// The heading of the next step.
    pub(crate) fn step(&mut self, text: &str) -> Result<(), Trouble> {
        self.steps += 1;
        self.line("", "")?;
        self.line(BOLD, &format!("{}. {text}", self.steps))
    }

    /// A sentence.
    pub(crate) fn say(&self, text: &str) -> Result<(), Trouble> {
        self.line("", text)
    }

    /// A command, before it is run.
    pub(crate) fn command(&self, text: &str) -> Result<(), Trouble> {
        self.line(BOLD, &format!("$ {text}"))
    }

    /// The end: what was measured.
    pub(crate) fn closing(&mut self, figures: &Figures) -> Result<(), Trouble> {
        self.line("", "")?;
        self.line(BOLD, "What was measured")?;
        self.say(&figures.to_string())?;
        self.say("\nIt all happened as told, and everything that was started is gone again.")
    }
}
