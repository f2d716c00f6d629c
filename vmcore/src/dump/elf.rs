//! ELF cores from /proc/vmcore, `makedumpfile -E`, QEMU and kmorph.

use super::layout::{
    ELF_IDENT, ELF_INCOMPLETE, EM_X86_64, ET_CORE, ElfHeader, PN_XNUM, PT_LOAD, PT_NOTE,
    ProgramHeader, SHT_NOBITS, SHT_NULL, SectionHeader,
};
use super::notes::Notes;
use crate::bytes::{self, Bytes};
use crate::error::{DumpError, MemoryError};
use crate::memory::{PAGE, PhysRange, PhysicalMemory, normalised};

/// Maximum number of segments: each one with memory takes 24 bytes here.
const SEGMENTS_MAX: u32 = 1 << 20;

/// Physical addresses of x86_64 have at most 52 bits.
const PHYS_END: u64 = 1 << 52;
/// Maximum memory of a machine, bytes: 64 TiB.
const MEMORY_MAX_BYTES: u64 = 64 << 40;

/// Memory in the file.
#[derive(Clone, Copy, Debug)]
struct Extent {
    phys: PhysRange,
    file_offset: u64,
}

/// An ELF core.
pub(crate) struct Elf {
    file: Box<dyn Bytes>,
    /// Sorted and disjoint; an extent may begin and end within a page.
    extents: Vec<Extent>,
    ranges: Vec<PhysRange>,
    /// Memory that is missing in the file although the headers describe it.
    pub(crate) missing: Option<&'static str>,
    /// Its writer marked it as incomplete.
    pub(crate) marked: bool,
}

impl Elf {
    /// Reads the headers and the notes.
    pub(crate) fn open(file: Box<dyn Bytes>) -> Result<(Self, Notes), DumpError> {
        let header: ElfHeader = bytes::read_struct(&*file, 0, "the ELF header")?;
        check(&header)?;
        let mut notes = Notes::default();
        let mut extents = Vec::new();
        let mut ranges = Vec::new();
        let mut loaded = Vec::new();
        let mut unheld = None;
        for (at, segment) in segments(&*file, &header)? {
            let damaged = |what| DumpError::Damaged { offset: at, what };
            let offset = segment.offset.get();
            let in_file = segment.filesz.get();
            match segment.kind.get() {
                PT_NOTE => notes.add(&*file, offset, in_file)?,
                // A segment with only a virtual address, as in /proc/kcore, does not describe memory.
                PT_LOAD if segment.paddr.get() == u64::MAX => {}
                PT_LOAD => {
                    loaded.push((segment.vaddr.get(), segment.paddr.get()));
                    let start = segment.paddr.get();
                    let memory = segment.memsz.get().max(in_file);
                    let end = start.checked_add(memory);
                    let end = end
                        .filter(|end| *end <= PHYS_END)
                        .ok_or_else(|| damaged("a segment beyond the address space"))?;
                    let file_end = offset.checked_add(in_file);
                    let file_end =
                        file_end.ok_or_else(|| damaged("a segment of impossible length"))?;
                    ranges.push(PhysRange { start, end });
                    let missing = file_end.saturating_sub(file.len()).min(in_file);
                    if missing > 0 {
                        unheld = Some("the file ends before its memory");
                    } else if in_file > 0 && !file.holds(offset, in_file) {
                        unheld = Some("no record of the flattened file holds a part of it");
                    }
                    let phys = PhysRange {
                        start,
                        end: start + (in_file - missing),
                    };
                    extents.push(Extent {
                        phys,
                        file_offset: offset,
                    });
                }
                _ => {}
            }
        }
        if !sections_are_there(&*file, &header)? {
            unheld = Some("the file ends before its sections do");
        }
        if notes.of_a_process || is_of_a_process(&loaded) {
            return Err(DumpError::NotADump("the core of a process"));
        }
        let marked = header.flags.get() & ELF_INCOMPLETE != 0;
        if ranges.is_empty() && !marked {
            return Err(DumpError::NotADump("an ELF core without memory"));
        }
        let ranges = normalised(ranges);
        if ranges.iter().map(PhysRange::len).sum::<u64>() > MEMORY_MAX_BYTES {
            return Err(DumpError::Unsupported("more than 64 TiB of memory"));
        }
        let extents = disjoint(extents);
        // Each byte of the file represents at most one byte of memory; otherwise a small file could describe any amount
        // of memory.
        if extents.iter().map(|e| e.phys.len()).sum::<u64>() > file.len() {
            return Err(DumpError::Damaged {
                offset: header.phoff.get(),
                what: "segments that have the same bytes of the file for different memory",
            });
        }
        let elf = Self {
            file,
            extents,
            ranges,
            missing: unheld,
            marked,
        };
        Ok((elf, notes))
    }

