//! The type of each page of memory, from the kernel's `struct page`, as VMCOREINFO describes it.
//!
//! ```text
//! mem_section[root][section] ─▶ struct page × 32768, for 128 MiB
//! ```
//!
//! The rules are makedumpfile's, so that a level means the same in both. If a rule needs information that VMCOREINFO
//! lacks, the page is [`PageKind::Kernel`]; if the page's structure cannot be read, it is [`PageKind::Unknown`]: both
//! are kept.

mod kind;
mod struct_page;

pub use kind::{PageCounts, PageKind};

use super::{Kernel, KernelError};
use crate::memory::{PAGE, PhysRange};
use struct_page::{Layout, StructPage};

/// `section_mem_map` has flags in its low bits; the address is aligned to far more than a page.
const SECTION_ADDRESS: u64 = !0xfff;
/// The flag that a section has page descriptions.
const SECTION_HAS_MEM_MAP: u64 = 2;
/// Maximum size of a section, as a power of two: the pages of a section are processed together.
const SECTION_BITS_MAX: i64 = 30;
/// Minimum size of a memory range that the kernel must describe, bytes: a shorter one may belong to the firmware.
const DESCRIBED_MIN_BYTES: u64 = 16 << 20;
/// Maximum number of sections that [`Pages::described`] checks.
const SECTIONS_TRIED: usize = 64;

/// Determines the use of pages.
pub struct Pages<'k, 'm> {
    kernel: &'k Kernel<'m>,
    layout: Layout,
    roots: u64,
    roots_len: u64,
    section_struct_bytes: u64,
    section_mem_map: u64,
    /// Number of pages per section, as a power of two.
    section_order: u32,
    /// Address that page 0's structure would have, if VMCOREINFO contains it: used to check addresses.
    vmemmap: Option<u64>,
}

impl<'k, 'm> Pages<'k, 'm> {
    /// Reads how the kernel describes its pages.
    ///
    /// # Errors
    ///
    /// When VMCOREINFO lacks required values.
    pub fn of(kernel: &'k Kernel<'m>) -> Result<Self, KernelError> {
        let info = kernel.info();
        let bits = info.number("SECTION_SIZE_BITS")?;
        let bits = u32::try_from(bits.clamp(0, SECTION_BITS_MAX)).unwrap_or(0);
        let section_struct_bytes = info.size("mem_section")?;
        if bits < 20 || section_struct_bytes == 0 || section_struct_bytes > PAGE {
            return Err(super::Missing("NUMBER(SECTION_SIZE_BITS)".to_owned()).into());
        }
        Ok(Self {
            kernel,
            layout: Layout::of(info)?,
            roots: info.symbol("mem_section")?,
            roots_len: info.length("mem_section")?,
            section_struct_bytes,
            section_mem_map: info.offset("mem_section.section_mem_map")?,
            section_order: bits - 12,
            vmemmap: info.symbol("vmemmap").ok(),
        })
    }

    /// Returns the number of pages in a section: a call of [`Pages::kinds`] covers that many.
    pub fn section_pages(&self) -> u64 {
        1 << self.section_order
    }

    /// Returns the types of the pages of one section. `first` is the number of its first page; `kinds` has
    /// [`Pages::section_pages`] entries; `buffer` is memory that can be reused for the next section.
    ///
    /// # Errors
    ///
    /// When the kernel does not describe the section, or a part of the description cannot be read: the pages
    /// concerned are [`PageKind::Unknown`].
    pub fn kinds(
        &self,
        first: u64,
        kinds: &mut Vec<PageKind>,
        buffer: &mut Vec<u8>,
    ) -> Result<(), KernelError> {
        let count = 1_usize << self.section_order;
        kinds.clear();
        kinds.resize(count, PageKind::Unknown);
        let map = self.section_map(first >> self.section_order)?;
        let struct_bytes = usize::try_from(self.layout.bytes).unwrap_or(0);
        buffer.clear();
        buffer.resize(count * struct_bytes, 0);
        let start = map.wrapping_add(first * self.layout.bytes);
        // Missing memory stays zero, and a structure of zeros has no type.
        let there = self.kernel.read_what_is_there(start, buffer);
        let mut at = 0;
        while at < count {
            let mut structs = buffer[at * struct_bytes..].chunks(struct_bytes);
            let page = StructPage {
                layout: &self.layout,
                virt: start.wrapping_add((at * struct_bytes) as u64),
                bytes: structs.next().unwrap_or_default(),
                second: structs.next().unwrap_or_default(),
            };
            let (kind, order) = match page.head_of_tail() {
                // The block began in an earlier section.
                Some(head) => (self.kind_at(head), 0),
                None => (page.kind(), page.order(first + at as u64)),
            };
            let end = (at + (1 << order)).min(count);
            kinds[at..end].fill(kind);
            at = end;
        }
        match there {
            true => Ok(()),
            false => Err(KernelError::Nonsense {
                what: "the description of pages",
                virt: start,
            }),
        }
    }

