//! Rows of the engines' transition tables.
//!
//! Each engine describes its state machine in a `const` table. `docs/kmp.md` prints the tables row by row, and
//! tests check that every step of an engine is a row of its table.

use std::fmt;

/// One row: in `state`, on `event`, if `guard` holds, the machine moves to `next` and emits `effects`. An event
/// without a row in a state changes nothing there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The state before.
    pub state: &'static str,
    /// The event, as named by the engine's `Event::name`.
    pub event: &'static str,
    /// Additional condition; empty for none.
    pub guard: &'static str,
    /// The state after.
    pub next: &'static str,
    /// Names of the possible actions, in order; empty for none.
    pub effects: &'static [&'static str],
}

/// Shorthand for the tables.
pub(crate) const fn row(
    state: &'static str,
    event: &'static str,
    guard: &'static str,
    next: &'static str,
    effects: &'static [&'static str],
) -> Transition {
    Transition {
        state,
        event,
        guard,
        next,
        effects,
    }
}

/// The row as a line of a Markdown table.
impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_dash = |text: &str| {
            if text.is_empty() {
                "–".to_owned()
            } else {
                text.to_owned()
            }
        };
        write!(
            f,
            "| {} | {} | {} | {} | {} |",
            self.state,
            self.event,
            or_dash(self.guard),
            self.next,
            or_dash(&self.effects.join(", ")),
        )
    }
}
