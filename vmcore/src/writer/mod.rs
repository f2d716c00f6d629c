//! Writes dumps, from a guest's memory or from another dump.
//!
//! ```text
//!           pass 1, by 128 MiB            pass 2, by 1 MiB                    end
//! memory ─▶ which pages go in ─▶ map ─┬─▶ read, find zeros, pack ─▶ file ─▶ header ─▶ sync ─▶ read back ─▶ rename
//!           (kernel's struct page)    └─▶ (several threads; each writes its own place)
//! ```
//!
//! The contents of the file depend only on the memory, not on the number of threads; helpers ([`shares`]) can change
//! the order of compressed pages. Memory use is bounded: a few MiB per thread, 12 bytes per 128 MiB of the machine,
//! and with helpers another 4 KiB per 128 MiB; the map is in a file.
//!
//! Until it is complete, the file is named `<path>.partial`, and its header says that it is incomplete.

mod chunks;
mod elf;
mod kdump;
mod page_map;
mod partial;
pub mod shares;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use zerocopy::IntoBytes;

use crate::checksum::Running;
use crate::compression::Compression;
use crate::dump::{ChecksumState, Dump, OwnNote, PrStatus, notes};
use crate::error::DumpError;
use crate::kernel::Kernel;
use crate::memory::PhysicalMemory;

use chunks::Halt;
use page_map::Filtered;
use partial::Partial;
pub use partial::partial_path;
use shares::Shares;

/// Maximum number of threads that write one dump.
pub const THREADS_MAX: usize = 16;
/// The maximum level: everything that can be omitted.
pub const LEVEL_MAX: u32 = 31;

/// The contents to write.
#[derive(Clone, Copy)]
pub struct Contents<'a> {
    /// The machine's memory.
    pub memory: &'a dyn PhysicalMemory,
    /// The kernel in it. Without one, only zero pages can be omitted, and readers find less information.
    pub kernel: Option<&'a Kernel<'a>>,
    /// The registers of the CPUs.
    pub cpus: &'a [PrStatus],
    /// Types of pages that the memory already lacks, if it is a dump: see [`crate::dump::Dump::level`].
    pub level_of_source: u32,
}

/// The format to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// An ELF core; zero pages are holes in the file.
    Elf,
    /// Kdump-compressed, with this method for each page. Snappy cannot be written.
    Kdump(Compression),
}

/// Options of the writer.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The format.
    pub output: Output,
    /// The dump level, 0 to 31, as makedumpfile's `-d`.
    pub level: u32,
    /// Number of threads, 1 to [`THREADS_MAX`].
    pub threads: usize,
    /// The time to record in the file, since 1970.
    pub time: Duration,
}

/// Monitors and stops the writer, from any thread.
#[derive(Default)]
pub struct Control {
    /// Set to stop; the partial file stays.
    pub stop: AtomicBool,
    /// Number of pages that are in the file or were omitted.
    pub pages_done: AtomicU64,
    /// Shares for helpers that read part of the memory.
    pub shares: Option<Arc<Shares>>,
    memory_read: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Control {
    /// Returns a control that calls `told`, on the writing thread, as soon as the memory is no longer read. The
    /// file is not complete then; the sync and the verification that follow can take long.
    pub fn telling_when_read(told: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            memory_read: Some(Box::new(told)),
            ..Self::default()
        }
    }

    fn tell_read(&self) {
        if let Some(told) = &self.memory_read {
            told();
        }
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("stop", &self.stop)
            .field("pages_done", &self.pages_done)
            .finish_non_exhaustive()
    }
}

/// The result of a write.
#[derive(Clone, Debug)]
pub struct Written {
    /// Counts, the actual level, the length and the checksum.
    pub note: OwnNote,
    /// Why pages were kept that should have been omitted.
    pub not_filtered: Option<String>,
    /// Number of sections of 128 MiB without page descriptions: all of their pages were kept.
    pub sections_kept: u64,
}

