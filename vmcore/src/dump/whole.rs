//! Checks that a kdump-compressed file contains everything it refers to: the bitmaps, a descriptor for each page, and
//! each page.

use zerocopy::FromBytes;

use super::kdump::{Kdump, PACKED_MAX_BYTES, Places, for_each_block};
use super::layout::PageDescriptor;
use crate::bytes::{self, Bytes};
use crate::compression::{self, Compression};
use crate::error::DumpError;
use crate::memory::{PAGE_BYTES, PAGE_U32};

/// Number of descriptors per read: 96 KiB.
const AT_ONCE: u64 = 4096;
/// Size of one descriptor, bytes.
const DESCRIPTOR_BYTES: usize = size_of::<PageDescriptor>();

const ENDS: &str = "the file ends before its memory";
const NOT_WRITTEN: &str = "no record of the flattened file holds a part of it";
const NO_DESCRIPTOR: &str = "the descriptor of a page is invalid";
const NO_FIT: &str = "the pages do not start where their descriptors end";
const ASTRAY: &str = "two pages overlap, or something lies between them";
const MORE_THAN_MEMORY: &str = "it has pages where the machine has no memory";
const UNREADABLE: &str = "a part of the file cannot be read";

/// Returns the part that is missing in the file; `None` if it is complete. Reads every descriptor: 24 bytes per page.
pub(super) fn missing(kdump: &Kdump) -> Option<&'static str> {
    match bitmaps(kdump).and_then(|()| pages(kdump)) {
        Ok(()) => None,
        Err(Missing::What(what)) => Some(what),
        Err(Missing::Read(DumpError::CutOff { .. })) => Some(ENDS),
        Err(Missing::Read(_)) => Some(UNREADABLE),
    }
}

