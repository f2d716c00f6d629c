//! Notes: CPU registers, VMCOREINFO, and kmorph's note about its own dumps.

use core::mem::size_of;

use zerocopy::byteorder::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::NoteHeader;
use crate::bytes::{self, Bytes};
use crate::error::DumpError;

/// Maximum size of notes, bytes: enough for a note for each of 8192 CPUs and more than one VMCOREINFO.
pub(crate) const NOTES_MAX_BYTES: u64 = 16 << 20;
/// Size of the part at a file's beginning that is searched for kmorph's note if no header refers to it, bytes.
const OWN_SEARCH_BYTES: u64 = 1 << 20;
/// Maximum number of CPUs whose registers are kept.
const CPUS_MAX: usize = 8192;
/// Maximum size of VMCOREINFO, bytes: the kernel's own limit is one page.
pub(crate) const VMCOREINFO_MAX_BYTES: u64 = 64 << 10;

/// Type of the note with a CPU's registers.
pub(crate) const NT_PRSTATUS: u32 = 1;
/// Owner of that note.
pub(crate) const CORE: &[u8] = b"CORE\0";
/// Owner of the kernel's description of itself.
pub(crate) const VMCOREINFO: &[u8] = b"VMCOREINFO\0";
/// Owner of an image's build id, and the note's type.
const GNU: &[u8] = b"GNU\0";
const NT_GNU_BUILD_ID: u32 = 3;
/// Owner of QEMU's additional registers.
const QEMU: &[u8] = b"QEMU\0";
/// Owner of the note about omitted pages and the checksum.
pub(crate) const KMORPH: &[u8] = b"KMORPH\0";

/// A CPU's registers as the kernel or QEMU saves them (`struct elf_prstatus`).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct PrStatus {
    /// Signal, codes and masks: unused in a vmcore.
    pub signal: [u8; 32],
    /// Pid of the running task, or 0.
    pub pid: I32,
    /// Parent, group, session, and times: unused in a vmcore.
    pub others: [u8; 76],
    /// The general registers.
    pub registers: Registers,
    /// Nonzero if floating-point registers were saved too.
    pub fpvalid: U32,
    /// Must be 0.
    pub padding: U32,
}

/// The registers of an x86_64 CPU, in the order of `struct user_regs_struct`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
#[allow(missing_docs)] // their names say it
pub struct Registers {
    pub r15: U64,
    pub r14: U64,
    pub r13: U64,
    pub r12: U64,
    pub rbp: U64,
    pub rbx: U64,
    pub r11: U64,
    pub r10: U64,
    pub r9: U64,
    pub r8: U64,
    pub rax: U64,
    pub rcx: U64,
    pub rdx: U64,
    pub rsi: U64,
    pub rdi: U64,
    pub orig_rax: U64,
    pub rip: U64,
    pub cs: U64,
    pub rflags: U64,
    pub rsp: U64,
    pub ss: U64,
    pub fs_base: U64,
    pub gs_base: U64,
    pub ds: U64,
    pub es: U64,
    pub fs: U64,
    pub gs: U64,
}

/// The relevant part of QEMU's own note.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct QemuCpu {
    version: U32,
    bytes: U32,
    general: [U64; 18],
    /// Selector, limit, flags, padding, base.
    segments: [[U32; 6]; 10],
    control: [U64; 5],
}

/// kmorph's note about a dump that it wrote.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct OwnNote {
    /// Always 1.
    pub version: U16,
    /// Types of pages to omit, in the bits of makedumpfile's `-d`.
    pub level_wanted: U16,
    /// The omitted types; fewer if the kernel's page types could not be trusted.
    pub level_done: U16,
    /// 1 if the file was finished.
    pub finished: U16,
    /// Length of the file, bytes.
    pub file_bytes: U64,
    /// CRC-32 (ISO-HDLC) of the whole file, with the contents of this note taken as zeros.
    pub crc32: U32,
    /// CRC-32 of this note, with this field taken as zeros.
    pub note_crc32: U32,
    /// Number of the machine's pages.
    pub pages: U64,
    /// Number of pages omitted because they were free.
    pub free: U64,
    /// Number of pages omitted because they were cache without private data.
    pub cache: U64,
    /// Number of pages omitted because they were cache with private data.
    pub cache_private: U64,
    /// Number of pages omitted because they belonged to user processes.
    pub user: U64,
    /// Number of pages omitted because they were broken or offline.
    pub unusable: U64,
    /// Number of pages with only zeros: they are in the dump, but take no space.
    pub zero: U64,
    /// Number of pages that could not be read from the source; they read as zeros.
    pub unreadable: U64,
}

