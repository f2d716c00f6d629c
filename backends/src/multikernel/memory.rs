//! A generation's memory, as the host can map it.
//!
//! A kernel instance's memory is the machine's own: its addresses are physical ones, which `/proc/iomem` tells
//! root, and `/dev/mem` maps. That a kernel refuses under lockdown, and one with strict `/dev/mem` unless it was
//! booted with `iomem=relaxed`.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;

use libkerf::machine::Iomem;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::slots::{Holds, Slots};
use crate::contract::{BackendError, KernelInstance, MemoryRange, Placement};

/// Where physical memory is mapped from.
const DEV_MEM: &str = "/dev/mem";
const IOMEM: &str = "/proc/iomem";
/// Not zero: the compiler has seen it.
const PAGE_BYTES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

impl Slots {
    /// The ranges of a generation's memory; none once it was released.
    pub(super) fn memory_map(
        &self,
        placement: &Placement,
    ) -> Result<Vec<MemoryRange>, BackendError> {
        let Some(KernelInstance { name, id }) = &placement.kernel_instance else {
            return Ok(Vec::new());
        };
        let what = |what: &str| format!("{what} the memory of kernel instance {name:?}");
        let held = self.holds(placement).map_err(|error| BackendError {
            what: what("looking for"),
            source: io::Error::other(error.to_string()),
        })?;
        if !matches!(held, Holds::This(..)) {
            return Ok(Vec::new());
        }
        let text = std::fs::read_to_string(IOMEM).map_err(|source| BackendError {
            what: format!("reading {IOMEM}"),
            source,
        })?;
        let ranges = ranges(&Iomem::parse(&text), *id, name).map_err(|source| BackendError {
            what: what("looking for"),
            source,
        })?;
        for range in &ranges {
            try_map(Path::new(DEV_MEM), range.host_offset).map_err(|source| BackendError {
                what: format!(
                    "{} at {:#x} from {DEV_MEM}, which takes root, no lockdown, and iomem=relaxed on the command line \
                     of a host with strict /dev/mem",
                    what("mapping"),
                    range.host_offset
                ),
                source,
            })?;
        }
        Ok(ranges)
    }
}

/// The ranges that `/proc/iomem` shows for an instance.
fn ranges(iomem: &Iomem, id: u32, name: &str) -> io::Result<Vec<MemoryRange>> {
    let regions = iomem.instance(id, name);
    if regions.is_empty() {
        let text = format!("{IOMEM} shows no region of it (addresses need root)");
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    let range = |(base, length)| MemoryRange {
        guest_address: base,
        length,
        host_path: DEV_MEM.into(),
        host_offset: base,
    };
    Ok(regions.into_iter().map(range).collect())
}

/// Whether one page there can be mapped.
#[allow(unsafe_code, reason = "mmap")]
fn try_map(path: &Path, offset: u64) -> io::Result<()> {
    let file = File::open(path)?;
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a new mapping that nothing refers to, only to be read, and that is not read.
    unsafe {
        let at = mmap(
            None,
            PAGE_BYTES,
            ProtFlags::PROT_READ,
            MapFlags::MAP_SHARED,
            &file,
            offset,
        )?;
        munmap(at, PAGE_BYTES.get())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_addresses_are_the_instances() {
        let iomem = Iomem::parse(
            "840000000-8bfffffff : Multikernel Memory Pool\n\
             \x20 840000000-847ffffff : mk-instance-3-web+b-region-0\n\
             \x20 860000000-867ffffff : mk-instance-3-web+b-region-1\n\
             \x20 850000000-850000fff : mk-instance-4-web-region-0\n",
        );
        let found = ranges(&iomem, 3, "web+b").unwrap();
        let all: Vec<_> = found
            .iter()
            .map(|range| (range.guest_address, range.host_offset, range.length))
            .collect();
        let bases = [0x8_4000_0000, 0x8_6000_0000];
        assert_eq!(all, bases.map(|base| (base, base, 0x800_0000)));
        let none = ranges(&iomem, 3, "web").unwrap_err().to_string();
        assert!(none.contains("no region"), "{none}");
    }

    #[test]
    fn what_cannot_be_mapped_is_found_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        try_map(file.path(), 4096).unwrap();
        assert!(try_map(file.path(), 1).is_err());
        assert!(try_map(Path::new("/nonexistent"), 0).is_err());
    }
}
