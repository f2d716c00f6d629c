//! What happens when a dump cannot be written: a clear error, and a partial file that says what it is.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use kmorph_vmcore::analysis::{AnalysisOptions, analyse};
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output, WriteError};
use kmorph_vmcore::{Completeness, Dump};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use support::{OUTPUTS, Pages, options, write};

fn memory() -> Pages {
    let mut memory = Pages::new(&[(0, 2000)]);
    for pfn in 0..2000_u64 {
        let bytes = (0..4096_u64).map(|n| ((n * n * (pfn + 7)) >> 5).to_le_bytes()[0]);
        memory.pages.insert(pfn, bytes.collect());
    }
    memory
}

/// The partial file is a dump that says that it is incomplete.
fn assert_partial(path: &Path) {
    let dump = Dump::open(path).unwrap().unwrap();
    let Completeness::Incomplete(why) = dump.completeness() else {
        panic!("{path:?} looks complete");
    };
    assert!(why.contains("incomplete"), "{why}");
    assert_eq!(dump.notes().own.map(|own| own.finished.get()), None);
    // What was to be left out is not known to have been.
    assert_eq!(dump.level(), None);
    let report = analyse(&dump, AnalysisOptions::default()).unwrap();
    assert_eq!((report.file.level, report.memory.left_out), (None, None));
}

/// A small file system that only this thread and its children see.
struct Disk(PathBuf);

impl Disk {
    fn mount(path: PathBuf) -> Self {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(none, "/", none, private, none).unwrap();
        let tmpfs = Some("tmpfs");
        std::fs::create_dir_all(&path).unwrap();
        mount(tmpfs, &path, tmpfs, MsFlags::empty(), Some("size=2m")).unwrap();
        Self(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_is_told_and_the_partial_file_says_what_it_is() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can mount a small disk to fill");
        return;
    }
    // Threads that are started here live in the mounts of this one.
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::mount(dir.path().join("disk"));
    for output in OUTPUTS {
        let path = disk.0.join("core");
        let error = write(&memory(), options(output), &path).unwrap_err();
        let WriteError::NoRoom { path: partial } = error else {
            panic!("{error}");
        };
        assert!(!path.exists());
        assert_eq!(partial, disk.0.join("core.partial"));
        assert_partial(&partial);
    }
}

#[test]
fn stopping_leaves_a_partial_file() {
    let dir = tempfile::tempdir().unwrap();
    let memory = memory();
    for output in OUTPUTS {
        let control = Control::default();
        control.stop.store(true, Ordering::Relaxed);
        let contents = Contents {
            memory: &memory,
            kernel: None,
            cpus: &[],
            level_of_source: 0,
        };
        let path = dir.path().join("core");
        let error = writer::write(contents, options(output), &control, &path).unwrap_err();
        let WriteError::Stopped { path: partial } = error else {
            panic!("{error}");
        };
        assert_partial(&partial);
        assert!(!path.exists());
    }
}

#[test]
fn an_old_partial_file_gives_way_and_a_finished_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    std::fs::write(dir.path().join("core.partial"), "left over").unwrap();
    write(&memory(), options(Output::Elf), &path).unwrap();
    assert!(!dir.path().join("core.partial").exists());
    let error = write(&memory(), options(Output::Elf), &path).unwrap_err();
    assert!(matches!(error, WriteError::Exists { .. }), "{error}");
}

#[test]
fn where_nothing_can_be_written_that_is_said() {
    let path = Path::new("/proc/no-such-directory/core");
    let error = write(&memory(), options(Output::Elf), path).unwrap_err();
    assert!(matches!(error, WriteError::Create { .. }), "{error}");
    let snappy = Output::Kdump(Compression::Snappy);
    let error = write(&memory(), options(snappy), path).unwrap_err();
    assert!(matches!(error, WriteError::Options(_)), "{error}");
}

#[test]
fn without_a_kernel_nothing_but_zeros_is_left_out_and_it_says_why() {
    let dir = tempfile::tempdir().unwrap();
    for (number, output) in OUTPUTS.into_iter().enumerate() {
        let path = dir.path().join(number.to_string());
        let options = Options {
            level: 31,
            ..options(output)
        };
        let written = write(&memory(), options, &path).unwrap();
        let why = written.not_filtered.unwrap();
        assert!(why.contains("VMCOREINFO"), "{why}");
        assert_eq!(written.note.level_wanted.get(), 31);
        assert_eq!(written.note.level_done.get(), 1);
        let dump = Dump::open(&path).unwrap().unwrap();
        assert_eq!(dump.level(), Some(1));
        let mut page = vec![0; 4096];
        kmorph_vmcore::PhysicalMemory::read(&dump, 5 * 4096, &mut page).unwrap();
        assert_eq!(page, memory().page(5));
    }
}
