//! Vmcores from other tools: makedumpfile's, filtered from kmorph's, and QEMU's. They are complete, and no truncated
//! copy is; the note that kmorph wrote into the original does not apply to makedumpfile's copy.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use kmorph_tests::crashed_guest::{CrashedGuest, Plan};
use kmorph_tests::dumps::written;
use kmorph_tests::program;
use kmorph_vmcore::bytes::Bytes;
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::writer::Output;
use kmorph_vmcore::{ChecksumState, Completeness, Dump, PhysicalMemory};

/// Number of places at which each file is truncated.
const CUTS: u64 = 30;
const PAGE: u64 = 4096;
/// Default number of single-bit changes tried in each file (`KMORPH_TEST_FLIPS`; see `make test-flips`).
const FLIPS: u64 = 40;
/// Number of pages read from a file with a changed bit, spread over the file.
const PAGES_READ: usize = 40;

#[test]
fn what_makedumpfile_and_qemu_write_is_whole_and_no_cut_of_it_is() {
    let guest = CrashedGuest::new(&Plan::small("6.1"));
    // Debian's QEMU supports no other compression.
    for format in ["elf", "kdump-zlib", "kdump-raw-zlib"] {
        let dump = guest.dump(format);
        assert_no_cut_is_whole(&dump);
        assert_no_change_moves_or_loses_pages(&dump);
        if format != "elf" {
            std::fs::remove_file(&dump).unwrap();
        }
    }
    for (level, source) in [
        (0, Output::Elf),
        (1, Output::Elf),
        (1, Output::Kdump(Compression::Lzo)),
    ] {
        let (ours, _) = written(&guest, &format!("ours-{level}"), source, level);
        assert_whole(&ours, Some(level), ChecksumState::Holds);
        for (name, words, said) in [
            ("zlib", &["-c", "-d", "31"][..], Some(31)),
            ("lzo", &["-l", "-d", "1"], Some(1)),
            ("raw", &["-d", "0"], Some(0)),
            ("elf", &["-E", "-d", "0"], None),
            (
                "threads",
                &["-c", "-d", "31", "--num-threads", "2"],
                Some(31),
            ),
        ] {
            if name == "elf" && source != Output::Elf {
                continue;
            }
            // makedumpfile's header also records the pages that a kdump-compressed source lacks.
            let lacks = if source == Output::Elf { 0 } else { level };
            let said = said.map(|said| said | lacks);
            let theirs = guest.path(&format!("{level}-{name}"));
            makedumpfile(words, &[&ours, &theirs]);
            assert_whole(&theirs, said, ChecksumState::None);
            assert_the_command_says(&theirs, said);
            assert_no_cut_is_whole(&theirs);
            assert_no_change_moves_or_loses_pages(&theirs);
            std::fs::remove_file(&theirs).unwrap();
        }
        assert_flattened_and_split_are_whole(&guest, &ours);
        std::fs::remove_file(&ours).unwrap();
    }
}

/// `-F` writes to standard output, `-R` reads standard input; `--split` makes parts, `--reassemble` joins them.
fn assert_flattened_and_split_are_whole(guest: &CrashedGuest, ours: &Path) {
    let flat = guest.path("flat");
    let ran = Command::new("makedumpfile")
        .args(["-F", "-c", "-d", "31"])
        .arg(ours)
        .stdout(File::create(&flat).unwrap())
        .output();
    assert!(ran.unwrap().status.success());
    assert_whole(&flat, Some(31), ChecksumState::None);
    assert_no_cut_is_whole(&flat);
    let rearranged = guest.path("rearranged");
    let ran = Command::new("makedumpfile")
        .arg("-R")
        .arg(&rearranged)
        .stdin(File::open(&flat).unwrap())
        .output();
    assert!(ran.unwrap().status.success());
    assert_whole(&rearranged, Some(31), ChecksumState::None);
    assert_no_cut_is_whole(&rearranged);
    let parts = [guest.path("part-1"), guest.path("part-2")];
    let joined = guest.path("joined");
    makedumpfile(
        &["--split", "-l", "-d", "31"],
        &[ours, &parts[0], &parts[1]],
    );
    makedumpfile(&["--reassemble"], &[&parts[0], &parts[1], &joined]);
    assert_whole(&joined, Some(31), ChecksumState::None);
    assert_no_cut_is_whole(&joined);
    for part in &parts {
        let refused = Dump::open(part).unwrap().unwrap_err().to_string();
        assert!(refused.contains("--reassemble"), "{refused}");
        assert_no_cut_is_whole(part);
    }
    for path in [&flat, &joined] {
        assert_no_change_moves_or_loses_pages(path);
    }
    for path in [&flat, &rearranged, &joined, &parts[0], &parts[1]] {
        std::fs::remove_file(path).unwrap();
    }
}

fn assert_whole(path: &Path, level: Option<u32>, checksum: ChecksumState) {
    let dump = Dump::open(path).unwrap().unwrap();
    assert_eq!(dump.completeness(), Completeness::Complete, "{path:?}");
    assert_eq!(dump.check_checksum().unwrap(), checksum, "{path:?}");
    assert_eq!(dump.level(), level, "{path:?}");
    let ours = checksum == ChecksumState::Holds;
    assert_eq!(dump.own().is_some(), ours, "{path:?}");
}

