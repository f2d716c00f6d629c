//! Locking a process in memory, so that paging on the host does not look like silence.

use std::io;

use nix::errno::Errno;
use nix::libc::MCL_ONFAULT;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// Keeps every page that this process has touched or will touch in memory, so that neither a
/// heartbeat nor its judgement waits for a disk. What is never touched costs nothing.
///
/// False when it may not: without privilege there is a limit on locked memory (RLIMIT_MEMLOCK), and
/// allocations beyond it would fail from then on. Children do not inherit the lock.
///
/// # Errors
/// If the system refuses for another reason.
pub fn stay_resident() -> io::Result<bool> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    if hard == RLIM_INFINITY {
        setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard)?;
        lock()?;
        return Ok(true);
    }
    // With a limit of 0, only who is under no limit at all (CAP_IPC_LOCK) may lock (mlock(2), EPERM).
    setrlimit(Resource::RLIMIT_MEMLOCK, 0, hard)?;
    let locked = lock();
    setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard)?;
    match locked {
        Ok(()) => Ok(true),
        Err(Errno::EPERM) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn lock() -> nix::Result<()> {
    let touched = MlockAllFlags::from_bits_retain(MCL_ONFAULT);
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | touched)
}
