//! Limits the memory of the processes in a cgroup with the kernel's memory controller.
//!
//! ```text
//! <place>                          subtree_control: memory   \
//! <place>/kmorph                   subtree_control: memory    | nothing may run in these themselves
//! <place>/kmorph/<run directory>   subtree_control: memory    |
//!        /<instance>.<generation>  subtree_control: memory   /
//!            /agent                not limited
//!            /workload             memory.max, memory.swap.max = 0, memory.oom.group = 1
//! ```
//!
//! The agent has its own cgroup next to the workload's: it is never killed because of the workload's memory, and can
//! report the kill.

use std::io;
use std::path::{Path, PathBuf};

use super::{Cgroup, Cgroups, NoCgroups};

const CONTROL: &str = "cgroup.subtree_control";
const CONTROLLER: &str = "memory";
/// Name of the cgroup for a limited generation's agent.
const AGENT: &str = "agent";
/// Name of the cgroup for its workload.
const WORKLOAD: &str = "workload";
/// Limit of the trial, bytes. No process runs below it.
const TRIAL_BYTES: u64 = 1 << 20;

/// A divided cgroup of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Divided {
    /// Directory of the agent's cgroup.
    pub(crate) agent: PathBuf,
    /// Directory of the workload's cgroup, which is limited to the generation's memory.
    pub(crate) workload: PathBuf,
}

impl Cgroups {
    /// Divides the cgroup of a generation before any process runs in it, and limits its workload to `bytes`.
    ///
    /// # Errors
    /// The kernel's error. The cgroup is then undivided, so that processes can enter it.
    pub(crate) fn divide(&self, whole: &Cgroup, bytes: u64) -> io::Result<Divided> {
        self.enable()?;
        let divided = Divided {
            agent: whole.path().join(AGENT),
            workload: whole.path().join(WORKLOAD),
        };
        divided.make(whole, bytes).inspect_err(|_| {
            for directory in [&divided.agent, &divided.workload] {
                let _ = std::fs::remove_dir(directory);
            }
            let _ = write(whole.path(), CONTROL, "-memory");
        })?;
        Ok(divided)
    }

    /// Enables the controller for the cgroups of this daemon's generations.
    fn enable(&self) -> io::Result<()> {
        if has_controller(&self.base, CONTROL)? {
            return Ok(());
        }
        let mut above: Vec<&Path> = self.base.ancestors().take(3).collect();
        above.reverse();
        above
            .into_iter()
            .try_for_each(|directory| write(directory, CONTROL, "+memory"))
    }

    /// Tries the controller with the cgroup `trial`.
    ///
    /// # Errors
    /// Why the memory of instances cannot be limited.
    pub(super) fn try_memory(&self, trial: &Cgroup) -> Result<(), NoCgroups> {
        let place = self.base.ancestors().nth(2).unwrap_or(&self.base);
        let offered = has_controller(place, "cgroup.controllers");
        let offered = offered.map_err(|error| NoCgroups(error.to_string()))?;
        if !offered {
            return Err(NoCgroups(format!(
                "the memory controller is not in {:?}: the kernel has it in cgroups of version 1, it is disabled \
                 (cgroup_disable=memory), or the creator of the cgroup has not enabled it there",
                place.join("cgroup.controllers")
            )));
        }
        match self.divide(trial, TRIAL_BYTES) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                Err(NoCgroups(format!(
                    "processes run in the cgroup {place:?} itself, so its memory controller cannot be enabled: start \
                 kmorphd, and all other processes there, in cgroups below it"
                )))
            }
            Err(error) => Err(NoCgroups(format!("limiting memory in a cgroup: {error}"))),
        }
    }
}

impl Divided {
    fn make(&self, whole: &Cgroup, bytes: u64) -> io::Result<()> {
        write(whole.path(), CONTROL, "+memory")?;
        std::fs::create_dir(&self.agent)?;
        std::fs::create_dir(&self.workload)?;
        write(&self.workload, "memory.max", &bytes.to_string())?;
        // Kill a workload as a whole: its remaining processes are seldom useful after one of them is gone.
        write(&self.workload, "memory.oom.group", "1")?;
        // The file is missing without CONFIG_SWAP, or with swapaccount=0.
        match write(&self.workload, "memory.swap.max", "0") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            written => written,
        }
    }
}

fn has_controller(directory: &Path, file: &str) -> io::Result<bool> {
    let path = directory.join(file);
    let list = std::fs::read_to_string(&path)
        .map_err(|error| io::Error::new(error.kind(), format!("reading {path:?}: {error}")))?;
    Ok(list.split_whitespace().any(|name| name == CONTROLLER))
}

/// Writes to a file that the kernel has created. (A missing file must not be created.)
fn write(directory: &Path, file: &str, text: &str) -> io::Result<()> {
    use std::io::Write;
    let path = directory.join(file);
    let mut file = std::fs::File::options().write(true).open(path)?;
    file.write_all(text.as_bytes())
}
