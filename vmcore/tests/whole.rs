//! What is cut off or changed is never called complete, and what is no vmcore is refused.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use kmorph_vmcore::analysis::{AnalysisOptions, analyse};
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::writer::Output;
use kmorph_vmcore::{Completeness, Dump, DumpError};
use support::{OUTPUTS, Pages, options, write};

/// Numbers that look random and are the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005) + 1;
        usize::try_from((self.0 >> 20) % end as u64).unwrap()
    }
}

fn memory() -> Pages {
    let mut memory = Pages::new(&[(1, 90), (300, 40)]);
    for pfn in (2_u64..90).step_by(2) {
        let bytes = (0..4096_u64).map(|n| ((n * n * (pfn + 7)) >> 9).to_le_bytes()[0] & 0x3f);
        memory.pages.insert(pfn, bytes.collect());
    }
    memory.pages.insert(339, vec![0x5a; 4096]);
    memory
}

fn sound(bytes: Vec<u8>) -> bool {
    let Ok(dump) = Dump::from_bytes(Box::new(bytes)) else {
        return false;
    };
    analyse(&dump, AnalysisOptions::default()).is_ok_and(|report| {
        report.file.complete && matches!(report.file.checksum, "holds" | "none")
    })
}

/// Cuts at places all over the file, and at its very end.
fn assert_cuts_are_told(whole: &[u8], what: &str) {
    assert!(sound(whole.to_vec()), "{what}");
    let mut numbers = Numbers(7);
    let ends = (0..60).map(|_| numbers.below(whole.len()));
    for end in ends.chain([whole.len() - 1, whole.len() - 2]) {
        assert!(
            !sound(whole[..end].to_vec()),
            "{what} cut at {end} of {}",
            whole.len()
        );
    }
}

#[test]
fn no_cut_and_no_changed_bit_of_our_files_is_called_sound() {
    let dir = tempfile::tempdir().unwrap();
    for output in OUTPUTS {
        let path = dir.path().join(format!("{output:?}"));
        write(&memory(), options(output), &path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert_cuts_are_told(&whole, &format!("{output:?}"));
        let mut numbers = Numbers(3);
        // The headers and notes, and 200 places anywhere.
        let head = (0..4096 + 700).step_by(5).map(|at| (at, at % 8));
        let rest: Vec<_> = (0..200)
            .map(|_| (numbers.below(whole.len()), numbers.below(8)))
            .collect();
        for (at, bit) in head.chain(rest) {
            let mut changed = whole.clone();
            changed[at] ^= 1 << bit;
            assert!(!sound(changed), "{output:?}, bit {bit} of byte {at}");
        }
    }
}

/// A file that has no checksum: the bytes of kmorph's own note are not there.
fn without_note(mut file: Vec<u8>) -> Vec<u8> {
    let at = file
        .windows(7)
        .position(|name| name == b"KMORPH\0")
        .unwrap();
    file[at..at + 8 + 88].fill(0);
    file
}

#[test]
fn a_file_without_a_checksum_is_complete_when_all_its_pages_lie_in_it() {
    let dir = tempfile::tempdir().unwrap();
    for output in OUTPUTS {
        let path = dir.path().join(format!("{output:?}"));
        write(&memory(), options(output), &path).unwrap();
        let whole = without_note(std::fs::read(&path).unwrap());
        assert_cuts_are_told(&whole, &format!("{output:?} without a note"));
    }
}

/// The list of pages and what says where it ends have no checksum; still not a bit changes unseen.
#[test]
fn a_changed_bitmap_or_place_of_a_page_is_found_without_a_checksum() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    let zlib = Output::Kdump(Compression::Zlib);
    write(&memory(), options(zlib), &path).unwrap();
    let whole = without_note(std::fs::read(&path).unwrap());
    // A block each: header, sub-header with notes, two bitmaps. Then 130 descriptors of 24 bytes.
    let second = 3 * 4096;
    for bit in (0..340).chain([400, 1000]) {
        let mut changed = whole.clone();
        changed[second + bit / 8] ^= 1 << (bit % 8);
        assert!(!sound(changed), "bit {bit} of the second bitmap");
    }
    let descriptors = 4 * 4096;
    for page in (0..130).step_by(3) {
        // The offset and the length; behind the last page nothing shows that it is shorter.
        let bits = (0..96).filter(|bit| page < 129 || !(64..78).contains(bit));
        let bits = bits.map(|bit| (bit / 8, bit % 8));
        for (byte, bit) in bits {
            let mut changed = whole.clone();
            changed[descriptors + page * 24 + byte] ^= 1 << bit;
            assert!(!sound(changed), "bit {bit} of byte {byte} of page {page}");
        }
    }
}

