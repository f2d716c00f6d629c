//! Dumps that others help to write: whoever reads what, and however they fail, the memory is in the file.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::field_reassign_with_default,
    reason = "a test fails by panicking"
)]

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kmorph_vmcore::writer::shares::{Helper, Share, Shares};
use kmorph_vmcore::writer::{Control, Output, WriteError, Written};
use kmorph_vmcore::{Dump, MemoryError, PhysRange, PhysicalMemory};
use support::{OUTPUTS, Pages, options, write, write_with};

/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_secs(60);
const MIB_PAGES: u64 = 256;

/// 24 MiB in two stretches, hardly any page like another, some of zeros.
fn memory() -> Pages {
    let mut memory = Pages::new(&[(0, 10 * MIB_PAGES), (100_000, 14 * MIB_PAGES)]);
    for range in memory.ranges.clone() {
        for pfn in (range.start / 4096..range.end / 4096).filter(|pfn| pfn % 7 != 0) {
            let bytes = (0..4096_u64).map(|n| ((n * n * (pfn + 7)) >> 5).to_le_bytes()[0]);
            memory.pages.insert(pfn, bytes.collect());
        }
    }
    memory
}

/// A memory whose reads wait until a gate is open; some of it cannot be read at all.
struct Gated<'a> {
    memory: &'a Pages,
    open: Mutex<bool>,
    opened: Condvar,
    /// First page that cannot be read, and the one behind the last.
    broken: std::ops::Range<u64>,
}

impl<'a> Gated<'a> {
    fn new(memory: &'a Pages, open: bool) -> Self {
        Self {
            memory,
            open: Mutex::new(open),
            opened: Condvar::new(),
            broken: 0..0,
        }
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl PhysicalMemory for Gated<'_> {
    fn ranges(&self) -> &[PhysRange] {
        self.memory.ranges()
    }

    /// As if its pages of zeros were holes in a file.
    fn next_data(&self, phys: u64, end: u64) -> u64 {
        let data = self.memory.pages.range(phys / 4096..).next();
        data.map_or(end, |(pfn, _)| pfn * 4096).clamp(phys, end)
    }

    fn read(&self, phys: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let open = self.open.lock().unwrap();
        let waited = self
            .opened
            .wait_timeout_while(open, DEADLINE, |open| !*open);
        assert!(*waited.unwrap().0, "the gate stays shut");
        let pages = phys / 4096..(phys + buf.len() as u64).div_ceil(4096);
        if pages.start < self.broken.end && self.broken.start < pages.end {
            return Err(MemoryError::Absent { phys });
        }
        self.memory.read(phys, buf)
    }
}

fn read_share(memory: &Pages, share: &mut Share) {
    for range in share.ranges().to_vec() {
        let mut pages = range.start / 4096..range.end / 4096;
        // Where there is a hole, reading it would fill it.
        assert!(
            pages.all(|pfn| memory.pages.contains_key(&pfn)),
            "{range:?}"
        );
        let place = share.memory_at(range).unwrap();
        memory.read(range.start, place).unwrap();
    }
}

/// One that reaches all of it.
fn helper(shares: &Arc<Shares>, memory: &Pages) -> Helper {
    let helper = shares.helper();
    helper.reaches(memory.ranges.clone());
    helper
}

/// Reads all that it is given; the bytes that the writer took.
fn help(helper: &Helper, memory: &Pages, after_each: impl Fn()) -> u64 {
    let mut taken = 0;
    while let Some(mut share) = helper.take() {
        read_share(memory, &mut share);
        let bytes = share.bytes();
        taken += if helper.deliver(share) { bytes } else { 0 };
        after_each();
    }
    taken
}

fn helped(shares: &Arc<Shares>) -> Control {
    let mut control = Control::default();
    control.shares = Some(Arc::clone(shares));
    control
}

fn assert_holds(memory: &Pages, path: &Path, written: &Written, output: Output) {
    assert_eq!(written.note.unreadable.get(), 0, "{output:?}");
    let dump = Dump::open(path).unwrap().unwrap();
    for range in &memory.ranges {
        for pfn in range.start / 4096..range.end / 4096 {
            let mut page = [1; 4096];
            dump.read(pfn * 4096, &mut page).unwrap();
            assert!(page[..] == memory.page(pfn), "{output:?}: page {pfn}");
        }
    }
}

#[test]
fn what_helpers_read_is_in_the_file() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    for output in OUTPUTS {
        let alone = dir.path().join(format!("{output:?}-alone"));
        write(&memory, options(output), &alone).unwrap();
        let path = dir.path().join(format!("{output:?}"));
        // Until a helper has delivered, nobody else can read: so it is certain that one does.
        let gated = Gated::new(&memory, false);
        let shares = Arc::<Shares>::default();
        let taken = AtomicU64::new(0);
        let written = std::thread::scope(|scope| {
            for helper in [helper(&shares, &memory), helper(&shares, &memory)] {
                scope.spawn(|| {
                    let helper = helper;
                    let bytes = help(&helper, &memory, || gated.open());
                    taken.fetch_add(bytes, Ordering::Relaxed);
                });
            }
            write_with(&gated, options(output), &helped(&shares), &path)
        });
        let written = written.unwrap();
        assert!(taken.load(Ordering::Relaxed) >= 1 << 19, "{output:?}");
        assert_holds(&memory, &path, &written, output);
        if output == Output::Elf {
            let files = [alone, path].map(|path| std::fs::read(path).unwrap());
            assert!(files[0] == files[1], "only packed pages have another order");
        }
    }
}

