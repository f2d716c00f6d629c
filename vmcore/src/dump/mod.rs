//! Dump files: their format and contents.
//!
//! Files are untrusted: every offset and length is checked before use, memory use is bounded for any file (about
//! 64 MiB at most), and no content causes a panic.

mod elf;
mod flattened;
mod kdump;
pub(crate) mod layout;
pub(crate) mod notes;
mod whole;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::bytes::{self, Bytes, FileBytes};
use crate::checksum;
use crate::compression::Compression;
use crate::error::{DumpError, MemoryError};
use crate::memory::{PhysRange, PhysicalMemory};

use elf::Elf;
use flattened::Unflattened;
use kdump::Kdump;
use layout::{ELF_MAGIC, KDUMP_MAGIC, UTSNAME_RELEASE};
pub use notes::{Cpu, Notes, OwnNote, PrStatus, Registers};

/// Number of sampled descriptors to determine a file's compression methods.
const PACKINGS_SAMPLE: u64 = 64;

/// The format of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An ELF core.
    Elf,
    /// Kdump-compressed.
    Kdump,
    /// Kdump-compressed, flattened.
    FlattenedKdump,
    /// An ELF core, flattened.
    FlattenedElf,
}

impl Format {
    /// Returns its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Elf => "ELF core",
            Self::Kdump => "kdump-compressed",
            Self::FlattenedKdump => "kdump-compressed, flattened",
            Self::FlattenedElf => "ELF core, flattened",
        }
    }
}

/// Whether a dump contains everything that its writer intended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// No part is known to be missing.
    Complete,
    /// Incomplete, with the reason.
    Incomplete(&'static str),
}

/// Whether the checksum of kmorph's dump matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChecksumState {
    /// The dump has none: kmorph did not write it, or did not finish it.
    None,
    /// All bytes are unchanged.
    Holds,
    /// The checksum does not match.
    Broken {
        /// CRC-32 recorded in the file.
        expected: u32,
        /// CRC-32 of its bytes.
        found: u32,
    },
    /// The file's length differs from the recorded length.
    WrongLength {
        /// Length recorded in the file, bytes.
        expected: u64,
        /// Actual length, bytes.
        found: u64,
    },
}

enum Inner {
    Elf(Elf),
    Kdump(Box<Kdump>),
}

/// An open dump. Any number of threads can read its memory by physical address.
pub struct Dump {
    inner: Inner,
    notes: Notes,
    format: Format,
    flattened_unfinished: bool,
}

impl Dump {
    /// Opens the regular file or block device at `path`.
    ///
    /// # Errors
    ///
    /// The outer error if the file cannot be opened or is of the wrong type (a FIFO is refused without waiting for
    /// its other end); the inner error if it is not a readable dump.
    pub fn open(path: &Path) -> io::Result<Result<Self, DumpError>> {
        let is_device = std::fs::metadata(path)?.file_type().is_block_device();
        let file = match is_device {
            // If the path has become a FIFO in the meantime, the open does not block, and the FIFO is refused below.
            true => File::options()
                .read(true)
                .custom_flags(nix::libc::O_NONBLOCK)
                .open(path)?,
            false => kmorph_files::open_named(path, u64::MAX)?,
        };
        let file = FileBytes::new(file)?;
        Ok(Self::from_bytes(Box::new(file)))
    }

    /// Opens a dump stored in `file`.
    ///
    /// # Errors
    ///
    /// If it is not a readable dump.
    pub fn from_bytes(file: Box<dyn Bytes>) -> Result<Self, DumpError> {
        let mut first = [0; 16];
        let length = file.len().min(16);
        // At most 16 bytes.
        let first = &mut first[..usize::try_from(length).unwrap_or(0)];
        bytes::read(&*file, 0, first, "the first bytes")?;
        if flattened::is_flattened(first) {
            let (file, unfinished) = Unflattened::open(file)?;
            let mut magic = [0; 8];
            bytes::read(&file, 0, &mut magic, "the first bytes of the real file")?;
            return Self::plain(Box::new(file), &magic, true, unfinished);
        }
        let magic = first.to_vec();
        Self::plain(file, &magic, false, false)
    }

    fn plain(
        file: Box<dyn Bytes>,
        magic: &[u8],
        flattened: bool,
        flattened_unfinished: bool,
    ) -> Result<Self, DumpError> {
        let (inner, mut notes, format) = if magic.starts_with(&ELF_MAGIC) {
            let (elf, notes) = Elf::open(file)?;
            let format = if flattened {
                Format::FlattenedElf
            } else {
                Format::Elf
            };
            (Inner::Elf(elf), notes, format)
        } else if magic.starts_with(&KDUMP_MAGIC) {
            let (kdump, notes) = Kdump::open(file)?;
            let format = if flattened {
                Format::FlattenedKdump
            } else {
                Format::Kdump
            };
            (Inner::Kdump(Box::new(kdump)), notes, format)
        } else {
            return Err(DumpError::NotADump(
                "neither an ELF core nor a kdump-compressed file",
            ));
        };
        let dump = Self {
            inner,
            notes: Notes::default(),
            format,
            flattened_unfinished,
        };
        if notes.own.is_none() && !flattened {
            notes.search_own(dump.file())?;
        }
        Ok(Self { notes, ..dump })
    }

    /// Returns its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns the contents of its notes.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// Returns the length of the file in bytes; for a flattened file, the length of the file that it describes.
    pub fn file_bytes(&self) -> u64 {
        self.file().len()
    }

