//! The kinds of pages against a known use: a program in the guest touches a number of pages of each kind and marks
//! them, and kmorph must report the right kind for every marked page in the guest's memory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kmorph_tests::crashed_guest::{CrashedGuest, LOW_MEMORY_BYTES, Plan};
use kmorph_tests::kernels;
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::kernel::Kernel;
use kmorph_vmcore::kernel::pages::{PageKind, Pages};
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output};
use kmorph_vmcore::{Dump, MemoryFile, PhysicalMemory};

const PAGE: u64 = 4096;
/// Number of pages in a huge page.
const HUGE: u64 = 512;
/// Prefix of each mark, followed by the name of the kind.
const MARK: &[u8] = b"KMORPH-KIND-";
/// Minimum number of 16-byte marks in a marked page: an allocation of slab or per-CPU memory may begin within a page.
const MARKS_MIN: usize = 16;
/// Lines that the guest runs. The numbers are those of [`TOUCHED`].
const LINES: &str = "echo 20 > /proc/sys/vm/nr_hugepages\n\
     /program 2000 1000 1100 20 8 200 40 || echo \"guest: not touched\" > /dev/kmsg";
/// Name in the mark, minimum number of pages, and expected kind.
const TOUCHED: [(&str, u64, PageKind); 7] = [
    ("anon", 2000, PageKind::User),
    ("huge", 20 * HUGE, PageKind::User),
    ("thp.", 8 * HUGE, PageKind::User),
    ("file", 1000, PageKind::Cache),
    ("shm.", 1100, PageKind::Cache),
    ("slab", 200, PageKind::Slab),
    // Two pages for each, and a third one if the allocation does not begin at a page boundary.
    ("pcpu", 2 * 40, PageKind::Kernel),
];

/// Physical addresses of marked pages, by the name in their marks.
type Marked = BTreeMap<String, Vec<u64>>;

#[test]
fn pages_of_6_1_are_told_by_what_was_done_with_them() {
    let (ours, theirs) = left_out("6.1");
    // makedumpfile agrees about this kernel.
    assert_eq!(ours, theirs);
}

#[test]
fn pages_of_6_12_are_told_by_what_was_done_with_them() {
    // makedumpfile 1.7.2 does not know how this kernel marks pages of hugetlb and of slabs.
    let (ours, theirs) = left_out("6.12");
    eprintln!("left out by kmorph: {ours:?}, by makedumpfile: {theirs:?}");
}

#[test]
fn pages_of_the_newest_kernel_are_told_by_what_was_done_with_them() {
    let series = kernels::newest();
    let (ours, theirs) = left_out(&series);
    eprintln!("{series}: left out by kmorph: {ours:?}, by makedumpfile: {theirs:?}");
}

/// Returns how many marked pages of each kind kmorph and makedumpfile exclude as memory of users.
fn left_out(series: &str) -> (BTreeMap<String, u64>, BTreeMap<String, u64>) {
    let dir = tempfile::tempdir().unwrap();
    let guest = CrashedGuest::new(&Plan {
        memory_mib: 384,
        program: Some(&built(dir.path())),
        lines: LINES,
        ..Plan::small(series)
    });
    let file = File::open(guest.memory()).unwrap();
    let memory = MemoryFile::of_pc(file, LOW_MEMORY_BYTES).unwrap();
    let kernel = Kernel::in_memory(&memory).unwrap();
    let marked = marked(&memory);
    assert_told(&kernel, &marked);
    let (whole, ours) = (guest.path("whole"), guest.path("ours"));
    write(&memory, &kernel, 1, &whole);
    write(&memory, &kernel, 8, &ours);
    let theirs = guest.path("theirs");
    let ran = Command::new("makedumpfile")
        .args(["-l", "-d", "8"])
        .args([&whole, &theirs])
        .output();
    let ran = ran.expect("makedumpfile is installed: scripts/setup-tests");
    assert!(ran.status.success(), "{ran:?}");
    let (ours, theirs) = (missing(&ours, &marked), missing(&theirs, &marked));
    for (name, _, kind) in TOUCHED {
        let all = if kind == PageKind::User {
            marked[name].len() as u64
        } else {
            0
        };
        assert_eq!(ours[name], all, "{name}");
    }
    (ours, theirs)
}

