//! Writes ELF cores with the layout of /proc/vmcore: one segment per range of memory, at the address where the kernel
//! maps it, and segments for the kernel's image at its own address too. Zero pages are holes.
//!
//! A long range of omitted pages ends a segment; short ranges stay in it, as holes.

use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::{FromZeros, IntoBytes};

use super::chunks::{self, CHUNK_PAGES, Chunk, Read, Worker};
use super::page_map::{self, PageMap, WINDOW_PAGES};
use super::partial::Partial;
use super::{
    Contents, Control, NoteBytes, Options, Tally, WriteError, Written, halted, map_error, own_note,
};
use crate::checksum::{Pieces, Running};
use crate::dump::layout::{
    ELF_IDENT, ELF_INCOMPLETE, EM_X86_64, ET_CORE, ElfHeader, PT_LOAD, PT_NOTE, ProgramHeader,
};
use crate::kernel::START_KERNEL_MAP;
use crate::memory::{PAGE, PAGE_BYTES, PhysRange};

/// Minimum number of consecutive omitted pages that end a segment.
const SPLIT_PAGES: u64 = 256;
/// Maximum number of segments: ELF counts them in 16 bits, and readers scan them one by one.
const SEGMENTS_MAX: usize = 16_000;

/// Memory that is contiguous in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    /// First page.
    start: u64,
    /// Number of pages in the file, from the first on.
    in_file: u64,
    /// Number of the machine's pages from the first on, up to the next segment.
    pages: u64,
    offset: u64,
}

impl Segment {
    /// Returns the memory in the file with its offset, and the omitted memory after it. Omitted memory gets separate
    /// headers, with an offset after all other contents: makedumpfile 1.7 assumes that a segment has the same size in
    /// the file and in memory, and otherwise reads other pages, or beyond the file.
    fn stretches(&self) -> impl Iterator<Item = (PhysRange, Option<u64>)> {
        let range = |from: u64, upto: u64| PhysRange {
            start: (self.start + from) * PAGE,
            end: (self.start + upto) * PAGE,
        };
        let in_file = (range(0, self.in_file), Some(self.offset));
        let left_out = (range(self.in_file, self.pages), None);
        [in_file, left_out]
            .into_iter()
            .filter(|(range, _)| !range.is_empty())
    }
}

pub(super) fn write(
    contents: &Contents<'_>,
    options: &Options,
    control: &Control,
    partial: &Partial,
) -> Result<Written, WriteError> {
    let notes = NoteBytes::of(contents);
    // First write a header that marks the file as incomplete, in case of a failure.
    let mut head = Head {
        headers: Vec::new(),
        notes,
    };
    partial.write(&head.bytes(true), 0)?;
    let scratch = partial.scratch()?;
    let made = PageMap::make(
        &scratch,
        0,
        contents,
        options.level,
        options.threads,
        control,
    );
    let (map, filtered) = made.map_err(|error| map_error(error, partial))?;
    let mut segments = segments(contents, &map).map_err(|e| partial.error("planning", e))?;
    head.headers = program_headers(contents, &mut segments, head.notes.bytes.len());
    let data = head.data_start();
    let end = segments
        .last()
        .map_or(data, |s| s.offset + s.in_file * PAGE);
    partial.write(&head.bytes(true), 0)?;
    partial.set_len(end)?;
    let workers = (0..chunks::workers(options.threads, control))
        .map(|_| Ready::new(partial, &segments))
        .collect();
    let (shared, workers) = chunks::run(&map, contents, control, Pieces::default(), workers)
        .map_err(|halt| halted(halt, partial))?;
    control.tell_read();
    let mut checksum = Running::default();
    checksum.add(&head.bytes(false));
    checksum.add_piece(shared.all().value(), shared.all().len());
    let tallies = workers.iter().map(|worker| worker.tally);
    let note = own_note(options, &filtered, tallies, &checksum);
    head.notes.put_own(&note);
    partial.sync()?;
    partial.write(&head.bytes(false), 0)?;
    Ok(Written {
        note,
        not_filtered: filtered.not_filtered,
        sections_kept: filtered.sections_kept,
    })
}

/// The headers and notes.
struct Head {
    headers: Vec<ProgramHeader>,
    notes: NoteBytes,
}

impl Head {
    fn notes_start(count: usize) -> u64 {
        (size_of::<ElfHeader>() + count * size_of::<ProgramHeader>()) as u64
    }

    fn data_start(&self) -> u64 {
        let notes_end = Self::notes_start(self.headers.len()) + self.notes.bytes.len() as u64;
        notes_end.next_multiple_of(PAGE)
    }

