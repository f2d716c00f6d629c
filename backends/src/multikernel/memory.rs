//! A generation's memory, as the host can read it.
//!
//! The memory of a kernel instance is part of the machine's memory: its addresses are physical ones, which
//! `/proc/iomem` shows to root, and `/proc/kcore` shows its contents. The kernel does not change the memory when it
//! halts the instance.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use libkerf::machine::Iomem;

use super::kcore::{self, Shown};
use super::slots::{Holds, Slots};
use crate::contract::{BackendError, KernelInstance, MemoryRange, Placement};

/// Number of bytes read of each range, to check whether it is readable.
const TRIED_BYTES: usize = 64;

/// The files in which the host's kernel lists and shows memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// File with the owners of physical addresses.
    pub iomem: PathBuf,
    /// File with the contents of physical memory.
    pub kcore: PathBuf,
}

impl Default for HostMemory {
    fn default() -> Self {
        Self {
            iomem: "/proc/iomem".into(),
            kcore: "/proc/kcore".into(),
        }
    }
}

impl Slots {
    /// Returns the ranges of a generation's memory; none after its release.
    pub(super) fn memory_map(
        &self,
        host: &HostMemory,
        placement: &Placement,
    ) -> Result<Vec<MemoryRange>, BackendError> {
        let Some(KernelInstance { name, id }) = &placement.kernel_instance else {
            return Ok(Vec::new());
        };
        let failed = |what: &str, source| BackendError {
            what: format!("{what} the memory of kernel instance {name:?}"),
            source,
        };
        let held = self
            .holds(placement)
            .map_err(|error| failed("looking for", io::Error::other(error.to_string())))?;
        if !matches!(held, Holds::This(..)) {
            return Ok(Vec::new());
        }
        let regions = regions(&host.iomem, *id, name).map_err(|e| failed("looking for", e))?;
        ranges(&host.kcore, &regions).map_err(|e| failed("reading", e))
    }
}

/// Returns base and length of each region of an instance, from the host's kernel.
fn regions(iomem: &Path, id: u32, name: &str) -> io::Result<Vec<(u64, u64)>> {
    let text = std::fs::read_to_string(iomem)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", iomem.display())))?;
    let regions = Iomem::parse(&text).instance(id, name);
    if regions.is_empty() {
        let text = format!(
            "{} shows no memory region of it (reading addresses requires root)",
            iomem.display()
        );
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    Ok(regions)
}

/// Returns the readable location of each region.
fn ranges(kcore: &Path, regions: &[(u64, u64)]) -> io::Result<Vec<MemoryRange>> {
    let explained = |error: io::Error| {
        let text = format!(
            "{}: {error}; this requires root, a kernel with CONFIG_PROC_KCORE, and no confidentiality lockdown",
            kcore.display()
        );
        io::Error::new(error.kind(), text)
    };
    let (file, shown) = kcore::open(kcore).map_err(explained)?;
    let mut ranges = Vec::new();
    for (base, length) in regions {
        let parts = kcore::parts(&shown, *base, *length).ok_or_else(|| {
            let text = format!(
                "{} does not contain all of its memory, at {base:#x}",
                kcore.display()
            );
            io::Error::new(io::ErrorKind::NotFound, text)
        })?;
        for Shown {
            start,
            length,
            offset,
        } in parts
        {
            file.read_exact_at(&mut [0; TRIED_BYTES], offset)
                .map_err(explained)?;
            ranges.push(MemoryRange {
                guest_address: start,
                length,
                host_path: kcore.to_owned(),
                host_offset: offset,
            });
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn the_machines_addresses_are_the_instances() {
        let mut iomem = tempfile::NamedTempFile::new().unwrap();
        iomem
            .write_all(
                b"840000000-8bfffffff : Multikernel Memory Pool\n\
                \x20 840000000-847ffffff : mk-instance-3-web+b-region-0\n\
                \x20 860000000-867ffffff : mk-instance-3-web+b-region-1\n\
                \x20 850000000-850000fff : mk-instance-4-web-region-0\n",
            )
            .unwrap();
        let found = regions(iomem.path(), 3, "web+b").unwrap();
        let bases = [0x8_4000_0000, 0x8_6000_0000];
        assert_eq!(found, bases.map(|base| (base, 0x800_0000)));
        let none = regions(iomem.path(), 3, "web").unwrap_err().to_string();
        assert!(none.contains("no memory region"), "{none}");
    }

    #[test]
    fn what_is_shown_is_read_and_what_is_not_is_named() {
        let mut kcore = tempfile::NamedTempFile::new().unwrap();
        let bytes = 0x4000;
        kcore.write_all(&kcore::synthetic(0x1_0000, bytes)).unwrap();
        let file = kcore.as_file();
        let read = |regions: &[(u64, u64)]| ranges(kcore.path(), regions);
        let nothing_behind = read(&[(0x1_0000, 0x1000)]).unwrap_err().to_string();
        assert!(
            nothing_behind.contains("no confidentiality lockdown"),
            "{nothing_behind}"
        );
        file.set_len(kcore::SYNTHETIC_OFFSET + bytes).unwrap();
        let found = read(&[(0x1_0000, 0x1000), (0x1_2000, 0x2000)]).unwrap();
        let places: Vec<_> = found
            .iter()
            .map(|range| (range.guest_address, range.length, range.host_offset))
            .collect();
        assert_eq!(
            places,
            [(0x1_0000, 0x1000, 0x2000), (0x1_2000, 0x2000, 0x4000)]
        );
        let outside = read(&[(0x1_3000, 0x2000)]).unwrap_err().to_string();
        assert!(
            outside.contains("does not contain all of its memory"),
            "{outside}"
        );
        assert!(ranges(Path::new("/nonexistent"), &[(0, 1)]).is_err());
    }
}
