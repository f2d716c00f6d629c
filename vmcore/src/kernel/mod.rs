//! A kernel's view of its memory: virtual addresses, through its own page tables.

pub mod log;
pub mod pages;
mod paging;
pub mod symbols;
pub mod vmcoreinfo;

use std::collections::HashMap;
use std::sync::Mutex;

use crate::dump::Dump;
use crate::error::MemoryError;
use crate::memory::{PAGE, PAGE_BYTES, PhysicalMemory};

pub use paging::START_KERNEL_MAP;
pub use vmcoreinfo::{Missing, Origin, VmcoreInfo};

/// Number of cached pages, mainly page tables: 4 MiB.
const PAGES_KEPT: usize = 1024;

/// See [`Kernel::told`].
const TOLD_MAX: u32 = 4;

/// Why the kernel's own structures cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No description of the kernel's layout exists.
    #[error("the dump has no VMCOREINFO, and none was found in the memory")]
    NoVmcoreInfo,
    /// VMCOREINFO lacks a required entry.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// Required memory is missing.
    #[error("{what}: {source}")]
    Memory {
        /// The data that was read.
        what: &'static str,
        /// The reason.
        source: MemoryError,
    },
    /// The kernel's memory violates the kernel's own rules.
    #[error("{what} at {virt:#x} is invalid")]
    Nonsense {
        /// The data that was read.
        what: &'static str,
        /// Its virtual address.
        virt: u64,
    },
}

/// A kernel in memory.
pub struct Kernel<'a> {
    memory: &'a dyn PhysicalMemory,
    info: VmcoreInfo,
    /// Physical address of the top page table.
    root: u64,
    /// Its virtual address.
    table: u64,
    levels: u8,
    /// Bits of an entry that mark encrypted memory and are not part of the address.
    encryption_mask: u64,
    phys_base: u64,
    kept: Mutex<HashMap<u64, Box<[u8; PAGE_BYTES]>>>,
}

impl<'a> Kernel<'a> {
    /// Returns the kernel in a dump. If the VMCOREINFO in the dump's notes does not lead to everything, this
    /// searches the memory for the kernel's own copy, and uses the copy if it leads to more.
    ///
    /// # Errors
    ///
    /// When there is no VMCOREINFO, or it does not contain the location of the page tables.
    pub fn in_dump(dump: &'a Dump) -> Result<Self, KernelError> {
        let phys_base = dump.header_phys_base();
        let Some(text) = &dump.notes().vmcoreinfo else {
            return Self::searched(dump, phys_base);
        };
        let note = VmcoreInfo::parse(text, Origin::Note);
        let noted = Self::new(dump, note.clone(), phys_base);
        let told = noted.as_ref().map_or(0, Self::told);
        if told == TOLD_MAX {
            return noted;
        }
        let mut best = noted;
        VmcoreInfo::search_for(dump, |found| {
            // The same text leads to no more: the kernel is damaged, or its release is unknown.
            let same = found.text() == note.text();
            if let Ok(kernel) = Self::new(dump, found.clone(), phys_base)
                && !same
                && kernel.told() > told
            {
                best = Ok(kernel);
                return true;
            }
            same
        });
        best
    }

    /// Returns the kernel in memory, found by its VMCOREINFO.
    ///
    /// # Errors
    ///
    /// As [`Kernel::in_dump`].
    pub fn in_memory(memory: &'a dyn PhysicalMemory) -> Result<Self, KernelError> {
        Self::searched(memory, None)
    }

    /// Returns the kernel of the first VMCOREINFO in memory whose page tables exist; otherwise the kernel of
    /// the first VMCOREINFO.
    fn searched(
        memory: &'a dyn PhysicalMemory,
        phys_base: Option<u64>,
    ) -> Result<Self, KernelError> {
        let mut first = None;
        let mut found = None;
        VmcoreInfo::search_for(memory, |info| {
            let kernel = Self::new(memory, info.clone(), phys_base);
            if kernel.as_ref().is_ok_and(Self::maps_itself) {
                found = Some(kernel);
                return true;
            }
            first.get_or_insert(kernel);
            false
        });
        found.or(first).unwrap_or(Err(KernelError::NoVmcoreInfo))
    }

    /// Returns true if the page tables map their own top table.
    fn maps_itself(&self) -> bool {
        self.translate(self.table)
            .is_ok_and(|phys| phys == self.root)
    }

    /// Returns a score of the information that VMCOREINFO leads to, from 0 to [`TOLD_MAX`]: one point each for
    /// page tables, the log, the use of some pages, and the use of all.
    fn told(&self) -> u32 {
        if !self.maps_itself() {
            return 0;
        }
        let pages = match pages::Pages::of(self).map(|p| p.described(self.memory.ranges())) {
            Ok((all, told)) if told == all => 2,
            Ok((_, 1..)) => 1,
            _ => 0,
        };
        1 + u32::from(self.has_log()) + pages
    }

