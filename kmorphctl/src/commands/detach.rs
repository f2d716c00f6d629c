//! Starts a program in its own session, so that it outlives the terminal.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use kmorph_launch::{FIRST_OTHER, close_on_exec_from};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Starts `command` with no terminal, `log` as its output, nothing as its input and no other descriptor. SIGHUP is
/// blocked in it until it unblocks that.
///
/// # Errors
/// If it cannot be started.
pub(super) fn start(mut command: Command, log: &File) -> std::io::Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?);
    let mut hangup = SigSet::empty();
    hangup.add(Signal::SIGHUP);
    let detach = move || {
        nix::unistd::setsid()?;
        close_on_exec_from(FIRST_OTHER)?;
        // Sent before the program can handle it, it waits instead of ending the program.
        nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&hangup), None)?;
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec. It makes system calls that are async-signal-safe, allocates
    // nothing and takes no lock.
    unsafe {
        command.pre_exec(detach);
    }
    command.spawn()
}
