//! Dump files: their format and contents.
//!
//! Nothing in a file is trusted. Every offset and length is checked before use, memory use is bounded whatever the
//! file says (about 64 MiB at most), and no content causes a panic.

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

/// Descriptors that are looked at for the packings that a file uses.
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
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Elf => "ELF core",
            Self::Kdump => "kdump-compressed",
            Self::FlattenedKdump => "kdump-compressed, flattened",
            Self::FlattenedElf => "ELF core, flattened",
        }
    }
}

/// Whether a dump has all that its writer meant to put into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// Nothing says otherwise.
    Complete,
    /// Incomplete, with the reason.
    Incomplete(&'static str),
}

/// Whether the checksum of a dump that kmorph wrote holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChecksumState {
    /// The dump has none: kmorph did not write it, or did not finish.
    None,
    /// Every byte is as it was written.
    Holds,
    /// The checksum does not match.
    Broken {
        /// CRC-32 recorded in the file.
        expected: u32,
        /// CRC-32 of its bytes.
        found: u32,
    },
    /// The file has not the length that it says.
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

/// An open dump. Its memory is read by physical address, by any number of threads.
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
            // Should it have become a FIFO meanwhile, opening it waits for nothing, and it is refused below.
            true => File::options()
                .read(true)
                .custom_flags(nix::libc::O_NONBLOCK)
                .open(path)?,
            false => kmorph_files::open_named(path, u64::MAX)?,
        };
        let file = FileBytes::new(file)?;
        Ok(Self::from_bytes(Box::new(file)))
    }

    /// Opens a dump that lies in `file`.
    ///
    /// # Errors
    ///
    /// If it is not a readable dump.
    pub fn from_bytes(file: Box<dyn Bytes>) -> Result<Self, DumpError> {
        let mut first = [0; 16];
        let length = file.len().min(16);
        // At most 16.
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

    /// Which format it has.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The contents of its notes.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// Length of the file, bytes; of a flattened one, of the file that it describes.
    pub fn file_bytes(&self) -> u64 {
        self.file().len()
    }

    /// Whether it has all that was meant to be in it. Of a kdump-compressed file every descriptor is read, 24 bytes
    /// for each page, and every page lies in the file when it is complete; whether a page can be unpacked shows when
    /// it is read.
    pub fn completeness(&self) -> Completeness {
        let missing = match &self.inner {
            _ if self.is_marked() => Some("its writer marked it as incomplete"),
            _ if self.flattened_unfinished => Some("the flattened file ends before its end mark"),
            Inner::Elf(elf) => elf.missing,
            Inner::Kdump(kdump) => kdump.missing(),
        };
        missing.map_or(Completeness::Complete, Completeness::Incomplete)
    }

    /// The writer said that it did not finish.
    fn is_marked(&self) -> bool {
        match &self.inner {
            Inner::Elf(elf) => elf.marked,
            Inner::Kdump(kdump) => kdump.marked,
        }
    }

    /// kmorph's note about this dump. Tools that make a dump from a dump copy its notes: a note that describes
    /// another file is ignored here (`None`).
    ///
    /// A note is of this file when the file has the length that the note says, or ends early: a file of kmorph's
    /// ends with a page, so one that was cut is not complete. A note that is damaged itself is of this file.
    pub fn own(&self) -> Option<&OwnNote> {
        let own = self.notes.own.as_ref()?;
        let flattened = matches!(self.format, Format::FlattenedKdump | Format::FlattenedElf);
        let here = !own.holds()
            || own.file_bytes.get() == self.file_bytes()
            || (own.file_bytes.get() > self.file_bytes()
                && self.completeness() != Completeness::Complete);
        (!flattened && here).then_some(own)
    }

    /// The kinds of pages that were left out, as makedumpfile's `-d`. ELF cores do not say, unless they are
    /// kmorph's, nor does a kdump-compressed file that kmorph did not finish.
    pub fn level(&self) -> Option<u32> {
        match (&self.inner, self.own()) {
            (Inner::Kdump(kdump), _) if kdump.marked && kdump.level == 0 => None,
            (Inner::Kdump(kdump), _) => Some(kdump.level),
            (Inner::Elf(_), own) => own.map(|own| u32::from(own.level_done.get())),
        }
    }

    /// The ways in which pages are packed, from a sample of them; none in ELF cores.
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

    /// The pages that are in the file, where it keeps count.
    pub fn pages_in_file(&self) -> Option<u64> {
        match &self.inner {
            Inner::Elf(_) => None,
            Inner::Kdump(kdump) => Some(kdump.pages_in_file()),
        }
    }

    /// The kernel's release that the file's header names, where it names one.
    pub fn header_release(&self) -> Option<String> {
        let Inner::Kdump(kdump) = &self.inner else {
            return None;
        };
        let name = kdump.utsname.get(UTSNAME_RELEASE)?;
        let end = name.iter().position(|byte| *byte == 0)?;
        let name = String::from_utf8_lossy(&name[..end]);
        (!name.is_empty()).then(|| name.into_owned())
    }

    /// The physical base of the kernel according to the file header; kdump-compressed files have it.
    pub fn header_phys_base(&self) -> Option<u64> {
        match &self.inner {
            Inner::Elf(_) => None,
            Inner::Kdump(kdump) => Some(kdump.phys_base),
        }
    }

    /// Reads the whole file and compares its checksum with what kmorph wrote into it.
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
