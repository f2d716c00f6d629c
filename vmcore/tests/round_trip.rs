//! What is written is read: any memory, each format, any number of threads.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::time::{Duration, Instant};

use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::paced::{Pace, Paced, Rate};
use kmorph_vmcore::writer::{Options, Output};
use kmorph_vmcore::{ChecksumState, Completeness, Dump, MemoryError, PhysicalMemory};
use proptest::prelude::*;
use support::{OUTPUTS, Pages, options, write};

/// A page of which the content repeats, and one that does not shrink.
fn page(seed: u8) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    let bytes = (0..4096_u64).map(|n| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        match seed % 3 {
            0 => seed,
            1 => n.to_le_bytes()[0] & seed,
            _ => state.to_le_bytes()[7],
        }
    });
    bytes.collect()
}

fn memories() -> impl Strategy<Value = Pages> {
    // Stretches of memory with gaps, some beyond a window of the writer.
    let stretch = (1_u64..40_000, 1_u64..700);
    let filled = prop::collection::vec((any::<u16>(), any::<u8>()), 0..60);
    (prop::collection::vec(stretch, 1..5), filled).prop_map(|(stretches, filled)| {
        let mut at = 0;
        let places: Vec<_> = stretches
            .iter()
            .map(|(gap, count)| {
                let first = at + gap;
                at = first + count;
                (first, *count)
            })
            .collect();
        let mut memory = Pages::new(&places);
        for (place, seed) in filled {
            let (first, count) = places[usize::from(place) % places.len()];
            let pfn = first + u64::from(place) % count;
            memory.pages.insert(pfn, page(seed));
        }
        memory
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_memory_comes_back_from_every_format(memory in memories()) {
        let dir = tempfile::tempdir().unwrap();
        for (number, output) in OUTPUTS.into_iter().enumerate() {
            let path = dir.path().join(number.to_string());
            let written = write(&memory, options(output), &path).unwrap();
            let dump = Dump::open(&path).unwrap().unwrap();
            prop_assert_eq!(dump.completeness(), Completeness::Complete);
            prop_assert_eq!(dump.check_checksum().unwrap(), ChecksumState::Holds);
            prop_assert_eq!(dump.notes().own, Some(written.note));
            prop_assert_eq!(dump.notes().cpus.len(), 1);
            prop_assert_eq!(dump.ranges(), support::joined(&memory.ranges));
            let mut zero = 0;
            for range in &memory.ranges {
                for pfn in range.start / 4096..range.end / 4096 {
                    let mut page = vec![0xee; 4096];
                    dump.read(pfn * 4096, &mut page).unwrap();
                    prop_assert_eq!(&page, &memory.page(pfn), "page {} of {:?}", pfn, output);
                    zero += u64::from(page.iter().all(|byte| *byte == 0));
                }
                let absent = dump.read(range.end, &mut [0]);
                let touches = memory.ranges.iter().any(|r| r.start == range.end);
                let is_absent = matches!(absent, Err(MemoryError::Absent { .. }));
                prop_assert!(touches || is_absent);
            }
            prop_assert_eq!(written.note.zero.get(), zero);
        }
    }
}

#[test]
fn the_file_does_not_depend_on_the_number_of_threads() {
    let mut memory = Pages::new(&[(1, 3000), (40_000, 9)]);
    for pfn in (1..3000).step_by(3) {
        memory.pages.insert(pfn, page(pfn.to_le_bytes()[0]));
    }
    let dir = tempfile::tempdir().unwrap();
    for output in OUTPUTS {
        let files = [1, 2, 7].map(|threads| {
            let path = dir.path().join(format!("{output:?}-{threads}"));
            let options = Options {
                threads,
                ..options(output)
            };
            write(&memory, options, &path).unwrap();
            std::fs::read(path).unwrap()
        });
        assert!(files[0] == files[1] && files[0] == files[2], "{output:?}");
    }
}

#[test]
fn a_rate_limits_what_is_read_and_changes_nothing_in_the_file() {
    let mut memory = Pages::new(&[(0, 1024)]);
    for pfn in 0..1024 {
        memory.pages.insert(pfn, page(1));
    }
    let dir = tempfile::tempdir().unwrap();
    let pace = Pace::new(Rate::mib_per_second(16).unwrap());
    for output in OUTPUTS {
        let path = dir.path().join(format!("{output:?}"));
        write(&memory, options(output), &path).unwrap();
        let paced_path = path.with_extension("paced");
        let begun = Instant::now();
        write(&Paced::new(&memory, &pace), options(output), &paced_path).unwrap();
        // 4 MiB.
        assert!(begun.elapsed() >= Duration::from_millis(250), "{output:?}");
        let files = [path, paced_path].map(|path| std::fs::read(path).unwrap());
        assert!(files[0] == files[1], "{output:?}");
    }
}

#[test]
fn any_byte_that_changes_breaks_the_checksum() {
    let mut memory = Pages::new(&[(0, 40)]);
    memory.pages.insert(7, page(2));
    let dir = tempfile::tempdir().unwrap();
    for output in OUTPUTS {
        let path = dir.path().join(format!("{output:?}"));
        write(&memory, options(output), &path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in (0..whole.len()).step_by(601) {
            let mut changed = whole.clone();
            changed[at] ^= 0x40;
            // Some bytes are part of what says that there is a checksum: it is refused, or not kmorph's.
            let state = Dump::from_bytes(Box::new(changed)).map(|dump| dump.check_checksum());
            assert!(
                !matches!(state, Ok(Ok(ChecksumState::Holds))),
                "{output:?} at {at}"
            );
        }
        let shorter = whole[..whole.len() - 1].to_vec();
        let state = Dump::from_bytes(Box::new(shorter))
            .unwrap()
            .check_checksum()
            .unwrap();
        assert!(
            matches!(state, ChecksumState::WrongLength { .. }),
            "{state:?}"
        );
    }
}

#[test]
fn a_page_that_cannot_be_read_is_counted_and_reads_as_zeros() {
    let mut memory = Pages::new(&[(0, 20)]);
    for pfn in 0..20 {
        memory.pages.insert(pfn, page(1));
    }
    memory.broken = Some(9);
    let dir = tempfile::tempdir().unwrap();
    for output in OUTPUTS {
        let path = dir.path().join(format!("{output:?}"));
        let written = write(&memory, options(output), &path).unwrap();
        assert_eq!(written.note.unreadable.get(), 1);
        let dump = Dump::open(&path).unwrap().unwrap();
        let mut pages = vec![1; 2 * 4096];
        dump.read(8 * 4096, &mut pages).unwrap();
        assert_eq!(pages[..4096], page(1));
        assert!(pages[4096..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_dump_is_written_from_a_dump() {
    let mut memory = Pages::new(&[(3, 300), (1000, 5)]);
    for pfn in (3..303).step_by(2) {
        memory.pages.insert(pfn, page(pfn.to_le_bytes()[0]));
    }
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    write(&memory, options(Output::Kdump(Compression::Lzo)), &first).unwrap();
    let source = Dump::open(&first).unwrap().unwrap();
    let contents = kmorph_vmcore::writer::Contents {
        memory: &source,
        kernel: None,
        cpus: &[],
        level_of_source: source.level().unwrap(),
    };
    let control = kmorph_vmcore::writer::Control::default();
    kmorph_vmcore::writer::write(contents, options(Output::Elf), &control, &second).unwrap();
    let dump = Dump::open(&second).unwrap().unwrap();
    for pfn in 3..303 {
        let mut page = vec![1; 4096];
        dump.read(pfn * 4096, &mut page).unwrap();
        assert_eq!(page, memory.page(pfn));
    }
}