enum Missing {
    What(&'static str),
    Read(DumpError),
}

impl From<DumpError> for Missing {
    fn from(error: DumpError) -> Self {
        Self::Read(error)
    }
}

/// Checks that these bytes of the file exist.
fn held(file: &dyn Bytes, offset: u64, length: u64) -> Result<(), Missing> {
    match offset.checked_add(length) {
        Some(end) if end > file.len() => Err(Missing::What(ENDS)),
        Some(_) if file.holds(offset, length) => Ok(()),
        Some(_) => Err(Missing::What(NOT_WRITTEN)),
        None => Err(Missing::What(NO_DESCRIPTOR)),
    }
}

/// Checks that the bitmaps exist, and that the file has no page that the machine does not have.
fn bitmaps(kdump: &Kdump) -> Result<(), Missing> {
    let Places {
        first,
        second,
        blocks,
        descriptors,
        ..
    } = kdump.places;
    held(kdump.file(), first, descriptors.saturating_sub(first))?;
    if first == second {
        return Ok(());
    }
    let mut more = false;
    let ranges = &kdump.ranges;
    for_each_block(kdump.file(), second, blocks, |block, bits| {
        more |= !super::kdump::is_within(block, bits, ranges);
        Ok(())
    })?;
    match more {
        true => Err(Missing::What(MORE_THAN_MEMORY)),
        false => Ok(()),
    }
}

/// Checks that each page of the second bitmap has a descriptor, and is in the file.
fn pages(kdump: &Kdump) -> Result<(), Missing> {
    let count = kdump.pages_in_file();
    let bytes = count.checked_mul(DESCRIPTOR_BYTES as u64);
    let bytes = bytes.ok_or(Missing::What(NO_DESCRIPTOR))?;
    let start = kdump.places.descriptors;
    held(kdump.file(), start, bytes)?;
    let mut tiles = Tiles {
        first: start + bytes,
        lowest: u64::MAX,
        end: 0,
        edges: 0,
        zeros: None,
    };
    let mut buf = Vec::new();
    let mut done = 0;
    while done < count {
        let now = AT_ONCE.min(count - done);
        // At most AT_ONCE.
        buf.resize(usize::try_from(now).unwrap_or(0) * DESCRIPTOR_BYTES, 0);
        let at = start + done * DESCRIPTOR_BYTES as u64;
        bytes::read(kdump.file(), at, &mut buf, "descriptors")?;
        for raw in buf.chunks_exact(DESCRIPTOR_BYTES) {
            let descriptor = PageDescriptor::read_from_bytes(raw);
            let descriptor = descriptor.map_err(|_| Missing::What(NO_DESCRIPTOR))?;
            tiles.take(kdump.file(), &descriptor)?;
        }
        done += now;
    }
    if count == 0 {
        return Ok(());
    }
    tiles.leave_no_gap()?;
    match begins_at(kdump.file(), tiles.first, tiles.lowest)? {
        true => Ok(()),
        false => Err(Missing::What(NO_FIT)),
    }
}

/// Returns whether the pages start at `first`, at the end of their descriptors. The shared zero page precedes the
/// others; it exists even if no descriptor refers to it.
fn begins_at(file: &dyn Bytes, first: u64, lowest: u64) -> Result<bool, Missing> {
    let between = lowest.saturating_sub(first);
    if between == 0 || between > u64::from(PACKED_MAX_BYTES) {
        return Ok(between == 0);
    }
    // At most PACKED_MAX_BYTES.
    let mut packed = vec![0; usize::try_from(between).unwrap_or(0)];
    bytes::read(file, first, &mut packed, "a page")?;
    let mut page = [0; PAGE_BYTES];
    Ok(Compression::ALL.into_iter().any(|packing| {
        let unpacked = compression::unpack(packing, &packed, &mut page);
        unpacked.is_ok() && page.iter().all(|byte| *byte == 0)
    }))
}

/// The layout of the pages: makedumpfile, QEMU and kmorph place the first one at the end of the descriptors, and leave
/// no gap between two of them. Their order is arbitrary: several threads or kernels may have written them. This check
/// therefore finds a changed bit of the bitmap, which would shift all following pages to other addresses, and a changed
/// offset or length of a page.
struct Tiles {
    /// End of the page descriptors.
    first: u64,
    lowest: u64,
    /// End of the last page.
    end: u64,
    /// Sum of the hashes of the pages' start offsets, minus those of their end offsets. If one page begins at the end
    /// of another, both hashes cancel out: only the first start and the last end remain. So no list of all pages is
    /// needed.
    edges: u64,
    /// Length of the page at `first`: the only page that descriptors share, the zero page.
    zeros: Option<u64>,
}

impl Tiles {
    fn take(&mut self, file: &dyn Bytes, descriptor: &PageDescriptor) -> Result<(), Missing> {
        let length = descriptor.bytes.get();
        let offset = descriptor.offset.get();
        let packing = Compression::of_flags(descriptor.flags.get());
        let sensible = match packing {
            None => false,
            Some(Compression::None) => length == PAGE_U32,
            Some(_) => (1..=PACKED_MAX_BYTES).contains(&length),
        };
        if !sensible || offset < self.first {
            return Err(Missing::What(NO_DESCRIPTOR));
        }
        let length = u64::from(length);
        held(file, offset, length)?;
        if offset == self.first {
            match self.zeros.replace(length) {
                None => {}
                Some(before) if before == length => return Ok(()),
                Some(_) => return Err(Missing::What(ASTRAY)),
            }
        }
        // No overflow: the file contains the page.
        let end = offset + length;
        self.lowest = self.lowest.min(offset);
        self.end = self.end.max(end);
        self.edges = self.edges.wrapping_add(hash(offset));
        self.edges = self.edges.wrapping_sub(hash(end));
        Ok(())
    }

    fn leave_no_gap(&self) -> Result<(), Missing> {
        match self.edges == hash(self.lowest).wrapping_sub(hash(self.end)) {
            true => Ok(()),
            false => Err(Missing::What(ASTRAY)),
        }
    }
}

/// Mixes the bits of an offset in the file (the finalizer of SplitMix64, Steele, Lea and Flood, 2014): the probability
/// that two sums are equal by chance is 2^-64.
fn hash(place: u64) -> u64 {
    let mixed = place.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

const _: () = assert!(PAGE_BYTES == PAGE_U32 as usize);
