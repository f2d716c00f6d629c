//! Small files that say that they are large, and large ones that hold little, take no time.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use kmorph_vmcore::analysis::{AnalysisOptions, Report, analyse};
use kmorph_vmcore::{Dump, DumpError};

/// Longest time of an analysis here: without optimisation, on a machine with other work.
const LONGEST: Duration = Duration::from_secs(10);

/// A program header: kind, offset, physical address, bytes in the file and in memory.
type Segment = (u32, u64, u64, u64, u64);

/// An ELF core of these headers, with zeros up to `bytes`.
fn elf(segments: &[Segment], bytes: usize) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for short in [4_u16, 62, 1, 0] {
        file.extend(short.to_le_bytes());
    }
    for long in [0_u64, 64, 0] {
        file.extend(long.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    let count = u16::try_from(segments.len()).unwrap();
    for short in [64_u16, 56, count, 0, 0, 0] {
        file.extend(short.to_le_bytes());
    }
    for (kind, offset, paddr, in_file, in_memory) in segments {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for long in [
            *offset,
            paddr + (0xffff_8880 << 32),
            *paddr,
            *in_file,
            *in_memory,
            0,
        ] {
            file.extend(long.to_le_bytes());
        }
    }
    file.resize(bytes.max(file.len()), 0);
    file
}

fn analysed(open: impl FnOnce() -> Result<Dump, DumpError>) -> Result<Report, DumpError> {
    let begun = Instant::now();
    let report = open().and_then(|dump| analyse(&dump, AnalysisOptions { scan: true }));
    let took = begun.elapsed();
    assert!(took < LONGEST, "it took {took:?}");
    report
}

#[test]
fn memory_that_only_the_headers_have_is_not_searched_page_by_page() {
    // A page in the file, and 60 TiB that were left out, in one piece and in 400.
    let one = [(1, 4096, 0, 4096, 60 << 40)];
    let many: Vec<Segment> = (0..400)
        .map(|n| match n {
            0 => (1, 0, 0, 4096, 4096),
            n => (1, 0, n << 37, 0, 1 << 36),
        })
        .collect();
    for segments in [&one[..], &many] {
        let file = elf(segments, 24 << 10);
        let report = analysed(|| Dump::from_bytes(Box::new(file))).unwrap();
        assert!(report.memory.bytes > 20 << 40);
        assert_eq!(report.memory.unreadable, Some(0));
    }
}

#[test]
fn the_same_bytes_are_not_the_memory_of_many_addresses() {
    let many: Vec<Segment> = (0..4000)
        .map(|n| (1, 0, n << 32, 1 << 20, 1 << 20))
        .collect();
    let refused = analysed(|| Dump::from_bytes(Box::new(elf(&many, 1 << 20)))).unwrap_err();
    assert!(refused.to_string().contains("same bytes"), "{refused}");
    let mut notes: Vec<Segment> = (0..30_000).map(|_| (4, 2 << 20, 0, 1 << 20, 0)).collect();
    notes.push((1, 0, 0, 4096, 4096));
    let refused = analysed(|| Dump::from_bytes(Box::new(elf(&notes, 4 << 20)))).unwrap_err();
    assert!(refused.to_string().contains("of notes"), "{refused}");
}

#[test]
fn holes_in_a_file_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    let bytes = 64 << 30;
    let file = elf(&[(1, 4096, 0, bytes, bytes)], 4096);
    let mut sparse = std::fs::File::create(&path).unwrap();
    sparse.write_all(&file).unwrap();
    sparse.set_len(4096 + bytes).unwrap();
    let report = analysed(|| Dump::open(&path).unwrap()).unwrap();
    assert!(report.file.complete);
    assert_eq!(report.memory.zero, Some(bytes / 4096));
}

/// A page that is its own page table, so that it is at every address; a log that is read there has 2^31 messages.
#[test]
fn a_log_that_says_it_is_endless_ends() {
    let mut info = "OSRELEASE=6.1\nNUMBER(phys_base)=0\nSYMBOL(swapper_pg_dir)=ffffffff80000000\n\
        SYMBOL(prb)=ffffffff80000000\nSIZE(prb_desc)=24\nSIZE(printk_info)=88\n"
        .to_owned();
    for member in [
        "atomic_long_t.counter",
        "printk_ringbuffer.desc_ring",
        "printk_ringbuffer.text_data_ring",
        "prb_desc_ring.tail_id",
        "prb_desc_ring.descs",
        "prb_desc_ring.infos",
        "prb_data_ring.data",
        "prb_desc.text_blk_lpos",
        "prb_desc.state_var",
        "prb_data_blk_lpos.begin",
        "prb_data_blk_lpos.next",
        "printk_info.text_len",
        "printk_info.caller_id",
        "printk_info.ts_nsec",
    ] {
        info += &format!("OFFSET({member})=0\n");
    }
    // The ring is at the address 31.
    info += "OFFSET(prb_desc_ring.head_id)=4\nOFFSET(prb_desc_ring.count_bits)=1\n\
        OFFSET(prb_data_ring.size_bits)=1\n";
    let length = u32::try_from(info.len()).unwrap();
    let note_bytes = 12 + 12 + u64::from(length.next_multiple_of(4));
    let mut file = elf(
        &[(4, 8192, 0, note_bytes, 0), (1, 4096, 0, 4096, 4096)],
        12 << 10,
    );
    // Present, to be written, of users, not cached: and 31, the size of the ring as a power of two.
    for entry in file[4096..8192].chunks_exact_mut(8) {
        entry.copy_from_slice(&0x1f_u64.to_le_bytes());
    }
    let mut note = Vec::new();
    for word in [11, length, 0] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"VMCOREINFO\0\0");
    note.extend(info.bytes());
    note.resize(usize::try_from(note_bytes).unwrap(), 0);
    file.truncate(8192);
    file.extend(note);
    let report = analysed(|| Dump::from_bytes(Box::new(file))).unwrap();
    assert!(report.log.unwrap().messages_lost > 1 << 30);
}

#[test]
fn nothing_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [&*fifo, Path::new("/dev/zero"), dir.path()] {
        let begun = Instant::now();
        let error = Dump::open(path).unwrap_err();
        assert!(begun.elapsed() < LONGEST, "{path:?}");
        assert!(error.to_string().contains("it is "), "{path:?}: {error}");
    }
}
