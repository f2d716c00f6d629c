//! Confinement of the agent in the embedded backend, set up before the agent starts anything: its own session, its
//! CPUs, a limit on memory. The workload inherits all of it.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::Pid;

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {}", errno.desc())]
pub struct ConfineError {
    what: String,
    errno: Errno,
}

fn failed(what: impl Into<String>) -> impl FnOnce(Errno) -> ConfineError {
    let what = what.into();
    |errno| ConfineError { what, errno }
}

/// Applies `cpus` (host CPU numbers; empty: no change) and `memory_bytes` (0: no limit) to this
/// process. The memory limit is RLIMIT_DATA, private writable memory of each process: see
/// getrlimit(2).
///
/// # Errors
/// If the system refuses, for instance for a CPU that is not online.
pub fn confine(cpus: &[u16], memory_bytes: u64) -> Result<(), ConfineError> {
    match nix::unistd::setsid() {
        // Already the leader of its session.
        Ok(_) | Err(Errno::EPERM) => {}
        Err(errno) => return Err(failed("making a session")(errno)),
    }
    nix::sys::prctl::set_child_subreaper(true).map_err(failed("becoming a subreaper"))?;
    if !cpus.is_empty() {
        let mut set = CpuSet::new();
        for cpu in cpus {
            let what = format!("CPU {cpu} cannot be used");
            set.set(usize::from(*cpu)).map_err(failed(what))?;
        }
        let what = format!("setting the affinity to CPUs {cpus:?}");
        sched_setaffinity(Pid::from_raw(0), &set).map_err(failed(what))?;
    }
    if memory_bytes > 0 {
        let what = format!("limiting private memory to {memory_bytes} bytes");
        setrlimit(Resource::RLIMIT_DATA, memory_bytes, memory_bytes).map_err(failed(what))?;
    }
    Ok(())
}
