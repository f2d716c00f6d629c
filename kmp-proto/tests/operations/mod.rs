//! Engines driven by bytes: each byte string encodes a sequence of events and of time, and after each event every
//! invariant is checked. A broken rule panics.
//!
//! The bytes come from proptest, from the fuzzers in `fuzz/`, which include this module, and from the
//! fuzzers' committed corpus, so all three find the same faults.

pub mod detector;
pub mod instance;
pub mod morph;
pub mod recovery;

use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod, FenceOrder};
use kmp_proto::transition::Transition;

/// Reads choices from bytes; the run is over when the bytes are used up.
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// Creates choices from `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Returns the next byte, or `None` at the end.
    pub fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// Returns the next byte, or 0 at the end.
    pub fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    /// Returns the lowest bit of the next byte.
    pub fn bit(&mut self) -> bool {
        self.byte() & 1 == 1
    }
}

/// Returns a certificate for `generation`, as from a backend.
pub fn certify(generation: u64) -> FenceCertificate {
    let order = FenceOrder::new(generation);
    order.confirm(FenceMethod::ProcessesKilled, Confirmation::ProcessesGone, 1)
}

/// Checks one step against a transition table: if the state changed or an action was emitted, some row must allow the
/// step. A row names the actions that it may emit, in order.
pub fn assert_row<'a>(
    rows: impl Iterator<Item = &'a Transition>,
    state: &str,
    event: &str,
    next: &str,
    effects: &[&str],
) {
    if state == next && effects.is_empty() {
        return;
    }
    assert_taken(rows, state, event, next, effects);
}

/// Like [`assert_row`], for an event that the engine reports as taken.
pub fn assert_taken<'a>(
    mut rows: impl Iterator<Item = &'a Transition>,
    state: &str,
    event: &str,
    next: &str,
    effects: &[&str],
) {
    let allowed = rows.any(|row| {
        let mut may = row.effects.iter();
        row.state == state
            && row.event == event
            && row.next == next
            && effects.iter().all(|done| may.any(|effect| effect == done))
    });
    assert!(
        allowed,
        "no row for {state} --{event}--> {next}, {effects:?}"
    );
}