    /// Returns the underlying file.
    pub(crate) fn file(&self) -> &dyn Bytes {
        &*self.file
    }
}

/// Returns false if a section is beyond the end of the file. Sections do not describe memory, but QEMU places
/// them after it.
fn sections_are_there(file: &dyn Bytes, header: &ElfHeader) -> Result<bool, DumpError> {
    let start = header.shoff.get();
    if start == 0 || usize::from(header.shentsize.get()) != size_of::<SectionHeader>() {
        return Ok(true);
    }
    for index in 0..u64::from(header.shnum.get()) {
        let at = start.saturating_add(index * size_of::<SectionHeader>() as u64);
        let section: SectionHeader = match bytes::read_struct(file, at, "a section header") {
            Err(DumpError::CutOff { .. }) => return Ok(false),
            other => other?,
        };
        // The first section has no type.
        let in_file = !matches!(section.kind.get(), SHT_NULL | SHT_NOBITS);
        let end = section.offset.get().saturating_add(section.size.get());
        if in_file && end > file.len() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Returns whether the core is that of a process, which has only virtual addresses: all physical ones are 0. A
/// kernel has at most one segment at 0.
fn is_of_a_process(loaded: &[(u64, u64)]) -> bool {
    loaded.len() > 1
        && loaded.iter().all(|(_, paddr)| *paddr == 0)
        && loaded.windows(2).any(|two| two[0].0 != two[1].0)
}

fn check(header: &ElfHeader) -> Result<(), DumpError> {
    if !header.ident.starts_with(&ELF_IDENT) {
        return Err(DumpError::Unsupported(
            "an ELF file that is not 64-bit little-endian",
        ));
    }
    if header.kind.get() != ET_CORE {
        return Err(DumpError::NotADump("an ELF file, but not a core"));
    }
    if header.machine.get() != EM_X86_64 {
        return Err(DumpError::Unsupported("a machine other than x86_64"));
    }
    if usize::from(header.phentsize.get()) != size_of::<ProgramHeader>() {
        return Err(DumpError::Damaged {
            offset: 54,
            what: "program headers of another size",
        });
    }
    Ok(())
}

/// Returns the program headers, each with its offset in the file.
fn segments(file: &dyn Bytes, header: &ElfHeader) -> Result<Vec<(u64, ProgramHeader)>, DumpError> {
    let count = match header.phnum.get() {
        // An unfinished file may have none yet.
        0 if header.flags.get() & ELF_INCOMPLETE == 0 => {
            return Err(DumpError::NotADump("an ELF core without program headers"));
        }
        PN_XNUM => {
            let at = header.shoff.get();
            if at < size_of::<ElfHeader>() as u64 {
                return Err(DumpError::NotADump(
                    "an ELF core whose program headers are counted in a missing section",
                ));
            }
            let section: SectionHeader = bytes::read_struct(file, at, "the first section header")?;
            match section.info.get() {
                count if count >= u32::from(PN_XNUM) => count,
                _ => {
                    return Err(DumpError::Damaged {
                        offset: at,
                        what: "a section that counts too few program headers",
                    });
                }
            }
        }
        count => u32::from(count),
    };
    if count > SEGMENTS_MAX {
        return Err(DumpError::Unsupported(
            "an ELF core of more than a million segments",
        ));
    }
    let start = header.phoff.get();
    let each = size_of::<ProgramHeader>() as u64;
    if start.checked_add(u64::from(count) * each).is_none() {
        return Err(DumpError::Damaged {
            offset: 32,
            what: "program headers at an impossible place",
        });
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let at = start + index * each;
        segments.push((at, bytes::read_struct(file, at, "a program header")?));
    }
    Ok(segments)
}

/// Returns sorted extents without overlap. If two overlap (the kernel's text is in two segments of /proc/vmcore),
/// both hold the same memory, and the one that starts first is used.
fn disjoint(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.retain(|extent| !extent.phys.is_empty());
    extents.sort_unstable_by_key(|e| (e.phys.start, core::cmp::Reverse(e.phys.end)));
    let mut kept: Vec<Extent> = Vec::with_capacity(extents.len());
    for mut extent in extents {
        let covered = kept.last().map_or(0, |last| last.phys.end);
        if extent.phys.end <= covered {
            continue;
        }
        let skip = covered.saturating_sub(extent.phys.start);
        extent.phys.start += skip;
        extent.file_offset += skip;
        kept.push(extent);
    }
    kept
}

impl PhysicalMemory for Elf {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    /// Skips a hole in the file.
    fn next_data(&self, phys: u64, end: u64) -> u64 {
        let index = self.extents.partition_point(|e| e.phys.end <= phys);
        let extent = self.extents.get(index);
        let Some(extent) = extent.filter(|e| e.phys.contains(phys)) else {
            return phys;
        };
        let offset = extent.file_offset + (phys - extent.phys.start);
        let hole = self.file.next_data(offset).saturating_sub(offset);
        let data = phys.saturating_add(hole).min(extent.phys.end);
        (data & !(PAGE - 1)).clamp(phys, end.max(phys))
    }

    fn next_present(&self, phys: u64, end: u64) -> u64 {
        let index = self.extents.partition_point(|e| e.phys.end <= phys);
        let next = self
            .extents
            .get(index)
            .map_or(end, |e| e.phys.start & !(PAGE - 1));
        // A page with only its beginning in an extent counts too.
        let before = index.checked_sub(1).and_then(|i| self.extents.get(i));
        match before.is_some_and(|e| e.phys.end > phys & !(PAGE - 1)) {
            true => phys,
            false => next.clamp(phys, end.max(phys)),
        }
    }

    fn read(&self, mut phys: u64, mut buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut index = self.extents.partition_point(|e| e.phys.end <= phys);
        while !buf.is_empty() {
            let extent = self.extents.get(index).copied();
            let inside = extent.filter(|extent| extent.phys.contains(phys));
            let upto = match (inside, extent) {
                (Some(extent), _) => extent.phys.end,
                (None, Some(next)) => next.phys.start,
                (None, None) => u64::MAX,
            };
            let left = usize::try_from(upto - phys).unwrap_or(usize::MAX);
            let (now, later) = buf.split_at_mut(left.min(buf.len()));
            match inside {
                Some(extent) => {
                    let offset = extent.file_offset + (phys - extent.phys.start);
                    bytes::read(&*self.file, offset, now, "memory")?;
                    index += usize::from(phys + now.len() as u64 >= extent.phys.end);
                }
                None => self.fill_gap(phys, now, index)?,
            }
            // The addition does not overflow: the buffer's end was checked above.
            phys = phys.saturating_add(now.len() as u64);
            buf = later;
        }
        Ok(())
    }
}

impl Elf {
    /// Fills memory outside of all extents; `index` is the next extent. A page with a part in the dump (firmware cuts
    /// memory within pages) reads as zero elsewhere; any other page is an error.
    fn fill_gap(&self, phys: u64, gap: &mut [u8], index: usize) -> Result<(), MemoryError> {
        let last = phys.saturating_add(gap.len() as u64 - 1);
        let before = index.checked_sub(1).and_then(|i| self.extents.get(i));
        let after = self.extents.get(index);
        // A page is identified by the address of its first byte.
        let mut page = phys & !(PAGE - 1);
        while page <= last {
            let reached = before.is_some_and(|e| e.phys.end > page)
                || after.is_some_and(|e| e.phys.start - page < PAGE);
            if !reached {
                let phys = page.max(phys);
                let next = self.ranges.partition_point(|range| range.end <= phys);
                let known = self.ranges.get(next).is_some_and(|r| r.contains(phys));
                return Err(match known {
                    true => MemoryError::LeftOut { phys },
                    false => MemoryError::Absent { phys },
                });
            }
            let Some(next) = page.checked_add(PAGE) else {
                break;
            };
            page = next;
        }
        gap.fill(0);
        Ok(())
    }
}
