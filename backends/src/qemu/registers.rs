//! Reads the registers of a guest's CPUs, which only QEMU knows, by means of an almost empty dump.
//!
//! QEMU stops a running guest for the dump, which can cut a vsock connection that is being established. So this must
//! not be used on a guest that is to continue.

use std::io;
use std::path::Path;

use serde_json::json;

use super::{qmp, run_dir};
use crate::contract::REGISTERS;

/// Size of the dumped memory, bytes: QEMU's dumps contain at least some.
const MEMORY_BYTES: u64 = 4096;

/// Writes the registers into the run directory.
pub(super) async fn save(run_dir: &Path) -> io::Result<()> {
    let arguments = json!({
        "paging": false,
        "protocol": format!("file:{}", run_dir.join(REGISTERS).display()),
        "begin": 0,
        "length": MEMORY_BYTES,
    });
    let commands = run_dir.join(run_dir::COMMANDS);
    qmp::command(&commands, "dump-guest-memory", Some(arguments)).await?;
    Ok(())
}
