//! In a guest the agent goes before the workload: an answer that waits for a busy program looks like a failure.

use std::io;

use kmorph_launch::niceness;

/// The agent's niceness in a guest, or the one that it was started with when that is lower.
const NICENESS: i32 = -10;

/// Raises this process, whose threads are still to come. Returns the niceness that it was started with, which
/// is the workload's.
///
/// # Errors
/// The system's: only root may go first.
pub fn go_first() -> io::Result<i32> {
    let before = niceness::own()?;
    niceness::set_own(before.min(NICENESS))?;
    Ok(before)
}

/// Makes this process as nice as that. One system call, and no memory: it may be called between fork and exec.
pub(crate) fn become_as_nice_as(niceness: i32) -> io::Result<()> {
    niceness::set_own(niceness)
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
        let before = go_first().unwrap();
        let now = || niceness::own().unwrap();
        assert_eq!(now(), NICENESS.min(before));
        become_as_nice_as(before).unwrap();
        assert_eq!(now(), before);
    }
}
