//! A guest that executes nothing for a while and then goes on, with its clock.
//!
//! QEMU itself is asked, and not its process stopped: the guest's clock stands still too, so that nothing in it
//! takes the pause for a lockup. QEMU takes the vsock device's queues back meanwhile, so that nothing is written into
//! the guest's memory; a vsock connection that is being made then can be cut, one that is there is not.

use std::io;
use std::path::Path;

use super::{qmp, run_dir};

/// Stops every CPU and device of the guest that runs from `run_dir`.
pub(super) async fn freeze(run_dir: &Path) -> io::Result<()> {
    let commands = run_dir.join(run_dir::COMMANDS);
    qmp::command(&commands, "stop", None).await?;
    match qmp::status(&commands).await?.as_str() {
        "running" => Err(io::Error::other("QEMU says that it still runs")),
        _ => Ok(()),
    }
}

/// Has them go on. A guest whose kernel panicked at the last moment stays as it is.
pub(super) async fn resume(run_dir: &Path) -> io::Result<()> {
    let commands = run_dir.join(run_dir::COMMANDS);
    if qmp::status(&commands).await? != "paused" {
        return Ok(());
    }
    qmp::command(&commands, "cont", None).await?;
    match qmp::status(&commands).await?.as_str() {
        "paused" => Err(io::Error::other("QEMU says that it still stands still")),
        _ => Ok(()),
    }
}