fn built(dir: &Path) -> PathBuf {
    let program = dir.join("touch");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/page_kinds/touch.c");
    let built = Command::new("cc")
        .args(["-static", "-O1", "-Wall", "-Werror", "-o"])
        .args([&program, &source])
        .status();
    assert!(built.expect("there is a C compiler").success());
    program
}

/// Returns the name in the marks of a page if the page has enough of them.
fn name_in(page: &[u8]) -> Option<String> {
    let marks = page.chunks_exact(8).zip(page.chunks_exact(8).skip(1));
    let mut names = marks.filter_map(|(first, second)| {
        let mark = [first, second].concat();
        let name = mark.strip_prefix(MARK)?;
        Some(String::from_utf8_lossy(name).into_owned())
    });
    let first = names.next()?;
    (names.filter(|name| *name == first).count() + 1 >= MARKS_MIN).then_some(first)
}

fn marked(memory: &MemoryFile) -> Marked {
    let mut marked = Marked::new();
    let mut page = vec![0; 4096];
    for range in memory.ranges() {
        for phys in (range.start..range.end).step_by(4096) {
            memory.read(phys, &mut page).unwrap();
            if let Some(name) = name_in(&page) {
                marked.entry(name).or_default().push(phys);
            }
        }
    }
    marked
}

/// Maximum number of pages of one CPU that wait for the lists of pages in use (`FOLIO_BATCH_SIZE` of the newest
/// kernel). They do not have the flags of those lists yet and count as kernel pages, in makedumpfile too.
const ON_THEIR_WAY_MAX: u64 = 31;

fn assert_told(kernel: &Kernel<'_>, marked: &Marked) {
    let pages = Pages::of(kernel).unwrap();
    let (mut kinds, mut buffer) = (Vec::new(), Vec::new());
    let mut told: BTreeMap<&str, BTreeMap<String, u64>> = BTreeMap::new();
    let mut loaded = None;
    let all = marked
        .iter()
        .flat_map(|(name, places)| places.iter().map(move |phys| (name.as_str(), phys / PAGE)));
    for (name, pfn) in all {
        let first = pfn - pfn % pages.section_pages();
        if loaded.replace(first) != Some(first) {
            pages.kinds(first, &mut kinds, &mut buffer).unwrap();
        }
        let kind = kinds[usize::try_from(pfn - first).unwrap()];
        let of_name = told.entry(name).or_default();
        *of_name.entry(format!("{kind:?}")).or_default() += 1;
    }
    for (name, touched, kind) in TOUCHED {
        let mut told = told.get(name).cloned().unwrap_or_default();
        let right = told.remove(&format!("{kind:?}")).unwrap_or(0);
        let on_their_way = match told.get("Kernel") {
            Some(pages) if kind == PageKind::Cache && *pages <= ON_THEIR_WAY_MAX => {
                told.remove("Kernel").unwrap_or(0)
            }
            _ => 0,
        };
        assert!(
            right + on_their_way >= touched,
            "{name}: {right} {kind:?}, {told:?}"
        );
        if name == "pcpu" {
            // The system call's own copy, which the kernel has freed.
            told.retain(|kind, _| !["Free", "Slab"].contains(&kind.as_str()));
        }
        assert!(told.is_empty(), "{name}: {right} {kind:?}, {told:?}");
    }
}

fn write(memory: &MemoryFile, kernel: &Kernel<'_>, level: u32, path: &Path) {
    let contents = Contents {
        memory,
        kernel: Some(kernel),
        cpus: &[],
        level_of_source: 0,
    };
    let options = Options {
        output: Output::Kdump(Compression::Lzo),
        level,
        threads: 2,
        time: Duration::from_secs(1_800_000_000),
    };
    let written = writer::write(contents, options, &Control::default(), path).unwrap();
    assert_eq!(written.not_filtered, None);
}

/// Returns the number of marked pages that a dump lacks, by name.
fn missing(path: &Path, marked: &Marked) -> BTreeMap<String, u64> {
    let dump = Dump::open(path).unwrap().unwrap();
    let absent = |phys: &&u64| dump.next_present(**phys, **phys + PAGE) != **phys;
    let count = |places: &[u64]| places.iter().filter(absent).count() as u64;
    let names = marked.iter();
    names
        .map(|(name, places)| (name.clone(), count(places)))
        .collect()
}
