//! What each page of memory is used for, from the kernel's `struct page`, as VMCOREINFO describes it.
//!
//! ```text
//! mem_section[root][section] ─▶ struct page × 32768, for 128 MiB
//! ```
//!
//! The rules are makedumpfile's, so that a level means the same in both. Where a rule needs what VMCOREINFO
//! does not say, the page is [`PageKind::Kernel`], and where the page's structure cannot be read it is
//! [`PageKind::Unknown`]: both are kept.

use super::{Kernel, KernelError, VmcoreInfo};
use crate::memory::{PAGE, PhysRange};

/// Most pages of one block that the kernel hands out at once, as a power of two: 1 GiB.
const ORDER_MAX: u64 = 18;
/// `section_mem_map` has marks in its low bits; the address is far more than a page's multiple.
const SECTION_ADDRESS: u64 = !0xfff;
/// The mark that a section has its pages described.
const SECTION_HAS_MEM_MAP: u64 = 2;
/// Largest `struct page`, bytes.
const STRUCT_PAGE_MAX: u64 = 256;
/// Largest section, as a power of two: the pages of one are looked at together.
const SECTION_BITS_MAX: i64 = 30;
/// Shortest range of memory, bytes, of which the kernel has to have a description: what is shorter may be a firmware's.
const DESCRIBED_MIN_BYTES: u64 = 16 << 20;
/// Most sections that [`Pages::described`] looks at.
const SECTIONS_TRIED: usize = 64;
/// Bit of `page.mapping` that says that the page is anonymous memory.
const MAPPING_ANON: u64 = 1;

/// What a page is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Nobody uses it.
    Free,
    /// Contents of a file, without the file system's own data.
    Cache,
    /// Contents of a file, with the file system's own data.
    CachePrivate,
    /// Memory of user processes that is no file: anonymous, or huge pages.
    User,
    /// The kernel's small objects.
    Slab,
    /// Broken, or taken away from the kernel.
    Unusable,
    /// Anything else, the kernel's own above all.
    Kernel,
    /// The kernel does not describe it, or its description cannot be read.
    Unknown,
}

impl PageKind {
    /// True when makedumpfile's `-d level` leaves it out. The level's bits: 1 zero (not a kind), 2 cache,
    /// 4 cache with or without private data, 8 user, 16 free. Unusable pages are left out at any level but 0.
    pub fn left_out_at(self, level: u32) -> bool {
        match self {
            Self::Cache => level & (2 | 4) != 0,
            Self::CachePrivate => level & 4 != 0,
            Self::User => level & 8 != 0,
            Self::Free => level & 16 != 0,
            Self::Unusable => level != 0,
            Self::Slab | Self::Kernel | Self::Unknown => false,
        }
    }
}

/// How many pages there are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PageCounts {
    /// See [`PageKind`]; pages.
    pub free: u64,
    /// Pages.
    pub cache: u64,
    /// Pages.
    pub cache_private: u64,
    /// Pages.
    pub user: u64,
    /// Pages.
    pub slab: u64,
    /// Pages.
    pub unusable: u64,
    /// Pages.
    pub kernel: u64,
    /// Pages that the kernel does not describe, or whose description cannot be read.
    pub unknown: u64,
}

impl PageCounts {
    /// One page more.
    pub fn add(&mut self, kind: PageKind) {
        *match kind {
            PageKind::Free => &mut self.free,
            PageKind::Cache => &mut self.cache,
            PageKind::CachePrivate => &mut self.cache_private,
            PageKind::User => &mut self.user,
            PageKind::Slab => &mut self.slab,
            PageKind::Unusable => &mut self.unusable,
            PageKind::Kernel => &mut self.kernel,
            PageKind::Unknown => &mut self.unknown,
        } += 1;
    }

    /// The pages of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            free: self.free + other.free,
            cache: self.cache + other.cache,
            cache_private: self.cache_private + other.cache_private,
            user: self.user + other.user,
            slab: self.slab + other.slab,
            unusable: self.unusable + other.unusable,
            kernel: self.kernel + other.kernel,
            unknown: self.unknown + other.unknown,
        }
    }
}

/// How a page's type is written in the word of its map count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TypeMark {
    /// Linux 6.12: the highest byte.
    HighByte(u8),
    /// Before: a bit that is zero, of a word that begins with 0xf.
    ZeroBit(u32),
}

