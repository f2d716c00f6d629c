//! Descriptors that a program inherits, and those that it must not inherit.
//!
//! Everything that kmorph opens is close-on-exec from the start. Descriptors inherited from the caller are not: the
//! daemon, its agents and their workloads would hold, for example, a deploy script's lock for as long as they run.

use std::io;
use std::os::fd::RawFd;

use rustix::io::Errno;

/// Environment variable with the numbers of the listening sockets that an agent of the embedded backend inherits, joined
/// by `:`.
pub const LISTENERS_ENV: &str = "KMORPH_LISTENERS";
/// First descriptor after the standard streams.
pub const FIRST_OTHER: RawFd = 3;
/// Descriptors that are looked at where the kernel cannot do it at once (before Linux 5.11).
const LOOKED_AT: RawFd = 65_536;

/// Has no program that is executed from now on inherit `first` or any higher descriptor, as they are now. Makes
/// system calls only: it may be called between fork and exec.
///
/// # Errors
/// The system's.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    match close_range(first, RawFd::MAX, flags) {
        Err(Errno::NOSYS | Errno::INVAL) => {}
        other => return Ok(other?),
    }
    for number in first..LOOKED_AT {
        // SAFETY: F_SETFD changes a flag of a descriptor of this process, or fails when there is none of this number.
        unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Closes every descriptor but the standard streams and `kept`.
///
/// # Errors
/// The system's.
///
/// # Safety
/// Nothing in this process owns any of them: called before it has opened anything, or when all that it has opened is
/// in `kept`.
pub unsafe fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept = kept.to_vec();
    kept.sort_unstable();
    let mut first = FIRST_OTHER;
    for number in kept {
        if number > first {
            close(first, number - 1)?;
        }
        first = first.max(number.saturating_add(1));
    }
    Ok(close(first, RawFd::MAX)?)
}

fn close(first: RawFd, last: RawFd) -> rustix::io::Result<()> {
    match close_range(first, last, 0) {
        Err(Errno::NOSYS) => {}
        other => return other,
    }
    for number in first..=last.min(LOOKED_AT) {
        // SAFETY: as the caller of `close_all_but` promises, nobody owns it; where there is none, it fails.
        unsafe { libc::close(number) };
    }
    Ok(())
}

fn close_range(first: RawFd, last: RawFd, flags: libc::c_uint) -> rustix::io::Result<()> {
    // SAFETY: the call takes numbers only. What it closes nobody owns (see the callers); what it marks stays open.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
        0 => Ok(()),
        // libc keeps the reason, and nothing is allocated to read it.
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
}
