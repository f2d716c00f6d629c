//! Freezes a guest and its clock for a while, and resumes it.
//!
//! The backend asks QEMU instead of stopping its process: this way the guest's clock stops too, so that nothing in
//! the guest mistakes the pause for a lockup. Meanwhile QEMU stops the queues of the vsock device, so that nothing
//! writes to the guest's memory; this can cut a vsock connection that is being established, but not an established
//! one.

use std::io;
use std::path::Path;

use super::{qmp, run_dir};

/// Stops all CPUs and devices of the guest with this run directory.
pub(super) async fn freeze(run_dir: &Path) -> io::Result<()> {
    let commands = run_dir.join(run_dir::COMMANDS);
    qmp::command(&commands, "stop", None).await?;
    match qmp::status(&commands).await?.as_str() {
        "running" => Err(io::Error::other(
            "QEMU reports that the guest is still running",
        )),
        _ => Ok(()),
    }
}

/// Resumes the CPUs and devices. A guest whose kernel panicked in the last moment stays stopped.
pub(super) async fn resume(run_dir: &Path) -> io::Result<()> {
    let commands = run_dir.join(run_dir::COMMANDS);
    if qmp::status(&commands).await? != "paused" {
        return Ok(());
    }
    qmp::command(&commands, "cont", None).await?;
    match qmp::status(&commands).await?.as_str() {
        "paused" => Err(io::Error::other(
            "QEMU reports that the guest is still paused",
        )),
        _ => Ok(()),
    }
}