    /// Opens the kernel that `info` describes. `phys_base` is used if `info` does not contain the kernel's location.
    ///
    /// # Errors
    ///
    /// When `info` does not contain the location of the page tables.
    pub fn new(
        memory: &'a dyn PhysicalMemory,
        info: VmcoreInfo,
        phys_base: Option<u64>,
    ) -> Result<Self, KernelError> {
        let phys_base = match (info.number("phys_base"), phys_base) {
            (Ok(base), _) => base.cast_unsigned(),
            (Err(_), Some(base)) => base,
            (Err(missing), None) => return Err(missing.into()),
        };
        let table = info
            .symbol("swapper_pg_dir")
            .or_else(|_| info.symbol("init_top_pgt"))?;
        if table < START_KERNEL_MAP {
            return Err(KernelError::Nonsense {
                what: "SYMBOL(swapper_pg_dir)",
                virt: table,
            });
        }
        let five = info.number("pgtable_l5_enabled").unwrap_or(0) == 1;
        Ok(Self {
            memory,
            root: (table - START_KERNEL_MAP).wrapping_add(phys_base),
            table,
            levels: if five { 5 } else { 4 },
            encryption_mask: info.number("sme_mask").unwrap_or(0).cast_unsigned(),
            phys_base,
            kept: Mutex::default(),
            info,
        })
    }

    /// Returns VMCOREINFO.
    pub fn info(&self) -> &VmcoreInfo {
        &self.info
    }

    /// Returns the underlying memory.
    pub fn memory(&self) -> &'a dyn PhysicalMemory {
        self.memory
    }

    /// Returns the offset from an address in the kernel's image, minus [`START_KERNEL_MAP`], to the physical address.
    pub fn phys_base(&self) -> u64 {
        self.phys_base
    }

    /// Fills `buf` with the contents of a virtual address.
    ///
    /// # Errors
    ///
    /// The first page that is not mapped or cannot be read.
    pub fn read(&self, mut virt: u64, mut buf: &mut [u8]) -> Result<(), MemoryError> {
        while !buf.is_empty() {
            let within = usize::try_from(virt % PAGE).unwrap_or(0);
            let (now, later) = buf.split_at_mut((PAGE_BYTES - within).min(buf.len()));
            let phys = self.translate(virt)?;
            self.read_kept(phys, now)?;
            virt = virt.wrapping_add(now.len() as u64);
            buf = later;
        }
        Ok(())
    }

    /// Reads bytes at a virtual address; `what` names them in the error.
    ///
    /// # Errors
    ///
    /// As [`Kernel::read`].
    pub fn bytes<const N: usize>(
        &self,
        virt: u64,
        what: &'static str,
    ) -> Result<[u8; N], KernelError> {
        let mut bytes = [0; N];
        let read = self.read(virt, &mut bytes);
        read.map_err(|source| KernelError::Memory { what, source })?;
        Ok(bytes)
    }

    /// Reads a 64-bit number at a virtual address.
    ///
    /// # Errors
    ///
    /// As [`Kernel::read`].
    pub fn u64_at(&self, virt: u64, what: &'static str) -> Result<u64, KernelError> {
        self.bytes(virt, what).map(u64::from_le_bytes)
    }

    /// Reads a 32-bit number at a virtual address.
    ///
    /// # Errors
    ///
    /// As [`Kernel::read`].
    pub fn u32_at(&self, virt: u64, what: &'static str) -> Result<u32, KernelError> {
        self.bytes(virt, what).map(u32::from_le_bytes)
    }

    /// Reads a NUL-terminated text of at most `max_bytes`; stops where the memory is unreadable.
    pub fn text_at(&self, virt: u64, max_bytes: usize) -> Vec<u8> {
        let mut text = Vec::new();
        while text.len() < max_bytes {
            let at = virt.wrapping_add(text.len() as u64);
            let to_page_end = PAGE_BYTES - usize::try_from(at % PAGE).unwrap_or(0);
            let mut part = vec![0; to_page_end.min(max_bytes - text.len())];
            if self.read(at, &mut part).is_err() {
                break;
            }
            let end = part.iter().position(|byte| *byte == 0);
            text.extend(&part[..end.unwrap_or(part.len())]);
            if end.is_some() {
                break;
            }
        }
        text
    }

    /// Fills `buf` with the available memory, and zeros elsewhere. Reads whole mappings at once,
    /// without the cache. Returns false if some memory was missing.
    fn read_what_is_there(&self, mut virt: u64, mut buf: &mut [u8]) -> bool {
        let mut all = true;
        while !buf.is_empty() {
            let mapping = self.mapping(virt);
            let step = mapping.as_ref().map_or(PAGE, |mapping| mapping.entry_bytes);
            let left = usize::try_from(step - virt % step).unwrap_or(usize::MAX);
            let (now, later) = buf.split_at_mut(left.min(buf.len()));
            all &= match mapping {
                Ok(mapping) if self.memory.read(mapping.phys, now).is_ok() => true,
                // A part of it may be available.
                Ok(mapping) if step > PAGE => {
                    let parts = now.chunks_mut(PAGE_BYTES).zip(0_u64..);
                    parts.fold(true, |all, (part, number)| {
                        let there = self.memory.read(mapping.phys + number * PAGE, part);
                        if there.is_err() {
                            part.fill(0);
                        }
                        all & there.is_ok()
                    })
                }
                _ => {
                    now.fill(0);
                    false
                }
            };
            virt = virt.wrapping_add(now.len() as u64);
            buf = later;
        }
        all
    }

    /// Reads within one page, through the cache.
    fn read_kept(&self, phys: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let (number, within) = (phys / PAGE, usize::try_from(phys % PAGE).unwrap_or(0));
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        if !kept.contains_key(&number) {
            let mut page = Box::new([0; PAGE_BYTES]);
            self.memory.read(number * PAGE, &mut page[..])?;
            if kept.len() >= PAGES_KEPT {
                kept.clear();
            }
            kept.insert(number, page);
        }
        if let Some(page) = kept.get(&number) {
            buf.copy_from_slice(&page[within..within + buf.len()]);
        }
        Ok(())
    }
}
