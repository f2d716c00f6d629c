//! Handles signals from the first instruction of `main` on.
//!
//! Until the daemon listens for signals, they are recorded here: a SIGHUP becomes a reload once that is possible, and
//! a SIGTERM or SIGINT aborts the startup. tokio's handlers run this code too, so no signal is lost during the
//! handover, as long as this thread alone handles signals until then ([`kept_from_threads`]).

use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc::c_int;
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, pthread_sigmask, sigaction,
};

static HANGUP: AtomicBool = AtomicBool::new(false);
static END: AtomicBool = AtomicBool::new(false);

extern "C" fn note(signal: c_int) {
    let noted = if signal == Signal::SIGHUP as c_int {
        &HANGUP
    } else {
        &END
    };
    noted.store(true, Ordering::Relaxed);
}

/// The signals that are recorded.
const NOTED: [Signal; 3] = [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT];

/// Records SIGHUP, SIGTERM and SIGINT from now on. The parent may have blocked them until here.
///
/// # Errors
/// The system's.
pub(crate) fn note_from_now_on() -> nix::Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(note),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in NOTED {
        // SAFETY: the handler stores a flag in an atomic, which is async-signal-safe, and nothing else.
        unsafe { sigaction(signal, &action) }?;
    }
    pthread_sigmask(
        SigmaskHow::SIG_UNBLOCK,
        Some(&SigSet::from_iter(NOTED)),
        None,
    )
}

/// Runs `start`; the threads that it starts never handle these signals, which wait for this thread meanwhile.
///
/// A signal goes to whichever thread looks for one first, so to one that starts while this thread is in a long system
/// call. On a busy machine that thread may only come to note the signal after tokio's handler has taken over and the
/// notes were looked at: the signal would be lost.
///
/// # Errors
/// The system's.
pub(crate) fn kept_from_threads<T>(start: impl FnOnce() -> T) -> nix::Result<T> {
    let mut before = SigSet::empty();
    pthread_sigmask(
        SigmaskHow::SIG_BLOCK,
        Some(&SigSet::from_iter(NOTED)),
        Some(&mut before),
    )?;
    let started = start();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    Ok(started)
}

/// Whether a SIGHUP was noted since this was last asked.
pub(crate) fn take_hangup() -> bool {
    HANGUP.swap(false, Ordering::Relaxed)
}

/// Whether a SIGTERM or SIGINT was noted.
pub(crate) fn told_to_end() -> bool {
    END.load(Ordering::Relaxed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_thread_of_the_start_handles_no_signal() {
        let before = SigSet::thread_get_mask().unwrap();
        let thread = || std::thread::spawn(SigSet::thread_get_mask);
        let blocked = kept_from_threads(thread).unwrap().join().unwrap().unwrap();
        for signal in NOTED {
            assert!(blocked.contains(signal), "{signal}");
        }
        assert_eq!(SigSet::thread_get_mask().unwrap(), before);
    }
}
