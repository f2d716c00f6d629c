//! Panics and deaths on demand, for the tests that kill an actor or the daemon at an exact place.
//!
//! Only in debug builds: where the environment names a directory in `KMORPH_FAULTS`, an actor that
//! passes the point `x` panics once for each file `x` that it finds, and takes, there; a daemon that passes the step
//! `y` is killed when it finds, and takes, a file `die before y`. A release build has none of this.

/// A place where a test may have the calling actor panic.
///
/// # Panics
/// In a debug build, when the file is there.
#[inline]
pub(crate) fn point(name: &str) {
    #[cfg(debug_assertions)]
    debug::point(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// A step before which a test may have the daemon killed, as by SIGKILL from outside.
#[inline]
pub(crate) fn step(name: &str) {
    #[cfg(debug_assertions)]
    debug::step(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod debug {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();

    #[allow(clippy::panic, reason = "this is what it is for")]
    pub(super) fn point(name: &str) {
        if taken(name) {
            panic!("asked to by the file {name:?} in KMORPH_FAULTS");
        }
    }

    pub(super) fn step(name: &str) {
        if taken(&format!("die before {name}")) {
            // Nothing is cleaned up and nothing is told, as when another process sends the signal.
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
    }

    fn taken(name: &str) -> bool {
        let dir = DIR.get_or_init(|| std::env::var_os("KMORPH_FAULTS").map(PathBuf::from));
        let found = dir.as_ref().map(|dir| std::fs::remove_file(dir.join(name)));
        found.is_some_and(|removed| removed.is_ok())
    }
}
