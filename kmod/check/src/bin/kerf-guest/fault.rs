//! A page that is not there until this process says so: who touches it in a system call sleeps in that call, with
//! the locks that it holds. Swap, FUSE and NFS do the same to a program.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::libc;

/// Of `linux/userfaultfd.h`.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const MODE_MISSING: u64 = 1;

const PAGE_BYTES: usize = 4096;

/// One page of memory, absent until [`Page::resolve`]. Never unmapped.
#[derive(Debug)]
pub(crate) struct Page {
    faults: OwnedFd,
    at: usize,
}

impl Page {
    pub(crate) fn absent() -> io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: it maps fresh memory, wherever there is room.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE_BYTES, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it takes flags and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
        let fd = fd.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: it is ours, just made.
        let faults = unsafe { OwnedFd::from_raw_fd(fd) };
        let page = Self {
            faults,
            at: at as usize,
        };
        page.ask(UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        page.ask(UFFDIO_REGISTER, &mut page.range(MODE_MISSING))?;
        Ok(page)
    }

    fn range(&self, mode: u64) -> [u64; 4] {
        [self.at as u64, PAGE_BYTES as u64, mode, 0]
    }

    fn ask<const N: usize>(&self, what: libc::c_ulong, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: each of the three calls above reads and writes as many words as it is given here.
        let result = unsafe { libc::ioctl(self.faults.as_raw_fd(), what, words.as_mut_ptr()) };
        (result == 0)
            .then_some(())
            .ok_or_else(io::Error::last_os_error)
    }

    /// Waits until somebody sleeps because of the page.
    pub(crate) fn wait_for_fault(&self) -> nix::Result<()> {
        /// A `struct uffd_msg`.
        const MESSAGE_BYTES: usize = 32;
        nix::unistd::read(&self.faults, &mut [0; MESSAGE_BYTES]).map(drop)
    }

    /// The page becomes zeros, and who waits for it goes on.
    pub(crate) fn resolve(&self) -> io::Result<()> {
        self.ask(UFFDIO_ZEROPAGE, &mut self.range(0))
    }

    /// Its bytes; reading one waits for [`Page::resolve`].
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the page stays mapped, and nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.at as *const u8, PAGE_BYTES) }
    }
}
