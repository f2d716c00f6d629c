//! The memory limit of the program, and detection of OOM kills.

use std::path::{Path, PathBuf};

use crate::figures::field;

/// Part of a guest's available memory, in percent, that its program may use: the rest is for the agent, the kernel's
/// buffers, and its reserve against an out-of-memory kill.
const GUEST_SHARE_PERCENT: u64 = 75;

/// The program's memory, and the source of its OOM kill count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that it may use; 0 when that is not limited.
    pub bytes: u64,
    /// The limit in force.
    pub held: Held,
}

/// The way in which a program's memory is limited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Held {
    /// Nothing that counts: limits of each process, or none.
    #[default]
    ByProcess,
    /// The cgroup in this directory, in which the program is started.
    ByCgroup(PathBuf),
    /// The kernel, which is the instance's own: what it kills for want of memory is this instance's.
    ByKernel,
}

impl Memory {
    /// The memory of an instance that is a process on the host: `bytes`, enforced by `cgroup` if there is one.
    pub fn of_process(bytes: u64, cgroup: Option<PathBuf>) -> Self {
        Self {
            bytes,
            held: cgroup.map_or(Held::ByProcess, Held::ByCgroup),
        }
    }

    /// The memory of a guest, according to its kernel.
    pub fn of_kernel() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let available_kib = field(&text, "MemAvailable").unwrap_or(0);
        Self {
            bytes: available_kib.saturating_mul(1024) / 100 * GUEST_SHARE_PERCENT,
            held: Held::ByKernel,
        }
    }

    /// The cgroup in which the program is started, when it is another than the agent's.
    pub(super) fn cgroup(&self) -> Option<&Path> {
        match &self.held {
            Held::ByCgroup(directory) => Some(directory),
            Held::ByProcess | Held::ByKernel => None,
        }
    }

    /// Processes of the instance that the kernel has killed for want of memory; `None` when it does not say.
    pub(super) fn oom_kills(&self) -> Option<u64> {
        let file = match &self.held {
            Held::ByProcess => return None,
            // Since Linux 4.13.
            Held::ByCgroup(directory) => directory.join("memory.events"),
            Held::ByKernel => "/proc/vmstat".into(),
        };
        field(&std::fs::read_to_string(file).ok()?, "oom_kill")
    }

    /// Explains a kill that [`Memory::oom_kills`] has counted, to follow the program's exit status.
    pub(super) fn oom_text(&self) -> String {
        match &self.held {
            Held::ByCgroup(_) => format!(
                "; the kernel killed it because it exceeded its memory of {} bytes (oom_kill)",
                self.bytes
            ),
            Held::ByProcess | Held::ByKernel => {
                "; its kernel ran out of memory and killed a process (oom_kill)".to_owned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kills_of_a_cgroup_are_those_that_its_events_count() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::of_process(1 << 20, Some(dir.path().to_owned()));
        assert_eq!(memory.oom_kills(), None);
        let events = "low 0\nhigh 0\nmax 41\noom 2\noom_kill 3\noom_group_kill 1\n";
        std::fs::write(dir.path().join("memory.events"), events).unwrap();
        assert_eq!(memory.oom_kills(), Some(3));
        assert!(memory.oom_text().ends_with("1048576 bytes (oom_kill)"));
        assert_eq!(Memory::of_process(1 << 20, None).oom_kills(), None);
    }
}
