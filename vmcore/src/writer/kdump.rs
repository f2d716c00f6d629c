//! Writes kdump-compressed files; [`crate::dump::layout`] describes their layout.
//!
//! All zero pages share one compressed page, the first one.

use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::IntoBytes;

use super::chunks::{self, CHUNK_PAGES, Chunk, Read, Worker};
use super::page_map::{self, PageMap};
use super::partial::Partial;
use super::{
    Contents, Control, NoteBytes, Options, Tally, WriteError, Written, halted, map_error, own_note,
};
use crate::checksum::{Pieces, Running};
use crate::compression::{Compression, Packer};
use crate::dump::layout::{
    KDUMP_INCOMPLETE, KDUMP_MAGIC, KDUMP_VERSION, KdumpHeader, KdumpSubHeader, PageDescriptor,
    UTSNAME_RELEASE,
};
use crate::memory::{PAGE, PAGE_BYTES};

/// Size of one descriptor, bytes.
const DESCRIPTOR: u64 = size_of::<PageDescriptor>() as u64;

pub(super) fn write(
    contents: &Contents<'_>,
    options: &Options,
    packing: Compression,
    control: &Control,
    partial: &Partial,
) -> Result<Written, WriteError> {
    let mut head = Head::new(contents, options, packing);
    partial.write(&head.bytes(true, 0), 0)?;
    let bitmaps = head.blocks() * PAGE;
    let descriptors = bitmaps + 2 * page_map::blocks(contents) * PAGE;
    partial.set_len(descriptors)?;
    let file = partial.file();
    let made = PageMap::make(
        file,
        bitmaps,
        contents,
        options.level,
        options.threads,
        control,
    );
    let (map, filtered) = made.map_err(|error| map_error(error, partial))?;
    let zero_page = descriptors + map.pages_in_file() * DESCRIPTOR;
    let (shared, workers) = {
        let mut zeros = Vec::new();
        let mut packer = Packer::new(packing).map_err(|e| partial.error("preparing", e))?;
        let packed = packer.pack(&[0; PAGE_BYTES], &mut zeros);
        let packed = packed.map_err(|e| partial.error("packing for", e))?;
        partial.write(&zeros, zero_page)?;
        let mut data = Running::default();
        data.add(&zeros);
        let shared = Shared {
            next: zero_page + zeros.len() as u64,
            data,
            descriptors: Pieces::default(),
        };
        let zero = descriptor(zero_page, zeros.len(), packed);
        let workers = (0..chunks::workers(options.threads, control))
            .map(|_| Ready::new(partial, packing, descriptors, zero))
            .collect::<io::Result<Vec<_>>>();
        let workers = workers.map_err(|e| partial.error("preparing", e))?;
        chunks::run(&map, contents, control, shared, workers)
            .map_err(|halt| halted(halt, partial))?
    };
    control.tell_read();
    // In the order of the file: the part that is written last comes first, with its note as zeros.
    let mut checksum = Running::default();
    checksum.add(&head.bytes(false, filtered.level));
    add_file(&mut checksum, partial, bitmaps, descriptors)?;
    for piece in [shared.descriptors.all(), &shared.data] {
        checksum.add_piece(piece.value(), piece.len());
    }
    let tallies = workers.iter().map(|worker| worker.tally);
    let note = own_note(options, &filtered, tallies, &checksum);
    head.notes.put_own(&note);
    // Together with the rest of the file: from here on, readers may trust the file.
    partial.sync()?;
    partial.write(&head.bytes(false, filtered.level), 0)?;
    Ok(Written {
        note,
        not_filtered: filtered.not_filtered,
        sections_kept: filtered.sections_kept,
    })
}