    fn bytes(&self, incomplete: bool) -> Vec<u8> {
        let mut ident = [0; 16];
        ident[..ELF_IDENT.len()].copy_from_slice(&ELF_IDENT);
        // Sizes of structures below 64 KiB.
        let size = |bytes: usize| u16::try_from(bytes).unwrap_or(0).into();
        let header = ElfHeader {
            ident,
            kind: ET_CORE.into(),
            machine: EM_X86_64.into(),
            version: 1.into(),
            phoff: (size_of::<ElfHeader>() as u64).into(),
            flags: if incomplete { ELF_INCOMPLETE } else { 0 }.into(),
            ehsize: size(size_of::<ElfHeader>()),
            phentsize: size(size_of::<ProgramHeader>()),
            // At most three times SEGMENTS_MAX, and the notes.
            phnum: size(self.headers.len()),
            ..ElfHeader::new_zeroed()
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(self.headers.as_bytes());
        bytes.extend(&self.notes.bytes);
        bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
        bytes
    }
}

/// Returns the contiguous parts of the file; splits only as far as the limit on segments permits.
fn segments(contents: &Contents<'_>, map: &PageMap<'_>) -> io::Result<Vec<Segment>> {
    let mut split = SPLIT_PAGES;
    loop {
        if let Some(segments) = segments_with(contents, map, split)? {
            return Ok(segments);
        }
        split *= 2;
    }
}

/// Segments that end at `split` consecutive omitted pages; `None` if there are too many.
fn segments_with(
    contents: &Contents<'_>,
    map: &PageMap<'_>,
    split: u64,
) -> io::Result<Option<Vec<Segment>>> {
    let ranges = contents.memory.ranges();
    // Memory with more ranges than that needs one segment for each anyway.
    let most = SEGMENTS_MAX.max(ranges.len());
    let mut segments = Vec::new();
    let mut loaded: Option<(u64, page_map::Block)> = None;
    for range in ranges {
        let (first, behind) = (range.start / PAGE, range.end / PAGE);
        let mut current = Segment {
            start: first,
            in_file: 0,
            pages: 0,
            offset: 0,
        };
        for pfn in first..behind {
            let (window, within) = (pfn / WINDOW_PAGES, pfn % WINDOW_PAGES);
            if loaded.as_ref().is_none_or(|(number, _)| *number != window) {
                loaded = Some((window, map.block(window)?));
            }
            // A bit of the block.
            let within = usize::try_from(within).unwrap_or(0);
            let goes = loaded
                .as_ref()
                .is_some_and(|(_, block)| block[within / 8] & 1 << (within % 8) != 0);
            if !goes {
                continue;
            }
            let at = pfn - current.start;
            if at - current.in_file >= split {
                segments.push(Segment {
                    pages: at,
                    ..current
                });
                current = Segment {
                    start: pfn,
                    in_file: 1,
                    ..current
                };
            } else {
                current.in_file = at + 1;
            }
        }
        segments.push(Segment {
            pages: behind - current.start,
            ..current
        });
        if segments.len() > most {
            return Ok(None);
        }
    }
    Ok(Some(segments))
}

/// Returns the headers of all segments; assigns an offset in the file to each.
fn program_headers(
    contents: &Contents<'_>,
    segments: &mut [Segment],
    notes_bytes: usize,
) -> Vec<ProgramHeader> {
    let image = contents.kernel.and_then(|kernel| kernel.image());
    let direct_map = contents.kernel.and_then(|kernel| kernel.direct_map());
    let phys_base = contents.kernel.map_or(0, |kernel| kernel.phys_base());
    let in_image = |segment: &Segment| {
        let image = image?;
        let start = (segment.start * PAGE).max(image.start);
        let end = ((segment.start + segment.in_file) * PAGE).min(image.end);
        (start < end).then_some(PhysRange { start, end })
    };
    let images = segments.iter().filter_map(in_image).count();
    let stretches = segments.iter().map(|segment| segment.stretches().count());
    let count = 1 + images + stretches.sum::<usize>();
    let notes_start = Head::notes_start(count);
    let mut offset = (notes_start + notes_bytes as u64).next_multiple_of(PAGE);
    for segment in segments.iter_mut() {
        segment.offset = offset;
        offset += segment.in_file * PAGE;
    }
    let load = |phys: PhysRange, virt: u64, offset: u64, in_file: u64| ProgramHeader {
        kind: PT_LOAD.into(),
        // Read, write, execute, as in /proc/vmcore.
        flags: 7.into(),
        offset: offset.into(),
        vaddr: virt.into(),
        paddr: phys.start.into(),
        filesz: in_file.into(),
        memsz: phys.len().into(),
        align: 0.into(),
    };
    let mut headers = vec![ProgramHeader {
        kind: PT_NOTE.into(),
        offset: notes_start.into(),
        filesz: (notes_bytes as u64).into(),
        memsz: (notes_bytes as u64).into(),
        ..ProgramHeader::new_zeroed()
    }];
    headers.extend(segments.iter().filter_map(|segment| {
        let phys = in_image(segment)?;
        let virt = phys
            .start
            .wrapping_sub(phys_base)
            .wrapping_add(START_KERNEL_MAP);
        let offset = segment.offset + (phys.start - segment.start * PAGE);
        Some(load(phys, virt, offset, phys.len()))
    }));
    let stretches = segments.iter().flat_map(Segment::stretches);
    headers.extend(stretches.map(|(phys, place)| {
        let virt = direct_map.map_or(0, |base| base.wrapping_add(phys.start));
        match place {
            Some(place) => load(phys, virt, place, phys.len()),
            None => load(phys, virt, offset, 0),
        }
    }));
    headers
}

/// One thread's chunk.
struct Ready<'a> {
    partial: &'a Partial,
    segments: &'a [Segment],
    read: Read,
    /// First page of the chunk.
    start: u64,
    checksum: Running,
    tally: Tally,
}

