//! The key of a generation: made at its spawn, told to its agent, and kept in the run directory for the daemon
//! and those after it. It is in no placement, so that it reaches neither the journal nor the API.

use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kmorph_launch::Secret;
use nix::libc::O_NOFOLLOW;

use crate::contract::Placement;

/// The file, in the run directory: 64 hexadecimal digits, mode 0600.
pub const KEY_FILE: &str = "agent.key";
/// Longest file that is read, bytes: the digits, and a newline.
const KEY_FILE_MAX_BYTES: u64 = 65;

/// A new key.
///
/// # Errors
/// When the system has no random numbers.
pub(crate) fn make() -> io::Result<Secret> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(Secret::new(bytes))
}

/// Keeps `key` in a run directory, in place of that of a spawn that failed.
///
/// # Errors
/// The system's.
pub(crate) fn keep(run_dir: &Path, key: &Secret) -> io::Result<()> {
    write_private(&run_dir.join(KEY_FILE), key.digits().as_bytes())
}

/// Writes a file that only its owner reads, as a new one.
///
/// # Errors
/// The system's.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = std::fs::OpenOptions::new();
    let options = options.write(true).create_new(true).mode(0o600);
    options.open(path)?.write_all(content)
}

/// The key of a generation.
///
/// # Errors
/// The system's, and `InvalidData` when the file is not one of [`KEY_FILE`]'s.
pub fn of(placement: &Placement) -> io::Result<Secret> {
    let mut options = std::fs::OpenOptions::new();
    let options = options.read(true).custom_flags(O_NOFOLLOW);
    let file = options.open(placement.run_dir.join(KEY_FILE))?;
    let mut digits = String::new();
    file.take(KEY_FILE_MAX_BYTES).read_to_string(&mut digits)?;
    Secret::from_digits(digits.trim_end()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