fn assert_the_command_says(path: &Path, level: Option<u32>) {
    let mut command = Command::new(program("kmorphctl"));
    let command = command.args(["vmcore", "analyze", "--scan"]).arg(path);
    let ran = command.output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{path:?}: {ran:?}");
    let level = match level {
        Some(level) => format!("\nLeft out: {level} ("),
        None => "\nLeft out: the file does not say".to_owned(),
    };
    for text in ["\nComplete: yes\n", "\nChecksum: none\n", &level] {
        assert!(said.contains(text), "{path:?}: no {text} in {said}");
    }
}

/// A file truncated to a length.
struct Cut(Arc<Vec<u8>>, u64);

impl Bytes for Cut {
    fn len(&self) -> u64 {
        self.1
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        match offset + buf.len() as u64 <= self.1 {
            true => self.0.read_exact_at(buf, offset),
            false => Err(std::io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// A file with one bit changed.
struct Changed {
    whole: Arc<Vec<u8>>,
    at: u64,
    bit: u8,
}

impl Bytes for Changed {
    fn len(&self) -> u64 {
        self.whole.as_slice().len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.whole.read_exact_at(buf, offset)?;
        let within = self.at.checked_sub(offset).map(usize::try_from);
        if let Some(byte) = within.and_then(|at| buf.get_mut(at.ok()?)) {
            *byte ^= 1 << self.bit;
        }
        Ok(())
    }
}

/// Returns the pages in a dump.
fn pages_in(dump: &Dump) -> Vec<u64> {
    let mut pages = Vec::new();
    for range in dump.ranges() {
        let mut phys = dump.next_present(range.start, range.end);
        while phys < range.end {
            pages.push(phys);
            phys = dump.next_present(phys + PAGE, range.end);
        }
    }
    pages
}

/// With any single bit changed, a file that lacks a page or has a page at another address is not reported as complete.
/// The bytes of a page have no checksum, so one page, or the zero pages, may differ.
fn assert_no_change_moves_or_loses_pages(path: &Path) {
    let whole = Arc::new(std::fs::read(path).unwrap());
    let sound = Dump::from_bytes(Box::new(Cut(whole.clone(), whole.len() as u64))).unwrap();
    let pages = pages_in(&sound);
    let page = |dump: &Dump, phys: u64| {
        let mut bytes = vec![0; 4096];
        dump.read(phys, &mut bytes).map(|()| bytes)
    };
    let read = pages.iter().step_by(pages.len() / PAGES_READ + 1);
    let read: Vec<_> = read
        .map(|phys| (*phys, page(&sound, *phys).unwrap()))
        .collect();
    let mut random = 3_u64;
    let mut below = |end: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005) + 1;
        (random >> 20) % end
    };
    // Headers, notes and bitmaps; the list of pages, 24 bytes each; and the whole file.
    let list = 64 * 1024 + 24 * pages.len() as u64;
    let flips = std::env::var("KMORPH_TEST_FLIPS").ok();
    let flips = flips.and_then(|flips| flips.parse().ok()).unwrap_or(FLIPS);
    for number in 0..flips {
        let end = [64 * 1024, list, whole.len() as u64][usize::try_from(number % 3).unwrap()];
        let (at, bit) = (
            below(end.min(whole.len() as u64)),
            u8::try_from(below(8)).unwrap(),
        );
        let what = format!("{path:?}: bit {bit} of byte {at}");
        let bytes = Changed {
            whole: whole.clone(),
            at,
            bit,
        };
        let Ok(dump) = Dump::from_bytes(Box::new(bytes)) else {
            continue;
        };
        if dump.completeness() != Completeness::Complete {
            continue;
        }
        // An unchanged bitmap of a kdump-compressed file.
        let count = dump
            .pages_in_file()
            .filter(|_| dump.ranges() == sound.ranges());
        if count.is_none() || count != sound.pages_in_file() {
            let has = pages_in(&dump);
            let lost = pages.iter().find(|phys| has.binary_search(phys).is_err());
            assert_eq!(lost, None, "{what}: a page is not there");
        }
        let other = |(phys, bytes): &&(u64, Vec<u8>)| {
            let now = page(&dump, *phys);
            now.is_ok_and(|now| now != *bytes) && bytes.iter().any(|byte| *byte != 0)
        };
        let others = read.iter().filter(other).count();
        assert!(
            others <= 1,
            "{what}: {others} pages of {} are others",
            read.len()
        );
    }
}

fn assert_no_cut_is_whole(path: &Path) {
    let whole = Arc::new(std::fs::read(path).unwrap());
    let length = whole.len() as u64;
    let mut random = 7_u64;
    let ends = (0..CUTS).map(|_| {
        random = random.wrapping_mul(6_364_136_223_846_793_005) + 1;
        (random >> 20) % length
    });
    for end in ends.chain([length - 1]) {
        let Ok(dump) = Dump::from_bytes(Box::new(Cut(whole.clone(), end))) else {
            continue;
        };
        let state = dump.completeness();
        assert_ne!(state, Completeness::Complete, "{path:?}: {end} of {length}");
    }
}

fn makedumpfile(words: &[&str], files: &[&Path]) {
    let ran = Command::new("makedumpfile")
        .args(words)
        .args(files)
        .output();
    let ran = ran.expect("makedumpfile is installed: scripts/setup-tests");
    assert!(ran.status.success(), "makedumpfile {words:?}: {ran:?}");
}