impl OwnNote {
    /// Returns whether this version wrote the note. False for zeros, which a file contains until it is finished,
    /// and for a newer version.
    fn is_ours(&self) -> bool {
        let written = self.as_bytes().iter().any(|byte| *byte != 0);
        written && (self.version.get() == OWN_NOTE_VERSION || !self.holds())
    }

    /// Returns true if the note itself is unchanged.
    pub(crate) fn holds(&self) -> bool {
        self.own_crc32() == self.note_crc32.get()
    }

    /// Returns the expected value of [`OwnNote::note_crc32`].
    pub(crate) fn own_crc32(&self) -> u32 {
        let unsigned = Self {
            note_crc32: 0.into(),
            ..*self
        };
        crc32fast::hash(unsigned.as_bytes())
    }
}

/// Version of [`OwnNote`].
pub(crate) const OWN_NOTE_VERSION: u16 = 1;

const _: () = {
    assert!(size_of::<PrStatus>() == 336);
    assert!(core::mem::offset_of!(PrStatus, registers) == 112);
    assert!(size_of::<QemuCpu>() == 432);
    assert!(size_of::<OwnNote>() == 88);
};

/// One CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Its registers.
    pub status: PrStatus,
    /// Its page table register, from QEMU's note.
    pub cr3: Option<u64>,
}

impl Cpu {
    /// Types of CORE's notes that only a process's core has: its auxiliary vector, its files.
    const OF_A_PROCESS: [u32; 2] = [6, 0x4649_4c45];
}

/// The contents of a dump's notes.
#[derive(Debug, Default)]
pub struct Notes {
    /// The CPUs, in the order of the notes.
    pub cpus: Vec<Cpu>,
    /// The kernel's description of itself, as text.
    pub vmcoreinfo: Option<Vec<u8>>,
    /// kmorph's note about this dump, or about the dump that this one was made from: see [`crate::Dump::own`].
    pub own: Option<OwnNote>,
    /// Offset of kmorph's note's contents in the file.
    pub own_offset: Option<u64>,
    /// Total size of the notes so far, bytes.
    taken_bytes: u64,
    /// True if a note exists that only the core of a process has.
    pub(crate) of_a_process: bool,
}

impl Notes {
    /// Reads the notes in `length` bytes from `offset` on, and adds their contents.
    ///
    /// # Errors
    ///
    /// When a note extends beyond the end, or the notes are too large.
    pub(crate) fn add(
        &mut self,
        file: &dyn Bytes,
        offset: u64,
        length: u64,
    ) -> Result<(), DumpError> {
        self.taken_bytes = self.taken_bytes.saturating_add(length);
        if self.taken_bytes > NOTES_MAX_BYTES {
            let what = "more than 16 MiB of notes";
            return Err(DumpError::Damaged { offset, what });
        }
        // At most NOTES_MAX_BYTES.
        let mut all = vec![0; usize::try_from(length).unwrap_or(0)];
        bytes::read(file, offset, &mut all, "notes")?;
        let mut rest = all.as_slice();
        while rest.len() >= size_of::<NoteHeader>() {
            let at = offset + (all.len() - rest.len()) as u64;
            let (note, behind) = Note::split(rest).ok_or(DumpError::Damaged {
                offset: at,
                what: "a note reaches beyond the notes",
            })?;
            self.take(&note, at, behind.len(), rest.len());
            rest = behind;
        }
        Ok(())
    }

    /// Searches for kmorph's note about this file if the headers do not lead to one, because the headers are
    /// then not those that kmorph wrote.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub(crate) fn search_own(&mut self, file: &dyn Bytes) -> Result<(), DumpError> {
        let length = file.len().min(OWN_SEARCH_BYTES);
        // At most OWN_SEARCH_BYTES.
        let mut first = vec![0; usize::try_from(length).unwrap_or(0)];
        bytes::read(file, 0, &mut first, "the beginning")?;
        for at in (0..first.len()).step_by(4) {
            let rest = &first[at..];
            if rest.starts_with(&OWN_NOTE_VERSION.to_le_bytes())
                && let Ok((own, _)) = OwnNote::read_from_prefix(rest)
                && own.file_bytes.get() == file.len()
                && own.holds()
            {
                self.own = Some(own);
                self.own_offset = Some(at as u64);
                return Ok(());
            }
        }
        Ok(())
    }

    fn take(&mut self, note: &Note<'_>, at: u64, behind: usize, rest: usize) {
        match note.name {
            CORE if note.kind == NT_PRSTATUS && self.cpus.len() < CPUS_MAX => {
                if let Ok((status, _)) = PrStatus::read_from_prefix(note.content) {
                    self.cpus.push(Cpu { status, cr3: None });
                }
            }
            CORE if Cpu::OF_A_PROCESS.contains(&note.kind) => self.of_a_process = true,
            QEMU => {
                // One per CPU, in the order of the CPUs, after all of the kernel's type.
                let cr3 = QemuCpu::read_from_prefix(note.content).map(|(cpu, _)| cpu.control[3]);
                let next = self.cpus.iter_mut().find(|cpu| cpu.cr3.is_none());
                if let (Ok(cr3), Some(cpu)) = (cr3, next) {
                    cpu.cr3 = Some(cr3.get());
                }
            }
            VMCOREINFO if note.content.len() as u64 <= VMCOREINFO_MAX_BYTES => {
                self.vmcoreinfo = Some(note.content.to_vec());
            }
            KMORPH => {
                if let Ok((own, _)) = OwnNote::read_from_prefix(note.content)
                    && own.is_ours()
                {
                    let padded = note.content.len().next_multiple_of(4);
                    self.own = Some(own);
                    self.own_offset = Some(at + (rest - behind - padded) as u64);
                }
            }
            _ => {}
        }
    }
}

struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    content: &'a [u8],
}

impl<'a> Note<'a> {
    /// Splits the first note off `bytes`.
    fn split(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (header, rest) = NoteHeader::read_from_prefix(bytes).ok()?;
        let name_bytes = usize::try_from(header.name_bytes.get()).ok()?;
        let content_bytes = usize::try_from(header.content_bytes.get()).ok()?;
        let (name, rest) = rest.split_at_checked(name_bytes.checked_next_multiple_of(4)?)?;
        // The last note may lack its padding.
        let padded = content_bytes.checked_next_multiple_of(4)?;
        let content = rest.get(..content_bytes)?;
        let behind = rest.get(padded..).unwrap_or_default();
        let note = Self {
            name: name.get(..name_bytes)?,
            kind: header.kind.get(),
            content,
        };
        Some((note, behind))
    }
}

/// Returns the build id in these notes, if any.
pub(crate) fn gnu_build_id(mut notes: &[u8]) -> Option<&[u8]> {
    while let Some((note, behind)) = Note::split(notes) {
        if note.name == GNU && note.kind == NT_GNU_BUILD_ID {
            return Some(note.content);
        }
        notes = behind;
    }
    None
}

/// Appends a note.
pub(crate) fn put_note(name: &[u8], kind: u32, content: &[u8], out: &mut Vec<u8>) {
    let bytes = |slice: &[u8]| U32::new(u32::try_from(slice.len()).unwrap_or(u32::MAX));
    let header = NoteHeader {
        name_bytes: bytes(name),
        content_bytes: bytes(content),
        kind: U32::new(kind),
    };
    out.extend(header.as_bytes());
    for part in [name, content] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(rip: u64) -> PrStatus {
        let mut status = PrStatus::read_from_bytes(&[0; size_of::<PrStatus>()]).unwrap();
        status.registers.rip = U64::new(rip);
        status
    }

    #[test]
    fn what_is_put_is_read() {
        let mut file = vec![0; 4];
        put_note(CORE, NT_PRSTATUS, status(7).as_bytes(), &mut file);
        put_note(b"ELSE\0", 9, b"12345", &mut file);
        put_note(VMCOREINFO, 0, b"OSRELEASE=6.1\n", &mut file);
        let own = OwnNote::read_from_bytes(&[1; size_of::<OwnNote>()]).unwrap();
        let own = OwnNote {
            version: U16::new(OWN_NOTE_VERSION),
            ..own
        };
        put_note(KMORPH, 0, own.as_bytes(), &mut file);
        let mut notes = Notes::default();
        notes.add(&file, 4, file.len() as u64 - 4).unwrap();
        assert_eq!(notes.cpus[0].status.registers.rip.get(), 7);
        assert_eq!(notes.vmcoreinfo.as_deref(), Some(&b"OSRELEASE=6.1\n"[..]));
        assert_eq!(notes.own, Some(own));
        let at = usize::try_from(notes.own_offset.unwrap()).unwrap();
        assert_eq!(&file[at..at + 88], own.as_bytes());
    }

    #[test]
    fn a_note_that_reaches_too_far_is_told_with_its_place() {
        let mut file = Vec::new();
        put_note(b"ELSE\0", 9, b"1234", &mut file);
        let second = file.len() as u64;
        put_note(b"ELSE\0", 9, b"1234", &mut file);
        file.truncate(file.len() - 1);
        let error = Notes::default()
            .add(&file, 0, file.len() as u64)
            .unwrap_err();
        assert!(
            matches!(error, DumpError::Damaged { offset, .. } if offset == second),
            "{error}"
        );
    }
}