/// Adds the bitmaps from the file, which were written in no particular order.
fn add_file(
    checksum: &mut Running,
    partial: &Partial,
    from: u64,
    upto: u64,
) -> Result<(), WriteError> {
    let mut buf = vec![0; 1 << 20];
    let mut at = from;
    while at < upto {
        let left = usize::try_from(upto - at).unwrap_or(usize::MAX);
        let part = &mut buf[..left.min(1 << 20)];
        partial
            .file()
            .read_exact_at(part, at)
            .map_err(|source| partial.error("reading back", source))?;
        checksum.add(part);
        at += part.len() as u64;
    }
    Ok(())
}

/// The headers and notes.
struct Head {
    header: KdumpHeader,
    sub: KdumpSubHeader,
    notes: NoteBytes,
}

impl Head {
    fn new(contents: &Contents<'_>, options: &Options, packing: Compression) -> Self {
        let notes = NoteBytes::of(contents);
        let sub_bytes = size_of::<KdumpSubHeader>() + notes.bytes.len();
        let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).into();
        let ranges = contents.memory.ranges();
        let end = ranges.last().map_or(0, |range| range.end / PAGE);
        let notes_offset = PAGE + size_of::<KdumpSubHeader>() as u64;
        let text = &notes.vmcoreinfo;
        let sub = KdumpSubHeader {
            phys_base: contents.kernel.map_or(0, |k| k.phys_base()).into(),
            dump_level: 0.into(),
            split: 0.into(),
            start_pfn: 0.into(),
            end_pfn: 0.into(),
            vmcoreinfo_offset: match text.is_empty() {
                true => 0,
                false => notes_offset + text.start as u64,
            }
            .into(),
            vmcoreinfo_bytes: (text.len() as u64).into(),
            notes_offset: notes_offset.into(),
            notes_bytes: (notes.bytes.len() as u64).into(),
            eraseinfo_offset: 0.into(),
            eraseinfo_bytes: 0.into(),
            start_pfn_64: 0.into(),
            end_pfn_64: 0.into(),
            max_mapnr_64: end.into(),
        };
        let header = KdumpHeader {
            signature: KDUMP_MAGIC,
            version: KDUMP_VERSION.into(),
            utsname: utsname(contents),
            padding: [0; 6],
            time_seconds: options.time.as_secs().into(),
            time_microseconds: u64::from(options.time.subsec_micros()).into(),
            status: packing.flag().into(),
            block_size: small(PAGE),
            sub_header_blocks: small(sub_bytes.div_ceil(PAGE_BYTES) as u64),
            bitmap_blocks: small(2 * page_map::blocks(contents)),
            max_mapnr: small(end),
            total_ram_blocks: 0.into(),
            device_blocks: 0.into(),
            written_blocks: 0.into(),
            current_cpu: 0.into(),
            cpus: small(contents.cpus.len().max(1) as u64),
        };
        Self { header, sub, notes }
    }

    /// Returns its size in blocks.
    fn blocks(&self) -> u64 {
        1 + u64::from(self.header.sub_header_blocks.get())
    }

    fn bytes(&self, incomplete: bool, level: u32) -> Vec<u8> {
        let mut header = self.header;
        if incomplete {
            header.status = (header.status.get() | KDUMP_INCOMPLETE).into();
        }
        let mut sub = self.sub;
        sub.dump_level = level.into();
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(PAGE_BYTES, 0);
        bytes.extend(sub.as_bytes());
        bytes.extend(&self.notes.bytes);
        bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
        bytes
    }
}

/// Returns the kernel's names: from its memory, or only the release from VMCOREINFO.
fn utsname(contents: &Contents<'_>) -> [[u8; 65]; 6] {
    let mut names = [[0; 65]; 6];
    let Some(kernel) = contents.kernel else {
        return names;
    };
    let info = kernel.info();
    if let (Ok(at), Ok(offset)) = (
        info.symbol("init_uts_ns"),
        info.offset("uts_namespace.name"),
    ) && kernel
        .read(at.wrapping_add(offset), names.as_flattened_mut())
        .is_ok()
    {
        return names;
    }
    let release = info.release().unwrap_or_default().as_bytes();
    for (place, name) in [
        (0, &b"Linux"[..]),
        (UTSNAME_RELEASE, release),
        (4, b"x86_64"),
    ] {
        let length = name.len().min(64);
        names[place] = [0; 65];
        names[place][..length].copy_from_slice(&name[..length]);
    }
    names
}