#[test]
fn a_helper_that_fails_or_never_answers_costs_nothing_of_the_dump() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let gated = Gated::new(&memory, false);
    let shares = Arc::<Shares>::default();
    let [silent, failing, refusing] = [(); 3].map(|()| helper(&shares, &memory));
    let written = std::thread::scope(|scope| {
        let writing =
            scope.spawn(|| write_with(&gated, options(Output::Elf), &helped(&shares), &path));
        // One holds its chunk until all is over, one is gone with its own, one could not read.
        let held = silent.take().unwrap();
        drop(failing.take().unwrap());
        drop(failing);
        let refused = refusing.take().unwrap();
        refusing.give_back(&refused);
        gated.open();
        let written = writing.join().unwrap();
        assert!(!silent.deliver(held), "it is not needed any more");
        written
    });
    assert_holds(&memory, &path, &written.unwrap(), Output::Elf);
}

#[test]
fn what_only_helpers_can_read_is_read_by_them() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    for output in OUTPUTS {
        let path = dir.path().join(format!("{output:?}"));
        let mut gated = Gated::new(&memory, true);
        gated.broken = 300..700;
        let shares = Arc::<Shares>::default();
        let helper = helper(&shares, &memory);
        let written = std::thread::scope(|scope| {
            scope.spawn(|| {
                let helper = helper;
                help(&helper, &memory, || {})
            });
            write_with(&gated, options(output), &helped(&shares), &path)
        });
        assert_holds(&memory, &path, &written.unwrap(), output);
    }
}

#[test]
fn helpers_are_asked_for_what_they_reach() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let mut gated = Gated::new(&memory, true);
    // Only the second helper reaches what the writer does not.
    let broken = 300 * 4096..700 * 4096;
    gated.broken = 300..700;
    let shares = Arc::<Shares>::default();
    let (first, second) = (shares.helper(), shares.helper());
    let high = memory.ranges[1];
    let written = std::thread::scope(|scope| {
        let (first, second, memory) = (first, second, &memory);
        scope.spawn(move || {
            first.reaches(vec![high]);
            while let Some(mut share) = first.take() {
                assert!(share.ranges().iter().all(|r| high.contains(r.start)));
                read_share(memory, &mut share);
                first.deliver(share);
            }
        });
        scope.spawn(move || {
            second.reaches(vec![PhysRange {
                start: broken.start & !0xf_ffff,
                end: (broken.end + 0xf_ffff) & !0xf_ffff,
            }]);
            help(&second, memory, || {});
        });
        write_with(&gated, options(Output::Elf), &helped(&shares), &path)
    });
    assert_holds(&memory, &path, &written.unwrap(), Output::Elf);
}

#[test]
fn what_no_helper_reaches_is_not_waited_for() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let mut gated = Gated::new(&memory, true);
    gated.broken = 300..301;
    let shares = Arc::<Shares>::default();
    let helper = shares.helper();
    helper.reaches(vec![memory.ranges[1]]);
    let written = write_with(&gated, options(Output::Elf), &helped(&shares), &path);
    assert_eq!(written.unwrap().note.unreadable.get(), 1);
}

#[test]
fn what_nobody_can_read_is_counted_and_ends() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    for (name, leaves) in [("refuses", false), ("leaves", true)] {
        let path = dir.path().join(name);
        let mut gated = Gated::new(&memory, true);
        gated.broken = 300..301;
        let shares = Arc::<Shares>::default();
        let helper = helper(&shares, &memory);
        let written = std::thread::scope(|scope| {
            scope.spawn(|| {
                let helper = helper;
                while let Some(share) = helper.take() {
                    if leaves {
                        return;
                    }
                    helper.give_back(&share);
                }
            });
            write_with(&gated, options(Output::Elf), &helped(&shares), &path)
        });
        assert_eq!(written.unwrap().note.unreadable.get(), 1, "{name}");
    }
}

#[test]
fn a_stop_is_heard_while_helpers_are_waited_for() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let mut gated = Gated::new(&memory, true);
    gated.broken = 300..301;
    let shares = Arc::<Shares>::default();
    let (helper, control) = (helper(&shares, &memory), helped(&shares));
    let stopped = std::thread::scope(|scope| {
        let writing = scope.spawn(|| write_with(&gated, options(Output::Elf), &control, &path));
        // It keeps whatever it gets, so that in the end only what it has is left.
        let mut kept = Vec::new();
        let broken = |share: &Share| {
            share
                .ranges()
                .iter()
                .any(|range| range.contains(300 * 4096))
        };
        while !kept.iter().any(broken) {
            kept.push(helper.take().unwrap());
        }
        control.stop.store(true, Ordering::Relaxed);
        let stopped = writing.join().unwrap();
        assert!(helper.take().is_none(), "nothing more is given");
        stopped
    });
    assert!(
        matches!(stopped, Err(WriteError::Stopped { .. })),
        "{stopped:?}"
    );
}

#[test]
fn a_share_takes_only_what_was_asked_for() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let gated = Gated::new(&memory, false);
    let shares = Arc::<Shares>::default();
    let helper = helper(&shares, &memory);
    std::thread::scope(|scope| {
        scope.spawn(|| write_with(&gated, options(Output::Elf), &helped(&shares), &path).unwrap());
        let mut share = helper.take().unwrap();
        let whole = share.ranges()[0];
        for (start, end) in [
            (whole.start - 4096, whole.end),
            (whole.start, whole.end + 4096),
            (whole.end, whole.start),
            (u64::MAX - 4095, u64::MAX),
        ] {
            assert!(share.memory_at(PhysRange { start, end }).is_none());
        }
        assert!(share.memory_at(whole).is_some());
        gated.open();
    });
}
