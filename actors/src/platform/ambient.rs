//! The actors' environment: the clock's origin, the calendar, random numbers, other threads. In the daemon, the system
//! provides them. In a test run, they follow from the run's seed and its paused clock, so that the same seed gives the
//! same run. A run has a thread of its own; nothing here is shared between threads.
//!
//! `actors/clippy.toml` prevents the rest of the crate from bypassing this module.

#![expect(
    clippy::disallowed_methods,
    reason = "the place where they are called, for all others"
)]

use std::cell::RefCell;
use std::io;
use std::time::Duration;

use tokio::time::Instant;

/// Start of each run's calendar, 2026-01-01, in nanoseconds since the Unix epoch.
const CALENDAR_BEGINS_NS: i128 = 1_767_225_600_000_000_000;

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

struct Run {
    origin: Instant,
    random: u64,
    threads: Box<dyn FnMut(&'static str) -> Duration>,
}

/// Begins a run on this thread, whose runtime has a paused clock. `threads` returns how long the work of a thread
/// takes, by the thread's name ([`thread`]).
pub fn begin(seed: u64, threads: impl FnMut(&'static str) -> Duration + 'static) {
    let run = Run {
        origin: Instant::now(),
        random: seed,
        threads: Box::new(threads),
    };
    RUN.with_borrow_mut(|current| *current = Some(run));
}

/// Returns the origin of this thread's run; `None` in the daemon.
pub(crate) fn origin() -> Option<Instant> {
    RUN.with_borrow(|run| run.as_ref().map(|run| run.origin))
}

/// Returns the current calendar time.
pub(crate) fn calendar() -> jiff::Timestamp {
    let Some(origin) = origin() else {
        return jiff::Timestamp::now();
    };
    let since = origin.elapsed().as_nanos();
    let now = i128::try_from(since).unwrap_or(0) + CALENDAR_BEGINS_NS;
    jiff::Timestamp::from_nanosecond(now).unwrap_or(jiff::Timestamp::MAX)
}

/// Returns a random number; `None` if the system has none.
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

/// Runs work that may block on another thread; in a test run, runs it at once.
///
/// # Errors
/// When that thread has ended: the work panicked, or the daemon stops.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    if origin().is_some() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}

/// As [`blocking`], for work that can fail.
///
/// # Errors
/// The error of `work`, or the end of its thread.
pub(crate) async fn io<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = blocking(work).await;
    done.unwrap_or_else(|gone| Err(io::Error::other(gone)))
}

/// A thread started by [`thread`].
#[derive(Debug)]
pub(crate) enum Thread {
    System(std::thread::JoinHandle<()>),
    Run(tokio::task::JoinHandle<()>),
}

impl Thread {
    /// Returns whether the work is finished.
    pub(crate) fn is_finished(&self) -> bool {
        match self {
            Self::System(thread) => thread.is_finished(),
            Self::Run(task) => task.is_finished(),
        }
    }
}

/// Runs `work` on a separate thread with the nice value `nice`, if given; threads that the work starts inherit the
/// value. In a test run, runs `work` at once, after the time that the run specifies.
///
/// # Errors
/// When the system cannot create a thread.
pub(crate) fn thread(
    name: &'static str,
    nice: Option<i32>,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<Thread> {
    let takes = RUN.with_borrow_mut(|run| run.as_mut().map(|run| (run.threads)(name)));
    if let Some(takes) = takes {
        return Ok(Thread::Run(tokio::spawn(async move {
            tokio::time::sleep(takes).await;
            work();
        })));
    }
    let builder = std::thread::Builder::new().name(name.to_owned());
    let spawned = builder.spawn(move || {
        // The kernel keeps one priority per thread.
        if let Some(nice) = nice {
            let _ = kmorph_launch::niceness::set_own(nice);
        }
        work();
    });
    spawned.map(Thread::System)
}
