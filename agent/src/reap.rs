//! Reaps orphans: the agent is the subreaper (or init) of its instance, so it inherits every process whose parent has
//! ended.

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};

/// Most orphans taken in one go.
const ORPHANS_MAX: usize = 1024;

/// Takes every ended child but `workload`, whose end its supervisor waits for. Returns how many.
pub fn orphans(workload: Option<i32>) -> usize {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    for count in 0..ORPHANS_MAX {
        let ended = match waitid(Id::All, look) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
            _ => return count,
        };
        // The workload's own end hides what ended after it until its supervisor has taken it; the
        // supervisor calls again then.
        if Some(ended.as_raw()) == workload || waitpid(ended, Some(WaitPidFlag::WNOHANG)).is_err() {
            return count;
        }
    }
    ORPHANS_MAX
}
