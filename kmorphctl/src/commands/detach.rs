//! Starts a program in its own session, so that it outlives the terminal.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use kmorph_launch::{FIRST_OTHER, close_on_exec_from};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Starts `command` without a terminal, with `log` as its output, no input and no other descriptors. SIGHUP is
/// blocked in it until it unblocks the signal.
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
        // A blocked signal waits until the program can handle it, instead of ending the program.
        nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&hangup), None)?;
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec. It makes only async-signal-safe system calls, allocates
    // nothing and takes no lock.
    unsafe {
        command.pre_exec(detach);
    }
    command.spawn()
}
