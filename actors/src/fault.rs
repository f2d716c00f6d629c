//! Panics on demand, for the tests that kill an actor.
//!
//! Only in debug builds: where the environment names a directory in `KMORPH_FAULTS`, an actor that
//! passes the point `x` panics once for each file `x` that it finds, and takes, there. A release
//! build has none of this.

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

#[cfg(debug_assertions)]
mod debug {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();

    #[allow(clippy::panic, reason = "this is what it is for")]
    pub(super) fn point(name: &str) {
        let dir = DIR.get_or_init(|| std::env::var_os("KMORPH_FAULTS").map(PathBuf::from));
        let Some(dir) = dir else { return };
        if std::fs::remove_file(dir.join(name)).is_ok() {
            panic!("asked to by the file {name:?} in KMORPH_FAULTS");
        }
    }
}
