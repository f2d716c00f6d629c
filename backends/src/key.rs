//! The key of a generation: generated at its spawn, given to its agent, and kept in the run directory for this daemon
//! and later ones. It is not in the placement, so it reaches neither the journal nor the API.

use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use kmorph_files::OwnDir;
use kmorph_launch::Secret;
use rustix::fs::OFlags;

use crate::contract::Placement;

/// Name of the file in the run directory: 64 hexadecimal digits, mode 0600.
pub const KEY_FILE: &str = "agent.key";
/// Maximum size of the file, bytes: the digits, and a newline.
const KEY_FILE_MAX_BYTES: u64 = 65;

/// Generates a new key.
///
/// # Errors
/// If the system has no random numbers.
pub(crate) fn make() -> io::Result<Secret> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(Secret::new(bytes))
}

/// Writes `key` to a run directory; replaces the key of a failed spawn.
///
/// # Errors
/// The system's error.
pub(crate) fn keep(run_dir: &OwnDir, key: &Secret) -> io::Result<()> {
    Ok(run_dir.write(KEY_FILE, key.digits().as_bytes())?)
}

/// Reads the key of a generation.
///
/// # Errors
/// The system's error, and `InvalidData` if the file does not have the format of [`KEY_FILE`].
pub fn of(placement: &Placement) -> io::Result<Secret> {
    let mut options = std::fs::OpenOptions::new();
    let options = options
        .read(true)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    let file = options.open(placement.run_dir.join(KEY_FILE))?;
    let mut digits = String::new();
    file.take(KEY_FILE_MAX_BYTES).read_to_string(&mut digits)?;
    Secret::from_digits(digits.trim_end()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