fn descriptor(offset: u64, bytes: usize, packing: Compression) -> PageDescriptor {
    PageDescriptor {
        offset: offset.into(),
        // At most a page.
        bytes: u32::try_from(bytes).unwrap_or(u32::MAX).into(),
        flags: packing.flag().into(),
        page_flags: 0.into(),
    }
}

/// Shared state of the threads: the next place in the file, and the checksums so far.
struct Shared {
    next: u64,
    data: Running,
    descriptors: Pieces,
}

/// One thread's chunk.
struct Ready<'a> {
    partial: &'a Partial,
    packer: Packer,
    read: Read,
    /// Packed pages, concatenated.
    packed: Vec<u8>,
    /// Descriptors of the pages for the file; offsets count from the chunk's beginning until the chunk has its place.
    descriptors: Vec<PageDescriptor>,
    /// Descriptors of zero pages, which have their final offset.
    placed: Vec<bool>,
    /// Checksum of the packed pages.
    checksum: Running,
    zero: PageDescriptor,
    descriptors_start: u64,
    descriptors_at: u64,
    packed_at: u64,
    tally: Tally,
}

impl<'a> Ready<'a> {
    fn new(
        partial: &'a Partial,
        packing: Compression,
        descriptors_start: u64,
        zero: PageDescriptor,
    ) -> io::Result<Self> {
        Ok(Self {
            partial,
            packer: Packer::new(packing)?,
            read: Read::new(),
            packed: Vec::new(),
            descriptors: Vec::new(),
            placed: Vec::new(),
            checksum: Running::default(),
            zero,
            descriptors_start,
            descriptors_at: 0,
            packed_at: 0,
            tally: Tally::default(),
        })
    }
}

impl Worker<Shared> for Ready<'_> {
    fn read(&mut self) -> &mut Read {
        &mut self.read
    }

    fn prepare(&mut self, chunk: &Chunk<'_>) -> io::Result<()> {
        self.packed.clear();
        self.descriptors.clear();
        self.placed.clear();
        self.descriptors_at = self.descriptors_start + chunk.rank * DESCRIPTOR;
        for page in 0..CHUNK_PAGES {
            if !chunk.goes(page) {
                continue;
            }
            let filled = self.read.filled[page];
            self.placed.push(!filled);
            if !filled {
                self.descriptors.push(self.zero);
                continue;
            }
            let start = self.packed.len();
            let bytes = &self.read.bytes[page * PAGE_BYTES..][..PAGE_BYTES];
            let packing = self.packer.pack(bytes, &mut self.packed)?;
            let length = self.packed.len() - start;
            self.descriptors
                .push(descriptor(start as u64, length, packing));
        }
        self.checksum.clear();
        self.checksum.add(&self.packed);
        Ok(())
    }

    fn place(&mut self, chunk: &Chunk<'_>, shared: &mut Shared) {
        self.packed_at = shared.next;
        shared.next += self.packed.len() as u64;
        for (descriptor, placed) in self.descriptors.iter_mut().zip(&self.placed) {
            if !placed {
                descriptor.offset = (descriptor.offset.get() + self.packed_at).into();
            }
        }
        let packed = &self.checksum;
        shared.data.add_piece(packed.value(), packed.len());
        let descriptors = self.descriptors.as_bytes();
        let crc = crc32fast::hash(descriptors);
        let length = descriptors.len() as u64;
        shared.descriptors.add(chunk.number, crc, length);
    }

    fn write(&mut self) -> io::Result<()> {
        let file = self.partial.file();
        file.write_all_at(&self.packed, self.packed_at)?;
        file.write_all_at(self.descriptors.as_bytes(), self.descriptors_at)?;
        self.tally.add(&self.read);
        Ok(())
    }
}
