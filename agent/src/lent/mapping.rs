//! All code that handles mapped addresses.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::COPY_BYTES;

/// Mappings begin at a multiple of this, bytes: of any page size that Linux has.
const MAP_ALIGN: u64 = 64 * 1024;

/// Has the kernel copy at most `wanted` bytes at `offset` of `file` to the beginning of `to`; how many it has
/// copied, at least one.
pub(super) fn copy(file: &File, offset: u64, wanted: usize, to: &File) -> io::Result<usize> {
    let begin = offset / MAP_ALIGN * MAP_ALIGN;
    let skipped = usize::try_from(offset - begin).map_err(io::Error::other)?;
    let wanted = wanted.min(usize::try_from(COPY_BYTES).unwrap_or(usize::MAX));
    let length = NonZeroUsize::new(skipped + wanted).ok_or(ErrorKind::InvalidInput)?;
    let begin = i64::try_from(begin).map_err(io::Error::other)?;
    let access = ProtFlags::PROT_READ;
    // SAFETY: a new mapping at an address of the system's choice takes nothing from anybody.
    let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, begin) }?;
    // SAFETY: these addresses are within the mapping, which lasts until after the call. No reference to them is
    // made and nothing here reads them: the kernel does, and answers EFAULT where it cannot.
    let copied = unsafe {
        let from = start.as_ptr().cast::<u8>().add(skipped);
        nix::libc::pwrite(to.as_raw_fd(), from.cast_const().cast(), wanted, 0)
    };
    let copied = Errno::result(copied);
    // SAFETY: mapped above, and nothing points into it any more.
    unsafe { munmap(start, length.get()) }?;
    match usize::try_from(copied?) {
        Ok(0) | Err(_) => Err(ErrorKind::WriteZero.into()),
        Ok(count) => Ok(count),
    }
}