/// Why a dump was not written. A partial file stays, marked as incomplete.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A file with that name already exists.
    #[error("{path} exists already")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The requested dump cannot be written.
    #[error("cannot write such a dump: {0}")]
    Options(&'static str),
    /// The file cannot be created.
    #[error("cannot make {path}: {source}")]
    Create {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The disk is full.
    #[error("no space left for the dump; {path} has what was written, marked as incomplete")]
    NoRoom {
        /// The partial file.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{doing} {path}, which stays, marked as incomplete: {source}")]
    Io {
        /// The attempted action.
        doing: &'static str,
        /// The partial file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// [`Control::stop`] was set.
    #[error("stopped; {path} has what was written, marked as incomplete")]
    Stopped {
        /// The partial file.
        path: PathBuf,
    },
    /// The contents differ when they are read back.
    #[error("{path} does not read back as it was written: {reason}")]
    NotVerified {
        /// The partial file.
        path: PathBuf,
        /// The difference.
        reason: Difference,
    },
}

/// The difference between a file and the written contents.
#[derive(Debug, thiserror::Error)]
pub enum Difference {
    /// It is no longer a readable dump.
    #[error(transparent)]
    Unreadable(#[from] DumpError),
    /// Its checksum differs.
    #[error("its checksum does not match")]
    Checksum,
}

/// Writes a dump to `path`, which must not exist.
///
/// # Errors
///
/// Why no complete and verified file exists.
pub fn write(
    contents: Contents<'_>,
    options: Options,
    control: &Control,
    path: &Path,
) -> Result<Written, WriteError> {
    if options.level > LEVEL_MAX {
        return Err(WriteError::Options("the level is above 31"));
    }
    if options.output == Output::Kdump(Compression::Snappy) {
        return Err(WriteError::Options("writing Snappy is not supported"));
    }
    if contents.memory.ranges().is_empty() {
        return Err(WriteError::Options("no memory"));
    }
    let threads = options.threads.clamp(1, THREADS_MAX);
    let options = Options { threads, ..options };
    let partial = Partial::create(path)?;
    let written = match options.output {
        Output::Elf => elf::write(&contents, &options, control, &partial)?,
        Output::Kdump(packing) => kdump::write(&contents, &options, packing, control, &partial)?,
    };
    partial.sync()?;
    verify(&partial)?;
    partial.finish(path)?;
    Ok(written)
}

/// The notes of a dump, aligned to four bytes in the file.
struct NoteBytes {
    bytes: Vec<u8>,
    /// Offset of the contents of kmorph's own note.
    own: usize,
    /// The range of VMCOREINFO's text; empty without one.
    vmcoreinfo: std::ops::Range<usize>,
}

impl NoteBytes {
    fn of(contents: &Contents<'_>) -> Self {
        let mut bytes = Vec::new();
        for cpu in contents.cpus {
            notes::put_note(notes::CORE, notes::NT_PRSTATUS, cpu.as_bytes(), &mut bytes);
        }
        let mut vmcoreinfo = 0..0;
        if let Some(kernel) = contents.kernel {
            let text = kernel.info().text();
            notes::put_note(notes::VMCOREINFO, 0, text, &mut bytes);
            let start = bytes.len() - text.len().next_multiple_of(4);
            vmcoreinfo = start..start + text.len();
        }
        let own = [0; size_of::<OwnNote>()];
        notes::put_note(notes::KMORPH, 0, &own, &mut bytes);
        Self {
            own: bytes.len() - own.len(),
            bytes,
            vmcoreinfo,
        }
    }

    /// Fills in kmorph's note at the end.
    fn put_own(&mut self, own: &OwnNote) {
        self.bytes[self.own..][..size_of::<OwnNote>()].copy_from_slice(own.as_bytes());
    }
}

/// Counts from one thread's chunks.
#[derive(Clone, Copy, Default)]
struct Tally {
    zero: u64,
    unreadable: u64,
}

impl Tally {
    fn add(&mut self, chunk: &chunks::Read) {
        self.zero += chunk.zero;
        self.unreadable += chunk.unreadable;
    }
}

/// Returns the note about a finished file.
fn own_note(
    options: &Options,
    filtered: &Filtered,
    tallies: impl Iterator<Item = Tally>,
    checksum: &Running,
) -> OwnNote {
    let tally = tallies.fold(Tally::default(), |sum, tally| Tally {
        zero: sum.zero + tally.zero,
        unreadable: sum.unreadable + tally.unreadable,
    });
    // Levels have five bits.
    let level = |level: u32| u16::try_from(level).unwrap_or(0).into();
    let out = filtered.left_out;
    let note = OwnNote {
        version: notes::OWN_NOTE_VERSION.into(),
        level_wanted: level(options.level),
        level_done: level(filtered.level),
        finished: 1.into(),
        file_bytes: checksum.len().into(),
        crc32: checksum.value().into(),
        note_crc32: 0.into(),
        pages: filtered.pages.into(),
        free: out.free.into(),
        cache: out.cache.into(),
        cache_private: out.cache_private.into(),
        user: out.user.into(),
        unusable: out.unusable.into(),
        zero: tally.zero.into(),
        unreadable: tally.unreadable.into(),
    };
    OwnNote {
        note_crc32: note.own_crc32().into(),
        ..note
    }
}

/// Returns the error of a failed pass 1.
fn map_error(error: std::io::Error, partial: &Partial) -> WriteError {
    match error.kind() {
        std::io::ErrorKind::Interrupted => stopped(partial),
        _ => partial.error("writing the map of", error),
    }
}

fn stopped(partial: &Partial) -> WriteError {
    WriteError::Stopped {
        path: partial.path().to_owned(),
    }
}

/// Returns the error of a failed pass 2.
fn halted(halt: Halt, partial: &Partial) -> WriteError {
    match halt {
        // Another thread's error is reported instead, if there is one.
        Halt::Stopped | Halt::Elsewhere => stopped(partial),
        Halt::Failed(error) => partial.error("writing", error),
    }
}

/// Reads the file back as a reader would.
fn verify(partial: &Partial) -> Result<(), WriteError> {
    let differs = |reason| WriteError::NotVerified {
        path: partial.path().to_owned(),
        reason,
    };
    let dump = Dump::open(partial.path())
        .map_err(|source| partial.error("reading back", source))?
        .map_err(|error| differs(error.into()))?;
    match dump.check_checksum() {
        Ok(ChecksumState::Holds) => Ok(()),
        Ok(_) => Err(differs(Difference::Checksum)),
        Err(error) => Err(differs(error.into())),
    }
}
