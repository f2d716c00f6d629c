//! The contents of a generation's run directory.

use std::path::Path;

use kmorph_files::{OwnDir, PRIVATE_DIR};
use kmorph_launch::handover::SOCKET_PATH_MAX_BYTES;

use crate::contract::{REGISTERS, SpawnError, SpawnSpec};
use crate::finding::PLACEMENT;

/// The guest's initramfs.
pub(super) const INITRAMFS: &str = "initramfs.img";
/// QEMU's socket for commands.
pub(super) const COMMANDS: &str = "qmp.sock";
/// QEMU's socket for events.
pub(super) const EVENTS: &str = "events.sock";
/// The vhost-user device's socket for QEMU.
pub(super) const VHOST: &str = "vhost.sock";
/// The socket of a vhost-user device for the daemon's connections to the guest (CONNECT 9000).
pub(super) const VSOCK: &str = "vsock.sock";
/// The guest's console output.
pub(super) const CONSOLE: &str = "console.log";
/// QEMU's output.
pub(super) const QEMU_LOG: &str = "qemu.log";
/// Output of the vhost-user device.
pub(super) const VHOST_LOG: &str = "vhost.log";
/// The logs, which a release keeps.
pub(super) const LOGS: [&str; 3] = [CONSOLE, QEMU_LOG, VHOST_LOG];
/// Everything else, which a release removes.
pub(super) const REMOVED: [&str; 8] = [
    crate::key::KEY_FILE,
    PLACEMENT,
    INITRAMFS,
    COMMANDS,
    EVENTS,
    VHOST,
    VSOCK,
    REGISTERS,
];

/// Refuses a directory in which the longest socket path would not fit.
pub(super) fn check(directory: &Path) -> Result<(), SpawnError> {
    let longest = directory.join(EVENTS);
    let length = longest.as_os_str().len() + 1;
    if length <= SOCKET_PATH_MAX_BYTES {
        return Ok(());
    }
    let over = length - SOCKET_PATH_MAX_BYTES;
    Err(SpawnError::Refused(format!(
        "the socket {longest:?} would be {over} bytes too long for a socket's path; use a shorter \
         instance name or run directory"
    )))
}

/// Creates the directory, mode 0700.
pub(super) fn create(spec: &SpawnSpec) -> std::io::Result<OwnDir> {
    Ok(OwnDir::make(&spec.run_dir, PRIVATE_DIR)?)
}
