//! Kdump-compressed files from makedumpfile, QEMU and kmorph.

use std::sync::Mutex;

use zerocopy::FromBytes;

use super::layout::{KDUMP_INCOMPLETE, KDUMP_VERSION, KdumpHeader, KdumpSubHeader, PageDescriptor};
use super::notes::{Notes, VMCOREINFO_MAX_BYTES};
use super::whole;
use crate::bytes::{self, Bytes};
use crate::compression::{self, Compression};
use crate::error::{DumpError, MemoryError};
use crate::memory::{PAGE, PAGE_BYTES, PAGE_U32, PhysRange, PhysicalMemory, normalised};

/// Maximum number of pages of a machine: 64 TiB. The index takes 8 bytes for every 32768 of them.
const PAGES_MAX: u64 = 1 << 34;
/// Number of pages per block of a bitmap.
pub(crate) const PAGES_PER_BLOCK: u64 = PAGE * 8;
/// Maximum size of a packed page, bytes: a page that does not shrink is stored unpacked, but QEMU may store slightly
/// more.
pub(super) const PACKED_MAX_BYTES: u32 = 2 * PAGE_U32;
/// Number of cached bitmap blocks, 4 KiB each: each reading thread works on a separate range.
const BLOCKS_KEPT: usize = 16;
/// Maximum number of separate memory ranges.
const RANGES_MAX: usize = 1 << 20;
/// Size of the sub-header in header versions 1 to 6, bytes.
const SUB_HEADER_BYTES: [usize; 6] = [16, 32, 48, 64, 80, 104];

/// The number and contents of a block of the bitmap.
type Kept = (u64, Box<[u8; PAGE_BYTES]>);

/// A kdump-compressed file.
pub(crate) struct Kdump {
    file: Box<dyn Bytes>,
    pub(super) places: Places,
    /// For each block of the bitmap: number of pages in the file before it.
    before: Vec<u64>,
    pub(super) ranges: Vec<PhysRange>,
    /// The most recently read blocks of the bitmap, at their number modulo [`BLOCKS_KEPT`].
    kept: Mutex<Vec<Option<Kept>>>,
    /// Types of the omitted pages, as makedumpfile's `-d`.
    pub(crate) level: u32,
    /// Its writer marked it as incomplete.
    pub(crate) marked: bool,
    pub(crate) phys_base: u64,
    pub(crate) utsname: [[u8; 65]; 6],
}

impl Kdump {
    /// Reads the headers, the notes and both bitmaps.
    pub(crate) fn open(file: Box<dyn Bytes>) -> Result<(Self, Notes), DumpError> {
        let header: KdumpHeader = bytes::read_struct(&*file, 0, "the kdump header")?;
        let sub = sub_header(&*file, &header)?;
        let places = Places::of(&*file, &header, &sub)?;
        let notes = read_notes(&*file, &sub)?;
        let ranges = memory_ranges(&*file, &places)?;
        let before = pages_before(&*file, &places)?;
        let kdump = Self {
            file,
            places,
            before,
            ranges,
            kept: Mutex::new(vec![None; BLOCKS_KEPT]),
            level: sub.dump_level.get(),
            marked: header.status.get() & KDUMP_INCOMPLETE != 0,
            phys_base: sub.phys_base.get(),
            utsname: header.utsname,
        };
        Ok((kdump, notes))
    }

    /// Returns the underlying file.
    pub(crate) fn file(&self) -> &dyn Bytes {
        &*self.file
    }