impl TypeMark {
    fn of(info: &VmcoreInfo, name: &str) -> Option<Self> {
        let value = word_of(info, name)?;
        let [low @ .., high] = value.to_le_bytes();
        Some(match low {
            [0, 0, 0] => Self::HighByte(high),
            _ => Self::ZeroBit(!value),
        })
    }

    fn marks(self, word: u32) -> bool {
        const BEGIN: u32 = 0xf000_0000;
        match self {
            Self::HighByte(high) => word >> 24 == u32::from(high),
            Self::ZeroBit(bit) => word & (BEGIN | bit) == BEGIN,
        }
    }
}

/// A map count that VMCOREINFO names, as the word that a page has.
fn word_of(info: &VmcoreInfo, name: &str) -> Option<u32> {
    let value = info.number(name).ok()?;
    i32::try_from(value).ok().map(i32::cast_unsigned)
}

/// How `struct page` is laid out.
#[derive(Debug)]
struct Layout {
    bytes: u64,
    flags: usize,
    mapping: usize,
    map_count: usize,
    private: usize,
    compound_head: usize,
    /// Second page of a block: its order, and the number of its kind. Before Linux 6.6.
    compound_order: Option<usize>,
    compound_dtor: Option<usize>,
    lru: u64,
    private_flag: u64,
    swap: u64,
    head: u64,
    hwpoison: u64,
    slab_flag: u64,
    slab: Option<TypeMark>,
    buddy: u32,
    offline: Option<u32>,
    hugetlb: Option<TypeMark>,
    hugetlb_dtor: Option<u8>,
}

impl Layout {
    fn of(info: &VmcoreInfo) -> Result<Self, KernelError> {
        let bytes = info.size("page")?;
        let place = |member: &str, width: u64| {
            let place = info.offset(&format!("page.{member}"))?;
            // Bounded by the structure, which is small.
            match place + width <= bytes {
                true => Ok(usize::try_from(place).unwrap_or(usize::MAX)),
                false => Err(KernelError::Missing(super::Missing(format!(
                    "OFFSET(page.{member})"
                )))),
            }
        };
        let bit = |name: &str| {
            let number = info.number(name).ok().and_then(|n| u32::try_from(n).ok());
            number.and_then(|n| 1_u64.checked_shl(n)).unwrap_or(0)
        };
        let needed = |name: &str| match bit(name) {
            0 => Err(super::Missing(format!("NUMBER({name})"))),
            bit => Ok(bit),
        };
        if !(32..=STRUCT_PAGE_MAX).contains(&bytes) {
            return Err(super::Missing("SIZE(page)".to_owned()).into());
        }
        let buddy = "PAGE_BUDDY_MAPCOUNT_VALUE";
        Ok(Self {
            bytes,
            flags: place("flags", 8)?,
            mapping: place("mapping", 8)?,
            map_count: place("_mapcount", 4)?,
            private: place("private", 8)?,
            compound_head: place("compound_head", 8)?,
            compound_order: place("compound_order", 1).ok(),
            compound_dtor: place("compound_dtor", 1).ok(),
            lru: needed("PG_lru")?,
            private_flag: needed("PG_private")?,
            swap: needed("PG_swapbacked")? | needed("PG_swapcache")?,
            head: info.number("PG_head_mask").unwrap_or(0).cast_unsigned(),
            hwpoison: bit("PG_hwpoison"),
            slab_flag: bit("PG_slab"),
            slab: TypeMark::of(info, "PAGE_SLAB_MAPCOUNT_VALUE"),
            buddy: word_of(info, buddy)
                .ok_or_else(|| super::Missing(format!("NUMBER({buddy})")))?,
            offline: word_of(info, "PAGE_OFFLINE_MAPCOUNT_VALUE"),
            hugetlb: TypeMark::of(info, "PAGE_HUGETLB_MAPCOUNT_VALUE"),
            hugetlb_dtor: info
                .number("HUGETLB_PAGE_DTOR")
                .ok()
                .and_then(|n| u8::try_from(n).ok()),
        })
    }
}

/// One `struct page`, and the one behind it.
#[derive(Clone, Copy)]
struct StructPage<'a> {
    layout: &'a Layout,
    bytes: &'a [u8],
    /// Empty when it is not at hand.
    second: &'a [u8],
}

