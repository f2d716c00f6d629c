//! Panics and deaths on demand, for tests that kill an actor or the daemon at an exact place.
//!
//! Only in debug builds, with a directory in the environment variable `KMORPH_FAULTS`: an actor that passes the point
//! `x` panics once for each file `x` there, and removes the file. A daemon that passes the step `y` removes a file
//! `die before y` and is killed. A test run in one process selects the panicking actor and place itself ([`begin`]).
//! Release builds contain none of this.

/// From now on, calls `panics` with the name of each point that an actor of this thread passes; the actor panics if the
/// result is true. Has no effect in a release build.
pub fn begin(panics: impl FnMut(&str) -> bool + 'static) {
    #[cfg(debug_assertions)]
    debug::begin(Box::new(panics));
    #[cfg(not(debug_assertions))]
    drop(panics);
}

/// Marks a point where a test may make the calling actor panic.
///
/// # Panics
/// In a debug build, when the file exists.
#[inline]
pub(crate) fn point(name: &str) {
    #[cfg(debug_assertions)]
    debug::point(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// Marks a step before which a test may kill the daemon, as by SIGKILL from outside.
#[inline]
pub(crate) fn step(name: &str) {
    #[cfg(debug_assertions)]
    debug::step(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod debug {
    use std::cell::RefCell;
    use std::path::PathBuf;
    use std::sync::OnceLock;

    type Panics = Box<dyn FnMut(&str) -> bool>;

    thread_local! {
        static RUN: RefCell<Option<Panics>> = const { RefCell::new(None) };
    }

    pub(super) fn begin(panics: Panics) {
        RUN.with_borrow_mut(|current| *current = Some(panics));
    }

    static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();

    #[allow(clippy::panic, reason = "this is what it is for")]
    pub(super) fn point(name: &str) {
        if taken(name) {
            panic!("asked to by the file {name:?} in KMORPH_FAULTS");
        }
        let asked = RUN.with_borrow_mut(|panics| panics.as_mut().is_some_and(|asked| asked(name)));
        if asked {
            panic!("asked to by the run, at {name}");
        }
    }

    pub(super) fn step(name: &str) {
        if taken(&format!("die before {name}")) {
            // No cleanup and no notice, as when another process sends the signal.
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
    }

    fn taken(name: &str) -> bool {
        let dir = DIR.get_or_init(|| std::env::var_os("KMORPH_FAULTS").map(PathBuf::from));
        let found = dir.as_ref().map(|dir| std::fs::remove_file(dir.join(name)));
        found.is_some_and(|removed| removed.is_ok())
    }
}
