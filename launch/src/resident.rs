//! Locking a process in memory, so that paging on the host does not look like silence.

use std::io;

use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Keeps every page that this process has touched or will touch in memory, so that neither a
/// heartbeat nor its judgement waits for a disk. What is never touched costs nothing.
///
/// False when it may not: without privilege there is a limit on locked memory (RLIMIT_MEMLOCK), and
/// allocations beyond it would fail from then on. Children do not inherit the lock.
///
/// # Errors
/// If the system refuses for another reason.
pub fn stay_resident() -> io::Result<bool> {
    let before = getrlimit(Resource::Memlock);
    let with_soft = |current| Rlimit {
        current,
        maximum: before.maximum,
    };
    if before.maximum.is_none() {
        setrlimit(Resource::Memlock, with_soft(None))?;
        lock()?;
        return Ok(true);
    }
    // With a limit of 0, only who is under no limit at all (CAP_IPC_LOCK) may lock (mlock(2), EPERM).
    setrlimit(Resource::Memlock, with_soft(Some(0)))?;
    let locked = lock();
    setrlimit(Resource::Memlock, before)?;
    match locked {
        Ok(()) => Ok(true),
        Err(Errno::PERM) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn lock() -> rustix::io::Result<()> {
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
}
