//! A file that a client names neither keeps the reader waiting nor fills memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::Path;

use kmorph_files::{NamedFileError, open_named, read_named};
use rustix::fs::{CWD, FileType, Mode, mknodat};

const BOUND: u64 = 64;

#[test]
fn a_regular_file_up_to_the_bound_is_read_also_behind_a_symlink() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, [b'x'; 64]).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert_eq!(read_named(&link, BOUND).unwrap(), [b'x'; 64]);
    std::fs::write(&path, [b'x'; 65]).unwrap();
    let refused = read_named(&path, BOUND);
    assert!(
        matches!(refused, Err(NamedFileError::TooLarge { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_fifo_a_device_and_a_directory_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    for (path, what) in [
        (fifo.as_path(), "a FIFO"),
        (Path::new("/dev/zero"), "a device"),
        (dir.path(), "a directory"),
    ] {
        let refused = open_named(path, u64::MAX).unwrap_err().to_string();
        assert!(refused.contains(what), "{refused}");
    }
}

#[test]
fn a_file_that_says_nothing_of_its_size_is_read_to_the_bound() {
    // Of these the kernel says that they have 0 bytes.
    let refused = read_named(Path::new("/proc/self/maps"), BOUND);
    assert!(
        matches!(refused, Err(NamedFileError::TooLarge { .. })),
        "{refused:?}"
    );
}