    /// Returns the part that is missing in the file; `None` if it is complete. Reads 24 bytes per page.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        whole::missing(self)
    }

    /// Returns the number of pages in the file.
    pub(crate) fn pages_in_file(&self) -> u64 {
        self.before.last().copied().unwrap_or(0)
    }

    /// Returns the compression methods of up to `count` descriptors, spread over all. Fails if one of them is not in
    /// the file.
    pub(crate) fn sample(&self, count: u64) -> Result<Vec<Compression>, DumpError> {
        let pages = self.pages_in_file();
        let mut seen = Vec::new();
        for step in 0..count.min(pages) {
            let descriptor = self.descriptor(step * pages / count.min(pages))?;
            if let Some(packing) = Compression::of_flags(descriptor.flags.get())
                && !seen.contains(&packing)
            {
                seen.push(packing);
            }
        }
        Ok(seen)
    }

    /// Returns the number of pages in the file before this one; `None` if the page is not in the file.
    fn rank(&self, pfn: u64) -> Result<Option<u64>, DumpError> {
        if pfn >= self.places.pages_end {
            return Ok(None);
        }
        let block = pfn / PAGES_PER_BLOCK;
        let within = usize::try_from(pfn % PAGES_PER_BLOCK).unwrap_or(0);
        let slot = usize::try_from(block).unwrap_or(0);
        // After a panic of another thread, each cache entry is still complete or empty.
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        let place = &mut kept[slot % BLOCKS_KEPT];
        let bits = match place {
            Some((number, bits)) if *number == block => bits,
            _ => {
                let mut bits = Box::new([0; PAGE_BYTES]);
                let at = self.places.second + block * PAGE;
                bytes::read(&*self.file, at, &mut bits[..], "the bitmap")?;
                &mut place.insert((block, bits)).1
            }
        };
        if bits[within / 8] & 1 << (within % 8) == 0 {
            return Ok(None);
        }
        let whole: u64 = count_ones(&bits[..within / 8]);
        let rest = bits[within / 8] & ((1 << (within % 8)) - 1);
        let before = self.before.get(slot).copied().unwrap_or(0);
        Ok(Some(before + whole + u64::from(rest.count_ones())))
    }

    fn descriptor(&self, rank: u64) -> Result<PageDescriptor, DumpError> {
        let at = self.places.descriptors + rank * size_of::<PageDescriptor>() as u64;
        bytes::read_struct(&*self.file, at, "a page's descriptor")
    }

    fn page(&self, pfn: u64, page: &mut [u8; PAGE_BYTES]) -> Result<(), MemoryError> {
        let Some(rank) = self.rank(pfn)? else {
            let phys = pfn.saturating_mul(PAGE);
            let next = self.ranges.partition_point(|range| range.end <= phys);
            let known = self.ranges.get(next).is_some_and(|r| r.contains(phys));
            return Err(match known {
                true => MemoryError::LeftOut { phys },
                false => MemoryError::Absent { phys },
            });
        };
        let descriptor = self.descriptor(rank)?;
        let damaged = |what| DumpError::Damaged {
            offset: self.places.descriptors + rank * size_of::<PageDescriptor>() as u64,
            what,
        };
        let length = descriptor.bytes.get();
        if length == 0 || length > PACKED_MAX_BYTES {
            return Err(damaged("a page of impossible length").into());
        }
        let packing = Compression::of_flags(descriptor.flags.get())
            .ok_or_else(|| damaged("a page with two compression flags"))?;
        let mut packed = [0; PACKED_MAX_BYTES as usize];
        let packed = &mut packed[..length as usize];
        let offset = descriptor.offset.get();
        bytes::read(&*self.file, offset, packed, "a page")?;
        compression::unpack(packing, packed, page)
            .map_err(|what| DumpError::Damaged { offset, what })?;
        Ok(())
    }
}

/// The offsets of the parts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    /// End of the described pages: the first page without a description.
    pub(super) pages_end: u64,
    /// Offset of the bitmap of the machine's pages.
    pub(super) first: u64,
    /// Offset of the bitmap of the pages in the file.
    pub(super) second: u64,
    /// Offset of the descriptors.
    pub(super) descriptors: u64,
    /// Number of relevant blocks of one bitmap.
    pub(super) blocks: u64,
}