impl<'a> Ready<'a> {
    fn new(partial: &'a Partial, segments: &'a [Segment]) -> Self {
        Self {
            partial,
            segments,
            read: Read::new(),
            start: 0,
            checksum: Running::default(),
            tally: Tally::default(),
        }
    }

    /// Returns the parts of the file that the chunk fills: pages of the chunk, and their offset.
    fn parts(&self) -> impl Iterator<Item = (std::ops::Range<usize>, u64)> {
        let (start, end) = (self.start, self.start + CHUNK_PAGES as u64);
        let first = self
            .segments
            .partition_point(|s| s.start + s.in_file <= start);
        self.segments[first..]
            .iter()
            .take_while(move |segment| segment.start < end)
            .filter(|segment| segment.in_file > 0)
            .map(move |segment| {
                let from = segment.start.max(start);
                let upto = (segment.start + segment.in_file).min(end);
                let place = segment.offset + (from - segment.start) * PAGE;
                // Pages of the chunk.
                let page = |pfn: u64| usize::try_from(pfn - start).unwrap_or(0);
                (page(from)..page(upto), place)
            })
    }
}

impl Worker<Pieces> for Ready<'_> {
    fn read(&mut self) -> &mut Read {
        &mut self.read
    }

    fn prepare(&mut self, chunk: &Chunk<'_>) -> io::Result<()> {
        self.start = chunk.start;
        let mut checksum = std::mem::take(&mut self.checksum);
        checksum.clear();
        for (pages, _) in self.parts() {
            for run in runs(&self.read.filled, pages) {
                match run {
                    Run::Filled(pages) => checksum.add(&self.read.bytes[bytes(&pages)]),
                    Run::Zero(pages) => checksum.add_zeros(pages.len() as u64 * PAGE),
                }
            }
        }
        self.checksum = checksum;
        Ok(())
    }

    fn place(&mut self, chunk: &Chunk<'_>, pieces: &mut Pieces) {
        pieces.add(chunk.number, self.checksum.value(), self.checksum.len());
    }

    fn write(&mut self) -> io::Result<()> {
        for (pages, place) in self.parts() {
            let first = pages.start;
            for run in runs(&self.read.filled, pages) {
                if let Run::Filled(pages) = run {
                    let at = place + (pages.start - first) as u64 * PAGE;
                    let bytes = &self.read.bytes[bytes(&pages)];
                    self.partial.file().write_all_at(bytes, at)?;
                }
            }
        }
        self.tally.add(&self.read);
        Ok(())
    }
}

/// A run of pages of the same kind.
enum Run {
    Filled(std::ops::Range<usize>),
    Zero(std::ops::Range<usize>),
}

fn runs(filled: &[bool], pages: std::ops::Range<usize>) -> impl Iterator<Item = Run> {
    let mut at = pages.start;
    std::iter::from_fn(move || {
        let part = filled.get(at..pages.end).filter(|part| !part.is_empty())?;
        let length = part.iter().take_while(|f| **f == part[0]).count();
        let run = at..at + length;
        at = run.end;
        Some(match part[0] {
            true => Run::Filled(run),
            false => Run::Zero(run),
        })
    })
}

fn bytes(pages: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    pages.start * PAGE_BYTES..pages.end * PAGE_BYTES
}
