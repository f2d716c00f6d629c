//! How the kernel of a guest schedules the agent: before the workload, and on one CPU.
//!
//! The agent goes before the workload, because an answer that waits for a busy program looks like a failure.
//!
//! The thread that answers heartbeats stays on the first CPU. A CPU that hangs with interrupts off looks idle to the
//! scheduler of the others (`select_idle_sibling`), which goes on handing it threads that wake up; a thread that it has
//! been handed never runs again, and the silence of the agent would hide which CPU hangs. Pinned, the thread outlives
//! every CPU but its own. Everything else in the agent, and the workload, uses all CPUs.

use std::io;

use kmorph_launch::niceness;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The agent's niceness in a guest, or the one that it was started with when that is lower.
const NICENESS: i32 = -10;

/// The niceness and the CPUs that the agent was started with, as far as the agent has changed its own. The workload
/// and the agent's other threads use them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scheduling {
    niceness: Option<i32>,
    cpus: Option<CpuSet>,
}

impl Scheduling {
    /// Raises this process, whose threads are still to come.
    ///
    /// # Errors
    /// The system's: only root may go first.
    pub fn go_first(&mut self) -> io::Result<()> {
        let before = niceness::own()?;
        niceness::set_own(before.min(NICENESS))?;
        self.niceness = Some(before);
        Ok(())
    }

    /// Has the calling thread, and those that it starts, run on the first of the CPUs that it may use, which is
    /// returned.
    ///
    /// # Errors
    /// The system's.
    pub fn stay_on_first_cpu(&mut self) -> io::Result<usize> {
        let usable = sched_getaffinity(THIS_THREAD)?;
        let first = cpus_of(&usable).next().ok_or(io::ErrorKind::NotFound)?;
        let mut own = CpuSet::new();
        own.set(first)?;
        sched_setaffinity(THIS_THREAD, &own)?;
        self.cpus = Some(usable);
        Ok(first)
    }

    /// The CPUs that this thread may use, or could before it stayed on the first one.
    ///
    /// # Errors
    /// The system's.
    pub fn usable_cpus(&self) -> io::Result<Vec<usize>> {
        let usable = self
            .cpus
            .map_or_else(|| sched_getaffinity(THIS_THREAD), Ok)?;
        Ok(cpus_of(&usable).collect())
    }

    /// Gives the calling thread the niceness and the CPUs that the agent was started with. System calls only, and no memory:
    /// may be called between fork and exec.
    ///
    /// # Errors
    /// The system's.
    pub fn restore(&self) -> io::Result<()> {
        self.restore_cpus()?;
        let Some(niceness) = self.niceness else {
            return Ok(());
        };
        niceness::set_own(niceness)
    }

    /// Lets the calling thread use the CPUs that the agent was started with.
    ///
    /// # Errors
    /// The system's.
    pub fn restore_cpus(&self) -> io::Result<()> {
        let cpus = self.cpus.as_ref();
        Ok(cpus.map_or(Ok(()), |cpus| sched_setaffinity(THIS_THREAD, cpus))?)
    }
}

/// See sched_setaffinity(2).
const THIS_THREAD: Pid = Pid::from_raw(0);

fn cpus_of(set: &CpuSet) -> impl Iterator<Item = usize> {
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workload_is_as_nice_as_the_agent_was() {
        // Only root may; and this thread's own niceness is all that is changed, on Linux.
        if !nix::unistd::Uid::effective().is_root() {
            return;
        }
        let now = || niceness::own().unwrap();
        let before = now();
        let mut started_with = Scheduling::default();
        started_with.go_first().unwrap();
        assert_eq!(now(), NICENESS.min(before));
        started_with.restore().unwrap();
        assert_eq!(now(), before);
    }

    #[test]
    fn one_thread_stays_on_the_first_cpu_and_others_use_all() {
        let now = || cpus_of(&sched_getaffinity(THIS_THREAD).unwrap()).collect::<Vec<_>>();
        let before = now();
        let mut started_with = Scheduling::default();
        assert_eq!(started_with.usable_cpus().unwrap(), before);
        let first = started_with.stay_on_first_cpu().unwrap();
        assert_eq!((first, now()), (before[0], before[..1].to_vec()));
        assert_eq!(started_with.usable_cpus().unwrap(), before);
        started_with.restore().unwrap();
        assert_eq!(now(), before);
    }
}
