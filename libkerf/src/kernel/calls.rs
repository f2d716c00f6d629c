//! The two system calls that load, boot and halt an instance's kernel.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::libc;

/// The action that reboot(2) performs on an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Start the loaded kernel.
    Boot,
    /// Ask the kernel to halt; the call waits up to 30 s for it.
    Halt,
    /// Stop its CPUs.
    HaltForce,
}

impl Command {
    /// Returns its number.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Command::Boot => 0x4D4B_4C49,
            Command::Halt => 0x4D4B_4C48,
            Command::HaltForce => 0x4D4B_4C46,
        }
    }
}

/// The system calls to the kernel: the real ones, or a test's.
pub trait Calls {
    /// Loads an image for an instance.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    fn load(
        &self,
        id: u32,
        image: BorrowedFd<'_>,
        initrd: Option<BorrowedFd<'_>>,
        cmdline: &CStr,
    ) -> io::Result<()>;

    /// Unloads an instance's image.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    fn unload(&self, id: u32) -> io::Result<()>;

    /// Boots or halts an instance.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    fn reboot(&self, command: Command, id: u32) -> io::Result<()>;
}

/// The kernel that this process runs on. The caller must have checked that its files are those of a multikernel
/// kernel: other kernels give some of these flags another meaning.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemCalls;

const UNLOAD: libc::c_ulong = 1;
const NO_INITRAMFS: libc::c_ulong = 4;
const MULTIKERNEL: libc::c_ulong = 0x10;
const ID_SHIFT: u32 = 5;
const NO_FD: libc::c_long = -1;

const MAGIC_1: u32 = 0xfee1_dead;
const MAGIC_2: u32 = 672_274_793;

/// Returns the flags of a load for this instance.
fn flags(id: u32, others: libc::c_ulong) -> libc::c_ulong {
    (libc::c_ulong::from(id) << ID_SHIFT) & 0xffe0 | MULTIKERNEL | others
}

fn result(returned: libc::c_long) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl Calls for SystemCalls {
    #[allow(unsafe_code, reason = "kexec_file_load has no wrapper")]
    fn load(
        &self,
        id: u32,
        image: BorrowedFd<'_>,
        initrd: Option<BorrowedFd<'_>>,
        cmdline: &CStr,
    ) -> io::Result<()> {
        let others = if initrd.is_none() { NO_INITRAMFS } else { 0 };
        let initrd = initrd.map_or(NO_FD, |fd| libc::c_long::from(fd.as_raw_fd()));
        // The length includes the NUL; an empty line counts as none.
        let (line, length) = match cmdline.to_bytes_with_nul() {
            [0] => (std::ptr::null(), 0),
            bytes => (cmdline.as_ptr(), bytes.len()),
        };
        // SAFETY: both descriptors are open for the call or -1, and `line` is null with length 0, or
        // points at `length` bytes that live until the call returns, the last of them NUL.
        result(unsafe {
            libc::syscall(
                libc::SYS_kexec_file_load,
                libc::c_long::from(image.as_raw_fd()),
                initrd,
                length,
                line,
                flags(id, others),
            )
        })
    }

    #[allow(unsafe_code, reason = "kexec_file_load has no wrapper")]
    fn unload(&self, id: u32) -> io::Result<()> {
        let none = std::ptr::null::<libc::c_char>();
        // SAFETY: no descriptor and no command line are passed: the kernel reads no memory of this process.
        result(unsafe {
            libc::syscall(
                libc::SYS_kexec_file_load,
                NO_FD,
                NO_FD,
                0,
                none,
                flags(id, UNLOAD),
            )
        })
    }

    #[allow(unsafe_code, reason = "the wrappers of reboot know no such commands")]
    fn reboot(&self, command: Command, id: u32) -> io::Result<()> {
        // `struct { int mk_id; }`; ids of loadable instances are below 2048.
        let argument = id;
        // SAFETY: the argument is four bytes that live until the call returns, and the kernel writes
        // nothing there. A kernel that does not know the command refuses it.
        result(unsafe {
            libc::syscall(
                libc::SYS_reboot,
                MAGIC_1,
                MAGIC_2,
                command.code(),
                std::ptr::from_ref(&argument),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_carry_the_id_in_eleven_bits() {
        assert_eq!(flags(1, 0), 0x30);
        assert_eq!(flags(2047, UNLOAD), 0xffe0 | 0x11);
        assert_eq!(flags(3, NO_INITRAMFS), 0x60 | 0x14);
    }
}