impl Places {
    fn of(file: &dyn Bytes, header: &KdumpHeader, sub: &KdumpSubHeader) -> Result<Self, DumpError> {
        let damaged = |offset, what| Err(DumpError::Damaged { offset, what });
        let pages_end = match header.version.get() {
            6.. => sub.max_mapnr_64.get(),
            _ => u64::from(header.max_mapnr.get()),
        };
        if pages_end == 0 || pages_end > PAGES_MAX {
            return damaged(PAGE + 96, "an impossible number of pages");
        }
        let blocks = pages_end.div_ceil(PAGES_PER_BLOCK);
        let bitmap_blocks = u64::from(header.bitmap_blocks.get());
        let first = PAGE * (1 + u64::from(header.sub_header_blocks.get()));
        // Older files have only one bitmap, which serves as both.
        let second = match bitmap_blocks {
            both if both >= 2 * blocks => first + PAGE * (both / 2),
            one if one >= blocks => first,
            _ => return damaged(436, "bitmaps that are too short for the pages"),
        };
        let descriptors = first + PAGE * bitmap_blocks;
        if descriptors > file.len() {
            return Err(DumpError::CutOff {
                offset: first,
                what: "the bitmap",
                file_bytes: file.len(),
            });
        }
        Ok(Self {
            pages_end,
            first,
            second,
            descriptors,
            blocks,
        })
    }
}

fn sub_header(file: &dyn Bytes, header: &KdumpHeader) -> Result<KdumpSubHeader, DumpError> {
    let version = header.version.get();
    if !(1..=KDUMP_VERSION).contains(&version) {
        return Err(DumpError::Unsupported(
            "a kdump header of an unknown version",
        ));
    }
    if header.block_size.get() != PAGE_U32 {
        return Err(DumpError::Unsupported("a page size other than 4096 bytes"));
    }
    let length = usize::try_from(version - 1)
        .ok()
        .and_then(|index| SUB_HEADER_BYTES.get(index).copied())
        .unwrap_or(0);
    let mut raw = [0; size_of::<KdumpSubHeader>()];
    bytes::read(file, PAGE, &mut raw[..length], "the sub-header")?;
    let sub = KdumpSubHeader::read_from_bytes(&raw).map_err(|_| DumpError::Damaged {
        offset: PAGE,
        what: "the sub-header",
    })?;
    if sub.split.get() != 0 {
        return Err(DumpError::Unsupported(
            "one part of a dump that was split; `makedumpfile --reassemble` joins them",
        ));
    }
    Ok(sub)
}

fn read_notes(file: &dyn Bytes, sub: &KdumpSubHeader) -> Result<Notes, DumpError> {
    let mut notes = Notes::default();
    if sub.notes_bytes.get() > 0 {
        notes.add(file, sub.notes_offset.get(), sub.notes_bytes.get())?;
    }
    let (offset, length) = (sub.vmcoreinfo_offset.get(), sub.vmcoreinfo_bytes.get());
    if length > VMCOREINFO_MAX_BYTES {
        let what = "more than 64 KiB of VMCOREINFO";
        return Err(DumpError::Damaged { offset, what });
    }
    if length > 0 {
        // At most VMCOREINFO_MAX_BYTES.
        let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
        bytes::read(file, offset, &mut text, "VMCOREINFO")?;
        notes.vmcoreinfo = Some(text);
    }
    Ok(notes)
}

/// Calls `visit` with each block of a bitmap, several read at once.
pub(super) fn for_each_block(
    file: &dyn Bytes,
    start: u64,
    blocks: u64,
    mut visit: impl FnMut(u64, &[u8; PAGE_BYTES]) -> Result<(), DumpError>,
) -> Result<(), DumpError> {
    const AT_ONCE: usize = 64;
    let mut buf = vec![0; PAGE_BYTES * AT_ONCE];
    for first in (0..blocks).step_by(AT_ONCE) {
        let count = usize::try_from(blocks - first)
            .unwrap_or(AT_ONCE)
            .min(AT_ONCE);
        let part = &mut buf[..PAGE_BYTES * count];
        let at = start + first * PAGE;
        // A hole consists of zeros.
        match file.next_data(at) >= at + part.len() as u64 && at + part.len() as u64 <= file.len() {
            true => part.fill(0),
            false => bytes::read(file, at, part, "a bitmap")?,
        }
        for (block, bits) in (first..).zip(part.as_chunks::<PAGE_BYTES>().0) {
            visit(block, bits)?;
        }
    }
    Ok(())
}

