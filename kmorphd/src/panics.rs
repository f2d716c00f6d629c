//! Counts panics, so that a daemon whose shutdown was disturbed by one does not report success.
//!
//! An actor that panics while the daemon runs is replaced without further consequences. During shutdown, nothing
//! replaces it.

use std::sync::atomic::{AtomicUsize, Ordering};

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts every panic of this process from now on, on any thread. Panics are still printed as before.
pub(crate) fn count_from_now_on() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        print(panic);
    }));
}

/// How many panics there were so far.
pub(crate) fn so_far() -> usize {
    PANICS.load(Ordering::Relaxed)
}
