//! Modes do not depend on the umask. It is the whole process's, so this test has a program of its own.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kmorph_files::{OwnDir, PRIVATE_DIR, PRIVATE_FILE};
use rustix::fs::Mode;

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn what_is_missing_is_made_and_private_whatever_the_umask() {
    let dir = tempfile::TempDir::new().unwrap();
    let place = dir.path().canonicalize().unwrap();
    for (umask, name) in [(0o000, "open"), (0o077, "usual"), (0o777, "shut")] {
        let before = rustix::process::umask(Mode::from_raw_mode(umask));
        let made = OwnDir::make(&place.join(name), PRIVATE_DIR);
        let file = made.as_ref().map(|dir| dir.file("file").map(drop));
        let below = made.as_ref().map(|dir| dir.below("below", PRIVATE_DIR));
        rustix::process::umask(before);
        assert!(matches!(file, Ok(Ok(()))), "{file:?}");
        assert!(matches!(below, Ok(Ok(_))), "{below:?}");
        let dir = made.unwrap();
        assert_eq!(dir.path(), place.join(name));
        assert_eq!(mode(dir.path()), PRIVATE_DIR);
        assert_eq!(mode(&dir.path().join("below")), PRIVATE_DIR);
        assert_eq!(mode(&dir.path().join("file")), PRIVATE_FILE);
    }
}
