//! What the actors take from around them: the clock's origin, the calendar, random numbers, other threads. In the daemon
//! these are the system's. In a run of a test they follow from the run's seed and its paused clock, so that the same seed
//! gives the same run. A run has its thread to itself; nothing here is shared between threads.
//!
//! `actors/clippy.toml` keeps the rest of the crate from going around this module.

#![expect(
    clippy::disallowed_methods,
    reason = "the place where they are called, for all others"
)]

use std::cell::RefCell;
use std::io;
use std::time::Duration;

use tokio::time::Instant;

/// Nanoseconds since the Unix epoch at which the calendar of each run begins: 2026-01-01.
const CALENDAR_BEGINS_NS: i128 = 1_767_225_600_000_000_000;

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

struct Run {
    origin: Instant,
    random: u64,
    threads: Box<dyn FnMut(&'static str) -> Duration>,
}

/// Begins a run on this thread, whose runtime has its clock paused. `threads` is asked how long the work of a thread
/// takes, by the thread's name ([`thread`]).
pub fn begin(seed: u64, threads: impl FnMut(&'static str) -> Duration + 'static) {
    let run = Run {
        origin: Instant::now(),
        random: seed,
        threads: Box::new(threads),
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

/// As [`blocking`], for what the system may refuse.
///
/// # Errors
/// As `work`, or when its thread is gone.
pub(crate) async fn io<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = blocking(work).await;
    done.unwrap_or_else(|gone| Err(io::Error::other(gone)))
}

/// A thread that [`thread`] has started.
#[derive(Debug)]
pub(crate) enum Thread {
    System(std::thread::JoinHandle<()>),
    Run(tokio::task::JoinHandle<()>),
}

impl Thread {
    /// Whether its work is done.
    pub(crate) fn is_finished(&self) -> bool {
        match self {
            Self::System(thread) => thread.is_finished(),
            Self::Run(task) => task.is_finished(),
        }
    }
}

/// Does `work` on a thread of its own, with the nice value `nice` if there is one: threads that the work starts have it
/// too. In a run, `work` is done at once, after the time that the run says.
///
/// # Errors
/// When the system has no thread to give.
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
        // The kernel keeps a priority for each thread.
        if let Some(nice) = nice {
            let _ = kmorph_launch::niceness::set_own(nice);
        }
        work();
    });
    spawned.map(Thread::System)
}