    /// Counts the pages of each kind in `ranges`. Sections that the kernel does not describe count as unknown.
    ///
    /// # Errors
    ///
    /// If no page type can be determined, with the reason for the first page.
    pub fn count(&self, ranges: &[PhysRange]) -> Result<PageCounts, KernelError> {
        let mut counts = PageCounts::default();
        let (mut kinds, mut buffer) = (Vec::new(), Vec::new());
        let mut loaded = None;
        let mut described = false;
        let mut first_error = None;
        for range in ranges {
            let mut pfn = range.start / PAGE;
            while pfn < range.end / PAGE {
                let section = pfn >> self.section_order;
                let first = section << self.section_order;
                if loaded.replace(section) != Some(section) {
                    let section = self.section_map(section);
                    described = section.is_ok();
                    // After an error, use the types determined so far.
                    let told = section.and_then(|_| self.kinds(first, &mut kinds, &mut buffer));
                    if let Err(error) = told {
                        first_error.get_or_insert(error);
                    }
                }
                let end = (range.end / PAGE).min(first + self.section_pages());
                let within = |n: u64| usize::try_from(n - first).unwrap_or(0);
                match described {
                    true => kinds[within(pfn)..within(end)]
                        .iter()
                        .for_each(|k| counts.add(*k)),
                    false => counts.unknown += end - pfn,
                }
                pfn = end;
            }
        }
        let nothing = PageCounts {
            unknown: counts.unknown,
            ..PageCounts::default()
        };
        match first_error {
            Some(error) if counts == nothing => Err(error),
            _ => Ok(counts),
        }
    }

    /// Returns the number of the first sections of memory that the kernel should describe, and the number of those that
    /// it describes.
    pub(super) fn described(&self, ranges: &[PhysRange]) -> (u64, u64) {
        let large = ranges.iter().filter(|r| r.len() >= DESCRIBED_MIN_BYTES);
        let sections = large.flat_map(|range| {
            let section = |phys: u64| (phys / PAGE) >> self.section_order;
            section(range.start)..=section(range.end.saturating_sub(1))
        });
        let tried = sections.take(SECTIONS_TRIED);
        tried.fold((0, 0), |(all, told), section| {
            (all + 1, told + u64::from(self.section_map(section).is_ok()))
        })
    }

    /// Returns the address of the section's page structures, minus the number of its first page times their size.
    fn section_map(&self, section: u64) -> Result<u64, KernelError> {
        let what = "the table of memory sections";
        let per_root = PAGE / self.section_struct_bytes;
        let (root, index) = (section / per_root, section % per_root);
        let virt = self.roots.wrapping_add(root * 8);
        let nonsense = KernelError::Nonsense { what, virt };
        if root >= self.roots_len {
            return Err(nonsense);
        }
        let root = self.kernel.u64_at(virt, what)?;
        if root == 0 {
            return Err(nonsense);
        }
        let at = root
            .wrapping_add(index * self.section_struct_bytes)
            .wrapping_add(self.section_mem_map);
        let map = self.kernel.u64_at(at, what)?;
        let address = map & SECTION_ADDRESS;
        let expected = self.vmemmap.is_none_or(|vmemmap| vmemmap == address);
        if map & SECTION_HAS_MEM_MAP == 0 || !expected {
            return Err(nonsense);
        }
        Ok(address)
    }

    /// Returns the type of the page whose structure is at this address.
    fn kind_at(&self, virt: u64) -> PageKind {
        let length = usize::try_from(self.layout.bytes).unwrap_or(0);
        let mut bytes = vec![0; 2 * length];
        if self.kernel.read(virt, &mut bytes).is_err() {
            return PageKind::Unknown;
        }
        let (bytes, second) = bytes.split_at(length);
        let page = StructPage {
            layout: &self.layout,
            virt,
            bytes,
            second,
        };
        match page.head_of_tail() {
            Some(_) => PageKind::Unknown,
            None => page.kind(),
        }
    }
}