impl StructPage<'_> {
    fn long(&self, place: usize) -> u64 {
        let bytes = self.bytes.get(place..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn flags(&self) -> u64 {
        self.long(self.layout.flags)
    }

    fn map_count(&self) -> u32 {
        let place = self.layout.map_count;
        let bytes = self.bytes.get(place..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// The address of its block's first `struct page`, when it is not itself that.
    fn head_of_tail(&self) -> Option<u64> {
        let head = self.long(self.layout.compound_head);
        (head & 1 == 1).then(|| head - 1)
    }

    fn is_slab(&self) -> bool {
        let marked = self
            .layout
            .slab
            .is_some_and(|mark| mark.marks(self.map_count()));
        marked || self.flags() & self.layout.slab_flag != 0
    }

    fn is_hugetlb(&self) -> bool {
        let layout = self.layout;
        let by_type = layout
            .hugetlb
            .is_some_and(|mark| mark.marks(self.map_count()));
        let dtor = layout
            .compound_dtor
            .and_then(|place| self.second.get(place));
        let by_dtor =
            self.is_head() && layout.hugetlb_dtor.is_some() && dtor.copied() == layout.hugetlb_dtor;
        by_type || by_dtor
    }

    fn is_head(&self) -> bool {
        self.flags() & self.layout.head != 0
    }

    fn kind(&self) -> PageKind {
        let layout = self.layout;
        let flags = self.flags();
        // A page without users has a map count of -1, and one with users a reference count: this one was not there.
        if flags == 0 && self.bytes.iter().all(|byte| *byte == 0) {
            return PageKind::Unknown;
        }
        let slab = self.is_slab();
        let anonymous = !slab && self.long(layout.mapping) & MAPPING_ANON != 0;
        let cache = flags & layout.lru != 0 || flags & layout.swap == layout.swap;
        match () {
            () if !slab && self.map_count() == layout.buddy => PageKind::Free,
            () if cache && !anonymous && flags & layout.private_flag == 0 => PageKind::Cache,
            () if cache && !anonymous => PageKind::CachePrivate,
            () if anonymous || self.is_hugetlb() => PageKind::User,
            () if flags & layout.hwpoison != 0 => PageKind::Unusable,
            () if !slab && Some(self.map_count()) == layout.offline => PageKind::Unusable,
            () if slab => PageKind::Slab,
            () => PageKind::Kernel,
        }
    }

    /// How many pages its kind holds for, as a power of two.
    fn order(&self, pfn: u64) -> u64 {
        let layout = self.layout;
        let order = if !self.is_slab() && self.map_count() == layout.buddy {
            self.long(layout.private)
        } else if !self.is_head() {
            0
        } else if let Some(place) = layout.compound_order {
            self.second.get(place).copied().map_or(0, u64::from)
        } else {
            // Since Linux 6.6: the low byte of the second page's flags.
            self.second.get(layout.flags).copied().map_or(0, u64::from)
        };
        let aligned = order <= ORDER_MAX && pfn & ((1 << order) - 1) == 0;
        if aligned { order } else { 0 }
    }
}

/// Tells what pages are used for.
pub struct Pages<'k, 'm> {
    kernel: &'k Kernel<'m>,
    layout: Layout,
    roots: u64,
    roots_len: u64,
    section_struct_bytes: u64,
    section_mem_map: u64,
    /// Pages of one section, as a power of two.
    section_order: u32,
    /// Where the structures of page 0 would be, when VMCOREINFO says so: a check on what is found.
    vmemmap: Option<u64>,
}

impl<'k, 'm> Pages<'k, 'm> {
    /// Looks at how the kernel describes its pages.
    ///
    /// # Errors
    ///
    /// When VMCOREINFO does not say what is needed.
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

    /// Pages that are told of together: a call of [`Pages::kinds`] takes as many.
    pub fn section_pages(&self) -> u64 {
        1 << self.section_order
    }

    /// What the pages of one section are used for. `first` is the number of its first page, `kinds` takes
    /// [`Pages::section_pages`]; `buffer` is memory to be used again for the next.
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
        // What is not there stays zero, and a structure of zeros tells no kind.
        let there = self.kernel.read_what_is_there(start, buffer);
        let mut at = 0;
        while at < count {
            let mut structs = buffer[at * struct_bytes..].chunks(struct_bytes);
            let page = StructPage {
                layout: &self.layout,
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
    /// When nothing can be told of any page; why not of the first.
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
                    // An error leaves what could be told.
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

    /// Of the first sections of memory that the kernel should describe, how many there are, and how many it does.
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

    /// Where the section's pages are described, less its first page's number times their size.
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

    /// The kind of the page of which the structure is at this address.
    fn kind_at(&self, virt: u64) -> PageKind {
        let length = usize::try_from(self.layout.bytes).unwrap_or(0);
        let mut bytes = vec![0; 2 * length];
        if self.kernel.read(virt, &mut bytes).is_err() {
            return PageKind::Unknown;
        }
        let (bytes, second) = bytes.split_at(length);
        let page = StructPage {
            layout: &self.layout,
            bytes,
            second,
        };
        match page.head_of_tail() {
            Some(_) => PageKind::Unknown,
            None => page.kind(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Origin;

    const NEW: &str = "SIZE(page)=64\nOFFSET(page.flags)=0\nOFFSET(page.mapping)=24\n\
        OFFSET(page._mapcount)=48\nOFFSET(page.private)=40\nOFFSET(page.compound_head)=8\n\
        NUMBER(PG_lru)=5\nNUMBER(PG_private)=14\nNUMBER(PG_swapcache)=10\nNUMBER(PG_swapbacked)=17\n\
        NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=-184549376\nNUMBER(PG_hwpoison)=20\nNUMBER(PG_head_mask)=64\n\
        NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-268435456\nNUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)=-201326592\n\
        NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)=-251658240\n";

    fn layout(text: &str) -> Layout {
        Layout::of(&VmcoreInfo::parse(text.as_bytes(), Origin::Note)).unwrap()
    }

    /// A page with these flags, mapping and map count.
    fn kind(layout: &Layout, flags: u64, mapping: u64, map_count: i32) -> PageKind {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&flags.to_le_bytes());
        bytes[24..32].copy_from_slice(&mapping.to_le_bytes());
        bytes[48..52].copy_from_slice(&map_count.to_le_bytes());
        let page = StructPage {
            layout,
            bytes: &bytes,
            second: &[],
        };
        page.kind()
    }

    #[test]
    fn pages_are_told_apart_as_linux_6_12_marks_them() {
        let layout = layout(NEW);
        for (flags, mapping, map_count, expected) in [
            (0, 0, -268_435_456, PageKind::Free),
            (1 << 5, 0xffff_0000, 0, PageKind::Cache),
            (1 << 5 | 1 << 14, 0xffff_0000, 0, PageKind::CachePrivate),
            (1 << 5, 0xffff_0001, 0, PageKind::User),
            (1 << 10 | 1 << 17, 0xffff_0000, 0, PageKind::Cache),
            (1 << 10, 0xffff_0000, -1, PageKind::Kernel),
            (1 << 6, 0, -201_326_592, PageKind::User),
            (0, 1, -184_549_376 + 3, PageKind::Slab),
            (1 << 20, 0, -1, PageKind::Unusable),
            (0, 0, -251_658_240, PageKind::Unusable),
            (0, 0, -1, PageKind::Kernel),
            (0, 0, 0, PageKind::Unknown),
        ] {
            let found = kind(&layout, flags, mapping, map_count);
            assert_eq!(found, expected, "{flags:#x} {mapping:#x} {map_count}");
        }
    }

    #[test]
    fn what_vmcoreinfo_does_not_say_is_named() {
        let text = NEW.replace("NUMBER(PG_lru)=5\n", "");
        let error = Layout::of(&VmcoreInfo::parse(text.as_bytes(), Origin::Note)).unwrap_err();
        assert!(error.to_string().contains("NUMBER(PG_lru)"), "{error}");
        let text = NEW.replace("OFFSET(page.mapping)=24", "OFFSET(page.mapping)=60");
        assert!(Layout::of(&VmcoreInfo::parse(text.as_bytes(), Origin::Note)).is_err());
    }

    #[test]
    fn levels_are_those_of_makedumpfile() {
        let left_out = |kind: PageKind| -> Vec<u32> {
            [1, 2, 4, 8, 16]
                .into_iter()
                .filter(|level| kind.left_out_at(*level))
                .collect()
        };
        assert_eq!(left_out(PageKind::Cache), [2, 4]);
        assert_eq!(left_out(PageKind::CachePrivate), [4]);
        assert_eq!(left_out(PageKind::User), [8]);
        assert_eq!(left_out(PageKind::Free), [16]);
        assert!(left_out(PageKind::Slab).is_empty());
    }
}