/// Returns the memory that the bits of one block represent, in runs within 64-bit words.
fn runs(block: u64, bits: &[u8; PAGE_BYTES]) -> impl Iterator<Item = PhysRange> {
    let (words, _) = bits.as_chunks::<8>();
    let numbered = (block * PAGES_PER_BLOCK / 64..).zip(words);
    numbered.flat_map(|(number, word)| {
        let mut word = u64::from_le_bytes(*word);
        core::iter::from_fn(move || {
            if word == 0 {
                return None;
            }
            let low = word.trailing_zeros();
            let run = (word >> low).trailing_ones();
            let start = (number * 64 + u64::from(low)) * PAGE;
            let end = start + u64::from(run) * PAGE;
            word &= u64::MAX.checked_shl(low + run).unwrap_or(0);
            Some(PhysRange { start, end })
        })
    })
}

/// Returns whether `ranges`, which are sorted and disjoint, contain the memory that the bits of one block represent.
pub(super) fn is_within(block: u64, bits: &[u8; PAGE_BYTES], ranges: &[PhysRange]) -> bool {
    runs(block, bits).all(|run| {
        let next = ranges.partition_point(|range| range.end <= run.start);
        let range = ranges.get(next);
        range.is_some_and(|range| range.start <= run.start && run.end <= range.end)
    })
}

/// Returns the memory of the machine, from the first bitmap.
fn memory_ranges(file: &dyn Bytes, places: &Places) -> Result<Vec<PhysRange>, DumpError> {
    let mut ranges: Vec<PhysRange> = Vec::new();
    for_each_block(file, places.first, places.blocks, |block, bits| {
        for run in runs(block, bits) {
            match ranges.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => ranges.push(run),
            }
        }
        match ranges.len() > RANGES_MAX {
            true => Err(DumpError::Unsupported(
                "memory in more than a million pieces",
            )),
            false => Ok(()),
        }
    })?;
    Ok(normalised(ranges))
}

fn pages_before(file: &dyn Bytes, places: &Places) -> Result<Vec<u64>, DumpError> {
    let mut before = vec![0];
    let mut sum = 0;
    for_each_block(file, places.second, places.blocks, |_, bits| {
        sum += count_ones(bits);
        before.push(sum);
        Ok(())
    })?;
    Ok(before)
}

fn count_ones(bits: &[u8]) -> u64 {
    let (words, rest) = bits.as_chunks::<8>();
    let ones = |word: &[u8; 8]| u64::from(u64::from_le_bytes(*word).count_ones());
    let rest: u64 = rest.iter().map(|byte| u64::from(byte.count_ones())).sum();
    words.iter().map(ones).sum::<u64>() + rest
}

impl PhysicalMemory for Kdump {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn next_present(&self, phys: u64, end: u64) -> u64 {
        let mut pfn = phys / PAGE;
        while pfn < self.places.pages_end.min(end / PAGE) {
            let block = pfn / PAGES_PER_BLOCK;
            let at = usize::try_from(block).unwrap_or(0);
            let empty = self.before.get(at) == self.before.get(at + 1);
            match empty {
                true => pfn = (block + 1) * PAGES_PER_BLOCK,
                // A read of the page will report the error.
                false if !matches!(self.rank(pfn), Ok(None)) => return (pfn * PAGE).max(phys),
                false => pfn += 1,
            }
        }
        end.max(phys)
    }

    fn read(&self, mut phys: u64, mut buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut page = [0; PAGE_BYTES];
        while !buf.is_empty() {
            let within = usize::try_from(phys % PAGE).unwrap_or(0);
            let (now, later) = buf.split_at_mut((PAGE_BYTES - within).min(buf.len()));
            self.page(phys / PAGE, &mut page)?;
            now.copy_from_slice(&page[within..within + now.len()]);
            phys = phys.saturating_add(now.len() as u64);
            buf = later;
        }
        Ok(())
    }
}
