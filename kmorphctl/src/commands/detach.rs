//! Starts a program in a session of its own, so that it outlives the terminal it was started from.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Starts `command` with no terminal, `log` as its output and nothing as its input.
///
/// # Errors
/// When it cannot be started.
pub(super) fn start(mut command: Command, log: &File) -> std::io::Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?);
    // SAFETY: the closure runs between fork and exec. It makes one system call, setsid, which is
    // async-signal-safe, allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
    command.spawn()
}
