//! Memory that guests map.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use kmorph_kerf_ring::{Geometry, Mapped, Region};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;

/// A region in a memory file of its own, mapped into this process.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    start: NonNull<nix::libc::c_void>,
    size: NonZeroUsize,
    region: Region<Mapped>,
}

// SAFETY: the mapping is reached only through `region`, which may be shared.
unsafe impl Send for SharedMemory {}
// SAFETY: likewise.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// An empty region. The length of its file is a power of two, as required for a PCI device's memory; untouched
    /// pages use no memory.
    ///
    /// # Errors
    /// If the system refuses the file or its mapping.
    pub fn new(geometry: Geometry) -> io::Result<Self> {
        let bytes = geometry.region_size().next_power_of_two();
        let too_large = || io::Error::from(io::ErrorKind::InvalidInput);
        let size = usize::try_from(bytes).map_err(|_| too_large())?;
        let size = NonZeroUsize::new(size).ok_or_else(too_large)?;
        let file = memfd_create("kerf-vsock", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&file, i64::try_from(bytes).map_err(|_| too_large())?)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the system's choice takes nothing from anybody.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, &file, 0) }?;
        // SAFETY: the mapping is unmapped when `self` is dropped, and `region` is dropped with it.
        let memory = unsafe { Mapped::new(start.as_ptr().cast(), bytes) };
        let region = Region::format(memory, geometry).map_err(io::Error::other)?;
        Ok(Self {
            file,
            start,
            size,
            region,
        })
    }

    /// The region.
    pub fn region(&self) -> &Region<Mapped> {
        &self.region
    }

    /// Bytes of the file.
    pub fn size(&self) -> usize {
        self.size.get()
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nothing borrowed from it outlives `self`.
        let _ = unsafe { munmap(self.start, self.size.get()) };
    }
}
