//! `struct page`: the offsets of its members, and the type of page that they describe.

use super::PageKind;
use crate::kernel::{KernelError, Missing, VmcoreInfo};

/// Maximum size of a block of pages that the kernel allocates at once, as a power of two: 1 GiB.
const ORDER_MAX: u64 = 18;
/// Maximum size of `struct page`, bytes.
const STRUCT_PAGE_MAX: u64 = 256;
/// Bit of `page.mapping` that marks anonymous memory.
const MAPPING_ANON: u64 = 1;

/// Encoding of a page's type in the word of its map count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TypeMark {
    /// Linux 6.12: the highest byte.
    HighByte(u8),
    /// Before Linux 6.12: a zero bit in a word that begins with 0xf.
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

/// Returns a map count from VMCOREINFO, as the word in a page.
fn word_of(info: &VmcoreInfo, name: &str) -> Option<u32> {
    let value = info.number(name).ok()?;
    i32::try_from(value).ok().map(i32::cast_unsigned)
}

/// The layout of `struct page`.
#[derive(Debug)]
pub(super) struct Layout {
    /// Size of the structure.
    pub(super) bytes: u64,
    flags: usize,
    mapping: usize,
    map_count: usize,
    private: usize,
    /// Offset of the link from a page to its block: `compound_head`, or `compound_info` in newer kernels (7.2).
    compound: usize,
    /// Second page of a block: its order, and the number of its type. Before Linux 6.6.
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
    /// Returns the layout that VMCOREINFO describes.
    pub(super) fn of(info: &VmcoreInfo) -> Result<Self, KernelError> {
        let bytes = info.size("page")?;
        let place = |member: &str, width: u64| {
            let place = info.offset(&format!("page.{member}"))?;
            // No overflow: the structure is small.
            match place + width <= bytes {
                true => Ok(usize::try_from(place).unwrap_or(usize::MAX)),
                false => Err(KernelError::Missing(Missing(format!(
                    "OFFSET(page.{member})"
                )))),
            }
        };
        let bit = |name: &str| {
            let number = info.number(name).ok().and_then(|n| u32::try_from(n).ok());
            number.and_then(|n| 1_u64.checked_shl(n)).unwrap_or(0)
        };
        let needed = |name: &str| match bit(name) {
            0 => Err(Missing(format!("NUMBER({name})"))),
            bit => Ok(bit),
        };
        if !(32..=STRUCT_PAGE_MAX).contains(&bytes) {
            return Err(Missing("SIZE(page)".to_owned()).into());
        }
        let buddy = "PAGE_BUDDY_MAPCOUNT_VALUE";
        Ok(Self {
            bytes,
            flags: place("flags", 8)?,
            mapping: place("mapping", 8)?,
            map_count: place("_mapcount", 4)?,
            private: place("private", 8)?,
            compound: place("compound_info", 8).or_else(|_| place("compound_head", 8))?,
            compound_order: place("compound_order", 1).ok(),
            compound_dtor: place("compound_dtor", 1).ok(),
            lru: needed("PG_lru")?,
            private_flag: needed("PG_private")?,
            swap: needed("PG_swapbacked")? | needed("PG_swapcache")?,
            head: info.number("PG_head_mask").unwrap_or(0).cast_unsigned(),
            hwpoison: bit("PG_hwpoison"),
            slab_flag: bit("PG_slab"),
            slab: TypeMark::of(info, "PAGE_SLAB_MAPCOUNT_VALUE"),
            buddy: word_of(info, buddy).ok_or_else(|| Missing(format!("NUMBER({buddy})")))?,
            offline: word_of(info, "PAGE_OFFLINE_MAPCOUNT_VALUE"),
            hugetlb: TypeMark::of(info, "PAGE_HUGETLB_MAPCOUNT_VALUE"),
            hugetlb_dtor: info
                .number("HUGETLB_PAGE_DTOR")
                .ok()
                .and_then(|n| u8::try_from(n).ok()),
        })
    }
}

/// One `struct page`, and the next one.
#[derive(Clone, Copy)]
pub(super) struct StructPage<'a> {
    pub(super) layout: &'a Layout,
    /// Virtual address of the structure.
    pub(super) virt: u64,
    pub(super) bytes: &'a [u8],
    /// Empty if unavailable.
    pub(super) second: &'a [u8],
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

    /// Returns the address of its block's first `struct page`, if the page is not the first. A newer kernel (7.2)
    /// that frees the descriptions of huge pages writes a mask in place of the address, so that all pages of a
    /// block can share their descriptions: no `struct page` has an address as high as the lowest mask.
    pub(super) fn head_of_tail(&self) -> Option<u64> {
        let info = self.long(self.layout.compound);
        let lowest_mask = (self.layout.bytes << ORDER_MAX).wrapping_neg();
        match info & !1 {
            _ if info & 1 == 0 => None,
            mask if mask >= lowest_mask => Some(self.virt & mask),
            head => Some(head),
        }
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

    /// Returns the type of the page.
    pub(super) fn kind(&self) -> PageKind {
        let layout = self.layout;
        let flags = self.flags();
        // A page without users has a map count of -1, and a page with users has a reference count: this structure was
        // missing.
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

    /// Returns the number of pages to which its type applies, as a power of two.
    pub(super) fn order(&self, pfn: u64) -> u64 {
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

    /// Returns a page with these flags, mapping and map count.
    fn kind(layout: &Layout, flags: u64, mapping: u64, map_count: i32) -> PageKind {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&flags.to_le_bytes());
        bytes[24..32].copy_from_slice(&mapping.to_le_bytes());
        bytes[48..52].copy_from_slice(&map_count.to_le_bytes());
        let page = StructPage {
            layout,
            virt: 0,
            bytes: &bytes,
            second: &[],
        };
        page.kind()
    }

    /// Returns the first page according to a block's third page, if that page contains `compound`.
    fn head(layout: &Layout, compound: u64) -> Option<u64> {
        let mut bytes = [0; 64];
        bytes[8..16].copy_from_slice(&compound.to_le_bytes());
        let page = StructPage {
            layout,
            virt: 0xffff_ea00_0001_8080,
            bytes: &bytes,
            second: &[],
        };
        page.head_of_tail()
    }

    #[test]
    fn a_page_names_the_first_of_its_block_by_address_or_by_mask() {
        let first = 0xffff_ea00_0001_8000;
        let info = NEW.replace("page.compound_head", "page.compound_info");
        for layout in [layout(NEW), layout(&info)] {
            assert_eq!(head(&layout, 0xffff_ea00_0004_0000), None);
            assert_eq!(head(&layout, first | 1), Some(first));
        }
        // 512 structures of 64 bytes, the maximum of a block.
        let layout = layout(&info);
        assert_eq!(head(&layout, (0x8000_u64).wrapping_neg() | 1), Some(first));
        let whole = (64_u64 << ORDER_MAX).wrapping_neg() | 1;
        assert_eq!(head(&layout, whole), Some(0xffff_ea00_0000_0000));
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
}
