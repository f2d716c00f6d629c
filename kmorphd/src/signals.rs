//! Handles signals from the first instruction of `main` on.
//!
//! Until the daemon listens for signals, they are recorded here: a SIGHUP becomes a reload once that is possible, and
//! a SIGTERM or SIGINT aborts the startup. tokio's handlers run this code too, so no signal is lost during the
//! handover.

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

/// Records SIGHUP, SIGTERM and SIGINT from now on. The parent may have blocked them until here.
///
/// # Errors
/// The system's.
pub(crate) fn note_from_now_on() -> nix::Result<()> {
    let mut all = SigSet::empty();
    let action = SigAction::new(
        SigHandler::Handler(note),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: the handler stores a flag in an atomic, which is async-signal-safe, and nothing else.
        unsafe { sigaction(signal, &action) }?;
        all.add(signal);
    }
    pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&all), None)
}

/// Whether a SIGHUP was noted since this was last asked.
pub(crate) fn take_hangup() -> bool {
    HANGUP.swap(false, Ordering::Relaxed)
}

/// Whether a SIGTERM or SIGINT was noted.
pub(crate) fn told_to_end() -> bool {
    END.load(Ordering::Relaxed)
}
