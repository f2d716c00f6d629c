//! Converts between the daemon's types and those of the control API. To rename a field of either, only this module
//! changes.

mod daemon;
mod instances;
mod records;
mod refusals;
mod requests;

use std::time::Duration;

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Converts each element.
pub(super) fn each<A, B: From<A>>(all: impl IntoIterator<Item = A>) -> Vec<B> {
    all.into_iter().map(B::from).collect()
}
