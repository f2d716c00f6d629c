//! Damaged VMCOREINFO: kmorph uses the kernel's copy in memory instead of the note, and reports nothing that it cannot
//! determine.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use kmorph_tests::crashed_guest::{CrashedGuest, Plan};
use kmorph_tests::program;
use kmorph_vmcore::Dump;
use kmorph_vmcore::analysis::{AnalysisOptions, Report, analyse};

/// Number of pages after the first section, of 128 MiB, in a guest of 192 MiB.
const BEHIND_FIRST_SECTION: u64 = (64 << 20) / 4096;

/// The damaged copies of VMCOREINFO.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Damaged {
    Note,
    NoteAndMemory,
}

/// A dump from QEMU, and the offsets of VMCOREINFO in the dump.
struct Noted {
    bytes: Vec<u8>,
    infos: Vec<usize>,
}

impl Noted {
    fn read(dump: &Path) -> Self {
        let bytes = std::fs::read(dump).unwrap();
        let begin = b"OSRELEASE=";
        let at = (0..bytes.len() - begin.len()).filter(|at| bytes[*at] == begin[0]);
        let infos: Vec<_> = at.filter(|at| bytes[*at..].starts_with(begin)).collect();
        // QEMU writes the notes before the memory.
        assert!(infos.len() >= 2, "VMCOREINFO is at {infos:?}");
        Self { bytes, infos }
    }

    /// Writes a copy of the dump with another byte after `text`.
    fn damaged(&self, guest: &CrashedGuest, text: &str, byte: u8, damaged: Damaged) -> PathBuf {
        let mut bytes = self.bytes.clone();
        let infos = match damaged {
            Damaged::Note => &self.infos[..1],
            Damaged::NoteAndMemory => &self.infos,
        };
        for info in infos {
            let page = &mut bytes[*info..*info + 4000];
            let at = page.windows(text.len()).position(|w| w == text.as_bytes());
            // Texts of other programs begin in the same way.
            if let Some(at) = at {
                assert_ne!(page[at + text.len()], byte);
                page[at + text.len()] = byte;
            }
        }
        assert!(bytes != self.bytes, "{text:?} is nowhere");
        let path = guest.path("damaged");
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn analysed(path: &Path) -> Report {
    let dump = Dump::open(path).unwrap().unwrap();
    analyse(&dump, AnalysisOptions::default()).unwrap()
}

/// Returns the command's output about the memory.
fn shown(path: &Path) -> String {
    let mut command = Command::new(program("kmorphctl"));
    let ran = command.args(["vmcore", "analyze"]).arg(path).output();
    let ran = ran.unwrap();
    assert!(ran.status.success(), "{ran:?}");
    String::from_utf8(ran.stdout).unwrap()
}

#[test]
fn what_a_damaged_vmcoreinfo_does_not_tell_is_not_made_up() {
    let guest = CrashedGuest::new(&Plan::small("6.1"));
    let dump = guest.dump("elf");
    let sound = analysed(&dump);
    let noted = Noted::read(&dump);
    let kinds = sound.memory.kinds.unwrap();
    for (text, byte) in [
        ("\nOFFSET(mem_section.section_mem_map)=", b'8'),
        ("\nSIZE(mem_section)=", b'9'),
        ("\nNUMBER(phys_base", b'x'),
        ("\nOFFSET(printk_ringbuffer.desc_ring", b'x'),
        ("\nSYMBOL(swapper_pg_dir)=ffffffff", b'e'),
    ] {
        let path = noted.damaged(&guest, text, byte, Damaged::Note);
        let report = analysed(&path);
        assert_eq!(report.memory.kinds, Some(kinds), "{text}");
        assert_eq!(report.log.unwrap().text, sound.log.as_ref().unwrap().text);
        let from = report.kernel.unwrap().vmcoreinfo;
        assert!(from.ends_with("the dump's note is not usable"), "{from}");
    }

    let text = "\nOFFSET(mem_section.section_mem_map)=";
    let path = noted.damaged(&guest, text, b'8', Damaged::NoteAndMemory);
    let report = analysed(&path);
    assert_eq!(report.memory.kinds, None);
    let why = report.problems.join("\n");
    assert!(why.contains("page types"), "{why}");
    let shown_of_none = shown(&path);
    assert!(!shown_of_none.contains("\nKIND"), "{shown_of_none}");

    // The place of the first section's description is fixed.
    let text = "\nSIZE(mem_section)=";
    let path = noted.damaged(&guest, text, b'9', Damaged::NoteAndMemory);
    let told = analysed(&path).memory.kinds.unwrap();
    assert_eq!(told.unknown, kinds.unknown + BEHIND_FIRST_SECTION);
    assert!(told.kernel <= kinds.kernel, "{told:?}, {kinds:?}");
    let row = format!("\nunknown            {}", told.unknown);
    let shown = shown(&path);
    assert!(shown.contains(&row), "no {row:?} in\n{shown}");
}
