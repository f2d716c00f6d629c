//! What the actors take from around them: the clock's origin, the calendar, random numbers, other threads. In the daemon
//! these are the system's. In a run of a test they follow from the run's seed and its paused clock, so that the same seed
//! gives the same run. A run has its thread to itself; nothing here is shared between threads.

use std::cell::RefCell;

use tokio::time::Instant;

/// Nanoseconds since the Unix epoch at which the calendar of each run begins: 2026-01-01.
const CALENDAR_BEGINS_NS: i128 = 1_767_225_600_000_000_000;

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

struct Run {
    origin: Instant,
    random: u64,
}

/// Begins a run on this thread, whose runtime has its clock paused.
pub fn begin(seed: u64) {
    let run = Run {
        origin: Instant::now(),
        random: seed,
    };
    RUN.with_borrow_mut(|current| *current = Some(run));
}

/// The clock's origin in the run of this thread; `None` in the daemon.
pub(crate) fn origin() -> Option<Instant> {
    RUN.with_borrow(|run| run.as_ref().map(|run| run.origin))
}

/// The time on the calendar.
pub(crate) fn calendar() -> jiff::Timestamp {
    let Some(origin) = origin() else {
        return jiff::Timestamp::now();
    };
    let since = origin.elapsed().as_nanos();
    let now = i128::try_from(since).unwrap_or(0) + CALENDAR_BEGINS_NS;
    jiff::Timestamp::from_nanosecond(now).unwrap_or(jiff::Timestamp::MAX)
}

/// A random number; `None` when the system has none to give.
pub(crate) fn random() -> Option<u64> {
    let seeded = RUN.with_borrow_mut(|run| run.as_mut().map(|run| split_mix(&mut run.random)));
    seeded.or_else(|| getrandom::u64().ok())
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// Does what may wait for the system on a thread where it may wait; in a run, at once.
///
/// # Errors
/// When that thread is gone: the work panicked, or the daemon ends.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    if origin().is_some() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}
