//! Files that must stay readable, and files that must stay as they are written.
//!
//! `golden/linux-*` are dumps of real kernels, panicked by sysrq, of which only the log, what leads to it and
//! the kernel's names were kept: they were written by this crate, so its formats are held to them.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::path::Path;

use kmorph_vmcore::analysis::{AnalysisOptions, analyse};
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::writer::Output;
use kmorph_vmcore::{ChecksumState, Dump};
use support::{Pages, options, write};

#[test]
fn dumps_of_real_kernels_are_read() {
    for (name, release, messages, first, crash_ns) in [
        (
            "linux-6.1.kdump-zstd",
            "6.1.0-56-cloud-amd64",
            336,
            "Linux version 6.1.0-56",
            2_362_878,
        ),
        (
            "linux-6.12.kdump-lzo",
            "6.12.95+deb12-cloud-amd64",
            359,
            "Linux version 6.12.95",
            2_973_945,
        ),
    ] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let dump = Dump::open(&directory.join(name)).unwrap().unwrap();
        assert_eq!(
            dump.check_checksum().unwrap(),
            ChecksumState::Holds,
            "{name}"
        );
        assert_eq!(dump.header_release().as_deref(), Some(release));
        let report = analyse(&dump, AnalysisOptions::default()).unwrap();
        assert_eq!(report.kernel.unwrap().release.as_deref(), Some(release));
        let log = report.log.unwrap();
        assert_eq!((log.messages, log.messages_lost), (messages, 0));
        assert!(
            log.text.starts_with(&format!("[    0.000000] {first}")),
            "{}",
            log.text
        );
        assert!(log.text.ends_with("  </TASK>\n"), "{}", log.text);
        assert_eq!(report.crash.panic.as_deref(), Some("sysrq triggered crash"));
        let panic = report.crash.events.last().unwrap();
        assert_eq!(panic.time_ns / 1000, crash_ns);
        assert!(
            panic
                .call_trace
                .iter()
                .any(|call| call.starts_with("sysrq_handle_crash+"))
        );
        // Neither pages nor symbols were kept: it says so.
        let problems = report.problems.join("\n");
        for what in ["the kernel's symbols", "page types"] {
            assert!(problems.contains(what), "{problems}");
        }
    }
}

/// A change of these is a change of what is written: readers must still take it.
#[test]
fn files_are_written_as_they_always_were() {
    let mut memory = Pages::new(&[(0, 4), (0x100, 600)]);
    memory.pages.insert(2, vec![7; 4096]);
    memory
        .pages
        .insert(0x102, (0..=255).cycle().take(4096).collect());
    let dir = tempfile::tempdir().unwrap();
    for (name, output, bytes, crc) in [
        ("elf", Output::Elf, ELF.0, ELF.1),
        ("none", Output::Kdump(Compression::None), NONE.0, NONE.1),
        ("lzo", Output::Kdump(Compression::Lzo), LZO.0, LZO.1),
    ] {
        let path = dir.path().join(name);
        let written = write(&memory, options(output), &path).unwrap();
        let found = (written.note.file_bytes.get(), written.note.crc32.get());
        assert_eq!(found, (bytes, crc), "{name}");
    }
}

const ELF: (u64, u32) = (2_478_080, 1_152_127_422);
const NONE: (u64, u32) = (43_168, 3_420_197_454);
const LZO: (u64, u32) = (31_212, 2_791_667_571);
