//! A file with secrets is read only when nobody else can read it, change it or put another in its place.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use kmorph_files::{Refusal, read_secret};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;

const BOUND: u64 = 64;
/// A user that owns nothing of ours.
const SOMEBODY: u32 = 65_534;

fn place() -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().canonicalize().unwrap();
    (dir, path)
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    set_mode(path, mode);
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn one_for_its_owner_only_is_read_up_to_the_bound() {
    let (_dir, place) = place();
    let path = place.join("secret");
    for mode in [0o600, 0o400, 0o700] {
        write(&path, "x", 0o600);
        set_mode(&path, mode);
        assert_eq!(read_secret(&path, BOUND).unwrap(), b"x");
    }
    write(&path, &"x".repeat(64), 0o600);
    assert_eq!(read_secret(&path, BOUND).unwrap(), [b'x'; 64]);
    write(&path, &"x".repeat(65), 0o600);
    let refused = read_secret(&path, BOUND);
    assert!(
        matches!(refused, Err(Refusal::TooLarge { .. })),
        "{refused:?}"
    );
}

#[test]
fn one_that_others_can_read_or_change_is_refused_and_stays_as_it_is() {
    let (_dir, place) = place();
    let path = place.join("secret");
    for mode in [0o640, 0o604, 0o644] {
        write(&path, "x", mode);
        let refused = read_secret(&path, BOUND);
        assert!(
            matches!(refused, Err(Refusal::Readable { .. })),
            "{mode:o}: {refused:?}"
        );
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            mode
        );
    }
    for mode in [0o620, 0o602] {
        write(&path, "x", mode);
        let refused = read_secret(&path, BOUND);
        assert!(
            matches!(refused, Err(Refusal::Writable { .. })),
            "{mode:o}: {refused:?}"
        );
    }
    set_mode(&path, 0o600);
    set_mode(&place, 0o777);
    let refused = read_secret(&path, BOUND);
    assert!(
        matches!(refused, Err(Refusal::Writable { .. })),
        "{refused:?}"
    );
    if rustix::process::geteuid().is_root() {
        set_mode(&place, 0o700);
        chown(&path, Some(SOMEBODY), None).unwrap();
        let refused = read_secret(&path, BOUND);
        assert!(matches!(refused, Err(Refusal::Owner { .. })), "{refused:?}");
    }
}

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    let (_dir, place) = place();
    let path = place.join("secret");
    write(&path, "x", 0o600);
    let link = place.join("link");
    symlink(&path, &link).unwrap();
    let refused = read_secret(&link, BOUND);
    assert!(
        matches!(refused, Err(Refusal::Symlink { .. })),
        "{refused:?}"
    );
    let fifo = place.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    for strange in [
        fifo.as_path(),
        Path::new("/dev/zero"),
        &place,
        Path::new("/"),
    ] {
        let refused = read_secret(strange, BOUND);
        assert!(
            matches!(refused, Err(Refusal::Type { .. })),
            "{strange:?}: {refused:?}"
        );
    }
    let refused = read_secret(Path::new("secret"), BOUND);
    assert!(
        matches!(refused, Err(Refusal::NotAbsolute { .. })),
        "{refused:?}"
    );
}
