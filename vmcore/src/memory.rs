//! Physical memory: the contents of a dump, and the source for writing one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::bytes::seek_data;
use crate::error::{DumpError, MemoryError};

/// Size of a page on x86_64, bytes.
pub const PAGE_BYTES: usize = 4096;
/// Size of a page, as an address.
pub(crate) const PAGE: u64 = PAGE_BYTES as u64;
/// Size of a page, for 32-bit fields.
pub(crate) const PAGE_U32: u32 = 4096;

/// A range of physical addresses: `start` inclusive, `end` exclusive, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysRange {
    /// First address.
    pub start: u64,
    /// First address after the range; never below `start`.
    pub end: u64,
}

impl PhysRange {
    /// Returns the size in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Returns true if the range is empty.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Returns true if the range contains the address.
    pub fn contains(&self, phys: u64) -> bool {
        (self.start..self.end).contains(&phys)
    }
}

/// The memory of one machine, by physical address.
///
/// Several threads may read at once.
pub trait PhysicalMemory: Send + Sync {
    /// Returns the machine's memory: sorted, disjoint ranges of whole pages.
    fn ranges(&self) -> &[PhysRange];

    /// Fills `buf` with the contents of `phys`, completely or not at all.
    ///
    /// # Errors
    ///
    /// The first page that cannot be read, and why.
    fn read(&self, phys: u64, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Returns the next address from `phys` on, at most `end`, that may be nonzero: everything
    /// before it is known to be zero without a read. Whole pages.
    fn next_data(&self, phys: u64, end: u64) -> u64 {
        let _ = end;
        phys
    }

    /// Returns the next address from `phys` on, at most `end`, of an available page: everything
    /// before it was omitted or is unknown. Whole pages.
    fn next_present(&self, phys: u64, end: u64) -> u64 {
        let _ = end;
        phys
    }
}

/// Converts any list to sorted, disjoint ranges of whole pages: rounds outwards, and joins adjacent ranges.
pub(crate) fn normalised(mut ranges: Vec<PhysRange>) -> Vec<PhysRange> {
    ranges.retain(|range| !range.is_empty());
    for range in &mut ranges {
        range.start &= !(PAGE - 1);
        range.end = range
            .end
            .checked_next_multiple_of(PAGE)
            .unwrap_or(!(PAGE - 1));
    }
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<PhysRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// A part of a memory file: its place in the machine.
#[derive(Clone, Copy, Debug)]
pub struct MemoryPart {
    /// Physical addresses; whole pages.
    pub range: PhysRange,
    /// Offset of its first byte in the file.
    pub file_offset: u64,
}

/// A guest's memory as a file that the host shares with it, such as QEMU's memory backends.
///
/// The file is read with pread(2), never mapped, so that truncation causes an error, not a signal.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    parts: Vec<MemoryPart>,
    ranges: Vec<PhysRange>,
}

impl MemoryFile {
    /// Opens a guest's memory in `file`; `parts` gives the location of each part.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] when a part is not in whole pages, is outside the file, or
    /// overlaps another.
    pub fn new(file: File, mut parts: Vec<MemoryPart>) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let invalid = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        parts.sort_unstable_by_key(|part| part.range.start);
        for part in &parts {
            let end = part.file_offset.checked_add(part.range.len());
            if (part.range.start | part.range.end | part.file_offset) % PAGE != 0 {
                return invalid("a part of the memory file is not in whole pages");
            }
            if end.is_none_or(|end| end > len) {
                return invalid("a part of the memory lies outside its file");
            }
        }
        if parts
            .windows(2)
            .any(|two| two[0].range.end > two[1].range.start)
        {
            return invalid("parts of the memory file overlap");
        }
        let ranges = normalised(parts.iter().map(|part| part.range).collect());
        Ok(Self {
            file,
            parts,
            ranges,
        })
    }

    /// Returns the memory of QEMU's PC machines: the first `low_bytes` from address 0 on, the rest above 4 GiB.
    ///
    /// # Errors
    ///
    /// See [`MemoryFile::new`].
    pub fn of_pc(file: File, low_bytes: u64) -> io::Result<Self> {
        const HIGH_START: u64 = 4 << 30;
        let len = file.metadata()?.len() & !(PAGE - 1);
        let low = len.min(low_bytes);
        let part = |start, bytes, file_offset| MemoryPart {
            range: PhysRange {
                start,
                end: start + bytes,
            },
            file_offset,
        };
        let mut parts = vec![part(0, low, 0)];
        if len > low {
            parts.push(part(HIGH_START, len - low, low));
        }
        Self::new(file, parts)
    }

    fn part_of(&self, phys: u64) -> Option<&MemoryPart> {
        let next = self.parts.partition_point(|part| part.range.end <= phys);
        self.parts
            .get(next)
            .filter(|part| part.range.contains(phys))
    }
}

impl PhysicalMemory for MemoryFile {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, mut phys: u64, mut buf: &mut [u8]) -> Result<(), MemoryError> {
        while !buf.is_empty() {
            let part = self.part_of(phys).ok_or(MemoryError::Absent { phys })?;
            let left = usize::try_from(part.range.end - phys).unwrap_or(usize::MAX);
            let (now, later) = buf.split_at_mut(left.min(buf.len()));
            let offset = part.file_offset + (phys - part.range.start);
            self.file
                .read_exact_at(now, offset)
                .map_err(|source| DumpError::Io { offset, source })?;
            phys += now.len() as u64;
            buf = later;
        }
        Ok(())
    }

    fn next_data(&self, phys: u64, end: u64) -> u64 {
        let Some(part) = self.part_of(phys) else {
            return phys;
        };
        let until = end.min(part.range.end);
        let offset = part.file_offset + (phys - part.range.start);
        let data = seek_data(&self.file, offset);
        let skipped = data.saturating_sub(offset);
        phys.saturating_add(skipped).min(until) & !(PAGE - 1)
    }
}