/// Where several threads or kernels write, one may be ahead of another.
#[test]
fn pages_lie_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    write(&memory(), options(Output::Kdump(Compression::Zlib)), &path).unwrap();
    let mut file = without_note(std::fs::read(&path).unwrap());
    // Descriptors of 24 bytes, which begin with place and length: two pages change places as one of another order would.
    let at = |page: usize| 4 * 4096 + page * 24;
    let of = |file: &[u8], page: usize| file[at(page)..at(page) + 12].to_vec();
    let mut pairs = (0..130).flat_map(|one| (0..one).map(move |other| (one, other)));
    let exchangeable = |(one, other): &(usize, usize)| {
        let (one, other) = (of(&file, *one), of(&file, *other));
        one[8..] == other[8..] && one[..8] != other[..8]
    };
    let (one, other) = pairs.find(exchangeable).expect("two of the same length");
    let (first, second) = (of(&file, one), of(&file, other));
    file[at(one)..at(one) + 12].copy_from_slice(&second);
    file[at(other)..at(other) + 12].copy_from_slice(&first);
    assert!(sound(file));
}

/// Then nothing leads to the packed page of zeros, which stands before the others.
#[test]
fn a_file_in_which_no_page_is_zero_is_complete_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut memory = Pages::new(&[(0, 9)]);
    for pfn in 0..9 {
        memory.pages.insert(pfn, vec![0x21; 4096]);
    }
    for output in OUTPUTS {
        let path = dir.path().join(format!("{output:?}"));
        write(&memory, options(output), &path).unwrap();
        let whole = without_note(std::fs::read(&path).unwrap());
        assert_cuts_are_told(&whole, &format!("{output:?} without zeros"));
        if output == Output::Elf {
            continue;
        }
        let mut fewer = whole.clone();
        fewer[3 * 4096] ^= 2;
        assert!(
            !sound(fewer),
            "{output:?}: a page is not in the second bitmap"
        );
    }
}

#[test]
fn a_page_that_cannot_be_unpacked_makes_a_scanned_file_incomplete() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    write(&memory(), options(Output::Kdump(Compression::Zlib)), &path).unwrap();
    let mut whole = without_note(std::fs::read(&path).unwrap());
    let last = whole.len() - 20;
    whole[last] ^= 0x10;
    let dump = Dump::from_bytes(Box::new(whole)).unwrap();
    assert_eq!(dump.completeness(), Completeness::Complete);
    let report = analyse(&dump, AnalysisOptions { scan: true }).unwrap();
    assert_eq!(report.memory.unreadable, Some(1));
    assert!(!report.file.complete, "{:?}", report.file);
}

/// An ELF header and program headers: kind, virtual and physical address; each of a page in the file.
fn elf(phnum: u16, shoff: u64, segments: &[(u32, u64, u64)]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for short in [4_u16, 62, 1, 0] {
        file.extend(short.to_le_bytes());
    }
    for long in [0_u64, 64, shoff] {
        file.extend(long.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for short in [64_u16, 56, phnum, 0, 0, 0] {
        file.extend(short.to_le_bytes());
    }
    for (number, (kind, vaddr, paddr)) in (0..).zip(segments) {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        let offset: u64 = 4096 * (1 + number);
        for long in [offset, *vaddr, *paddr, 4096, 4096, 0] {
            file.extend(long.to_le_bytes());
        }
    }
    file.resize(4096 * (1 + segments.len()), 0);
    file
}

#[test]
fn what_is_no_vmcore_is_refused() {
    let memory = (1, 0xffff_8880_0000_0000, 0);
    let ours = elf(1, 0, &[memory]);
    assert!(sound(ours), "this one is a vmcore");
    let process = [(1, 0x40_0000, 0), (1, 0x60_0000, 0)];
    for (name, file) in [
        ("no program headers", elf(0, 0, &[])),
        ("no memory", elf(1, 0, &[(6, 0, 0)])),
        ("a count in no section", elf(0xffff, 0, &[memory])),
        ("the core of a process", elf(2, 0, &process)),
    ] {
        let opened = Dump::from_bytes(Box::new(file));
        let Err(DumpError::NotADump(_)) = opened else {
            panic!("{name}: {opened:?}");
        };
    }
    // A section that is there, but counts what would have fitted into the header.
    let file = elf(0xffff, 4096, &[memory]);
    assert!(Dump::from_bytes(Box::new(file)).is_err());
}
