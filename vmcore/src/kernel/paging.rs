//! x86_64 page tables of four and five levels.

use super::Kernel;
use crate::error::MemoryError;
use crate::memory::{PAGE, PhysRange};

/// The virtual address at which the kernel's image is mapped, minus `phys_base`.
pub const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The entry is in use.
const PRESENT: u64 = 1;
/// At the third and second level: the entry maps memory, not a table.
const LARGE: u64 = 1 << 7;
/// Address bits of an entry: 51 to 12.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Number of address bits that one level translates.
const LEVEL_BITS: u32 = 9;

/// The mapping of a virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) phys: u64,
    /// Size of the memory that one entry maps, bytes: 4 KiB, 2 MiB or 1 GiB.
    pub(super) entry_bytes: u64,
}

impl Kernel<'_> {
    /// Translates a virtual address to a physical one, with the kernel's own page tables.
    ///
    /// # Errors
    ///
    /// When no entry maps it, or a table cannot be read.
    pub fn translate(&self, virt: u64) -> Result<u64, MemoryError> {
        self.mapping(virt).map(|mapping| mapping.phys)
    }

    pub(super) fn mapping(&self, virt: u64) -> Result<Mapping, MemoryError> {
        let mut table = self.root & ADDRESS;
        for level in (1..=self.levels).rev() {
            let shift = 12 + LEVEL_BITS * u32::from(level - 1);
            let index = virt >> shift & ((1 << LEVEL_BITS) - 1);
            let mut entry = [0; 8];
            self.read_kept(table + index * 8, &mut entry)?;
            let entry = u64::from_le_bytes(entry);
            if entry & PRESENT == 0 {
                return Err(MemoryError::NotMapped { virt, level });
            }
            let address = entry & ADDRESS & !self.encryption_mask;
            if level == 1 || (level <= 3 && entry & LARGE != 0) {
                let entry_bytes = 1 << shift;
                let base = address & !(entry_bytes - 1);
                return Ok(Mapping {
                    phys: base | virt & (entry_bytes - 1),
                    entry_bytes,
                });
            }
            table = address;
        }
        // The last level always returns.
        Err(MemoryError::NotMapped { virt, level: 0 })
    }

    /// Returns the start of the direct map of all physical memory: the virtual address of physical address 0.
    ///
    /// The address differs with every boot. The direct map is the first mapping in the kernel half whose physical
    /// addresses fit a linear mapping from its start.
    pub fn direct_map(&self) -> Option<u64> {
        let top_shift = 12 + LEVEL_BITS * u32::from(self.levels - 1);
        // The kernel uses the upper half of the top table. The direct map comes first.
        for index in 256..512_u64 {
            let base = (u64::MAX << (top_shift + LEVEL_BITS)) | index << top_shift;
            // The direct map begins at a gigabyte boundary; memory may not.
            if let Some(start) = self.first_gigabyte_with_zero(base, top_shift) {
                return Some(start);
            }
        }
        None
    }

    /// Returns the gigabyte below the entry at `base` that maps an early page to its own physical address.
    fn first_gigabyte_with_zero(&self, base: u64, top_shift: u32) -> Option<u64> {
        const GIGABYTE: u64 = 1 << 30;
        let mut empty = [0; 8];
        let index = base >> top_shift & 511;
        self.read_kept((self.root & ADDRESS) + index * 8, &mut empty)
            .ok()?;
        if u64::from_le_bytes(empty) & PRESENT == 0 {
            return None;
        }
        let gigabytes = 1_u64 << (top_shift - 30);
        (0..gigabytes.min(512))
            .map(|number| base + number * GIGABYTE)
            .find(|start| {
                // Page 0 may be unmapped; one of these early pages is always mapped.
                [1, 16, 256, 4096].iter().any(|page| {
                    let at = page * PAGE;
                    self.mapping(start + at).is_ok_and(|m| m.phys == at)
                })
            })
    }

    /// Returns the range of the kernel's image: from its code to the last page mapped as part of it.
    pub fn image(&self) -> Option<PhysRange> {
        const STEP: u64 = 2 << 20;
        let start = self.info().symbol("_stext").ok()? & !(STEP - 1);
        let length = self.info().number("KERNEL_IMAGE_SIZE").unwrap_or(1 << 30);
        let upto = START_KERNEL_MAP.checked_add(u64::try_from(length).ok()?)?;
        let own = |virt: u64| {
            virt.wrapping_sub(START_KERNEL_MAP)
                .wrapping_add(self.phys_base())
        };
        let mut end = None;
        let mut virt = start;
        while virt < upto {
            let step = match self.mapping(virt) {
                Ok(mapping) => {
                    let step = mapping.entry_bytes - virt % mapping.entry_bytes;
                    if mapping.phys == own(virt) {
                        end = Some(own(virt).wrapping_add(step));
                    }
                    step
                }
                Err(MemoryError::NotMapped { level: 2.., .. }) => STEP - virt % STEP,
                Err(_) => PAGE,
            };
            virt = virt.checked_add(step)?;
        }
        let range = PhysRange {
            start: own(start),
            end: end?,
        };
        (range.start < range.end).then_some(range)
    }
}