    /// Returns whether the dump is complete. For a kdump-compressed file this reads every descriptor, 24 bytes per
    /// page, and checks that every page is within the file; only a read of a page shows whether it can be unpacked.
    pub fn completeness(&self) -> Completeness {
        let missing = match &self.inner {
            _ if self.is_marked() => Some("its writer marked it as incomplete"),
            _ if self.flattened_unfinished => Some("the flattened file ends before its end mark"),
            Inner::Elf(elf) => elf.missing,
            Inner::Kdump(kdump) => kdump.missing(),
        };
        missing.map_or(Completeness::Complete, Completeness::Incomplete)
    }

    /// Returns whether the writer marked the dump as unfinished.
    fn is_marked(&self) -> bool {
        match &self.inner {
            Inner::Elf(elf) => elf.marked,
            Inner::Kdump(kdump) => kdump.marked,
        }
    }

    /// Returns kmorph's note about this dump. Tools that derive a dump from another one copy its notes; a
    /// note about another file is ignored here (`None`).
    ///
    /// A note belongs to this file if the file has the length in the note, or ends early: kmorph's files end
    /// with a page, so a truncated one is incomplete. A damaged note counts as belonging to this file.
    pub fn own(&self) -> Option<&OwnNote> {
        let own = self.notes.own.as_ref()?;
        let flattened = matches!(self.format, Format::FlattenedKdump | Format::FlattenedElf);
        let here = !own.holds()
            || own.file_bytes.get() == self.file_bytes()
            || (own.file_bytes.get() > self.file_bytes()
                && self.completeness() != Completeness::Complete);
        (!flattened && here).then_some(own)
    }

    /// Returns the types of omitted pages, as makedumpfile's `-d`. ELF cores do not record them, except
    /// kmorph's; neither does a kdump-compressed file that kmorph did not finish.
    pub fn level(&self) -> Option<u32> {
        match (&self.inner, self.own()) {
            (Inner::Kdump(kdump), _) if kdump.marked && kdump.level == 0 => None,
            (Inner::Kdump(kdump), _) => Some(kdump.level),
            (Inner::Elf(_), own) => own.map(|own| u32::from(own.level_done.get())),
        }
    }

    /// Returns the compression methods of the pages, from a sample; none for ELF cores.
    ///
    /// # Errors
    ///
    /// When a descriptor cannot be read.
    pub fn packings(&self) -> Result<Vec<Compression>, DumpError> {
        match &self.inner {
            Inner::Elf(_) => Ok(Vec::new()),
            Inner::Kdump(kdump) => {
                let mut packings = kdump.sample(PACKINGS_SAMPLE)?;
                packings.retain(|packing| *packing != Compression::None);
                Ok(packings)
            }
        }
    }

    /// Returns the number of pages in the file, if the file records it.
    pub fn pages_in_file(&self) -> Option<u64> {
        match &self.inner {
            Inner::Elf(_) => None,
            Inner::Kdump(kdump) => Some(kdump.pages_in_file()),
        }
    }

    /// Returns the kernel's release in the file header, if present.
    pub fn header_release(&self) -> Option<String> {
        let Inner::Kdump(kdump) = &self.inner else {
            return None;
        };
        let name = kdump.utsname.get(UTSNAME_RELEASE)?;
        let end = name.iter().position(|byte| *byte == 0)?;
        let name = String::from_utf8_lossy(&name[..end]);
        (!name.is_empty()).then(|| name.into_owned())
    }

    /// Returns the physical base of the kernel in the file header; only kdump-compressed files have it.
    pub fn header_phys_base(&self) -> Option<u64> {
        match &self.inner {
            Inner::Elf(_) => None,
            Inner::Kdump(kdump) => Some(kdump.phys_base),
        }
    }

    /// Reads the whole file and compares its checksum with the one that kmorph recorded.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn check_checksum(&self) -> Result<ChecksumState, DumpError> {
        let (Some(own), Some(at)) = (self.own(), self.notes.own_offset) else {
            return Ok(ChecksumState::None);
        };
        let (expected, found) = (own.note_crc32.get(), own.own_crc32());
        if expected != found {
            return Ok(ChecksumState::Broken { expected, found });
        }
        if own.finished.get() != 1 {
            return Ok(ChecksumState::None);
        }
        let (expected, found) = (own.file_bytes.get(), self.file_bytes());
        if expected != found {
            return Ok(ChecksumState::WrongLength { expected, found });
        }
        let (expected, found) = (own.crc32.get(), checksum::of_file(self.file(), at)?);
        Ok(match expected == found {
            true => ChecksumState::Holds,
            false => ChecksumState::Broken { expected, found },
        })
    }

    fn file(&self) -> &dyn Bytes {
        match &self.inner {
            Inner::Elf(elf) => elf.file(),
            Inner::Kdump(kdump) => kdump.file(),
        }
    }
}

impl std::fmt::Debug for Dump {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dump")
            .field("format", &self.format)
            .field("notes", &self.notes)
            .finish_non_exhaustive()
    }
}

impl PhysicalMemory for Dump {
    fn ranges(&self) -> &[PhysRange] {
        match &self.inner {
            Inner::Elf(elf) => elf.ranges(),
            Inner::Kdump(kdump) => kdump.ranges(),
        }
    }

    fn next_data(&self, phys: u64, end: u64) -> u64 {
        match &self.inner {
            Inner::Elf(elf) => elf.next_data(phys, end),
            Inner::Kdump(_) => phys,
        }
    }

    fn next_present(&self, phys: u64, end: u64) -> u64 {
        match &self.inner {
            Inner::Elf(elf) => elf.next_present(phys, end),
            Inner::Kdump(kdump) => kdump.next_present(phys, end),
        }
    }

    fn read(&self, phys: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        match &self.inner {
            Inner::Elf(elf) => elf.read(phys, buf),
            Inner::Kdump(kdump) => kdump.read(phys, buf),
        }
    }
}
