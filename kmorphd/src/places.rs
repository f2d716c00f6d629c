//! Checks the configured paths, and creates the control socket.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kmorph_files::{OwnDir, PRIVATE_DIR, Refusal};
use kmorph_launch::handover::SOCKET_PATH_MAX_BYTES;

use crate::Start;
use crate::run::Fault;

/// Mode of root's runtime directory: who may look reaches the control socket in it.
const ROOTS_RUN_DIR: u32 = 0o755;

/// Below the runtime directory, the longest path of a socket of an instance with the shortest name.
const SHORTEST_INSTANCE: &str = "/instances/a/1/handover.sock";

/// Refuses paths that no socket can have.
///
/// # Errors
/// If the control socket's is too long, or the runtime directory's for the sockets of any instance.
pub(crate) fn fit(run_dir: &Path, socket: &Path) -> Result<(), String> {
    let over = |length: usize| length.saturating_sub(SOCKET_PATH_MAX_BYTES - 1);
    match over(socket.as_os_str().len()) {
        0 => {}
        bytes => {
            return Err(format!(
                "invalid control socket {socket:?}: {bytes} bytes too long for a socket's path; give a shorter one \
                 with --socket or paths.socket"
            ));
        }
    }
    match over(run_dir.as_os_str().len() + SHORTEST_INSTANCE.len()) {
        0 => Ok(()),
        bytes => Err(format!(
            "invalid runtime directory {run_dir:?}: {bytes} bytes too long for the paths of sockets in it; give a \
             shorter one with --run-dir or paths.run_dir"
        )),
    }
}

/// A directory for sockets and instances. That of a user is not for others unless it was made so before.
pub(crate) fn make_dir(path: &Path) -> Result<OwnDir, Fault> {
    let mode = match nix::unistd::Uid::effective().is_root() {
        true => ROOTS_RUN_DIR,
        false => PRIVATE_DIR,
    };
    OwnDir::make(path, mode).map_err(unusable)
}

/// Looks at the directories that are used, or at what is there of the way to them, as the start does, and makes none.
///
/// # Errors
/// If another user could change what the daemon writes there, or the system refuses.
pub(crate) fn look(start: &Start) -> Result<(), Fault> {
    let beside = start.socket.parent().unwrap_or(&start.socket);
    let used = [&start.places.state_dir, &start.places.run_dir];
    let used: Vec<&Path> = used
        .into_iter()
        .map(PathBuf::as_path)
        .chain([beside])
        .collect();
    for directory in used {
        if let Some(there) = directory.ancestors().find(|path| path.exists()) {
            OwnDir::shared(there).map_err(unusable)?;
        }
    }
    Ok(())
}

pub(crate) fn unusable(refusal: Refusal) -> Fault {
    format!("{refusal}; choose other directories with --state-dir, --run-dir or [paths]").into()
}

/// The socket's path, without symbolic links and free of what an earlier daemon left there. The lock on the state
/// directory is held already, but another daemon with another state directory may use the same socket.
pub(crate) fn free_socket(path: &Path) -> Result<PathBuf, Fault> {
    let failed = |what: String| Fault::from(format!("the control socket {path:?} {what}"));
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed(
            "does not name a file; choose another path".to_owned(),
        ));
    };
    let parent = match parent.exists() {
        true => OwnDir::shared(parent).map_err(unusable)?,
        false => make_dir(parent)?,
    };
    let path = parent.path().join(name);
    let there = match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(path),
        Err(error) => return Err(failed(format!("cannot be examined: {error}"))),
        Ok(there) => there,
    };
    if !there.file_type().is_socket() {
        let text = "cannot be created: the path exists and is not a socket; choose another path";
        return Err(failed(text.to_owned()));
    }
    let own = nix::unistd::Uid::effective().as_raw();
    if there.uid() != own {
        let owner = there.uid();
        let text = format!(
            "cannot be created: uid {owner} has a socket there; remove it, or choose another path"
        );
        return Err(failed(text));
    }
    match std::os::unix::net::UnixStream::connect(&path) {
        Ok(_) => Err(format!("another daemon is using the control socket {path:?}").into()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(&path)?;
            Ok(path)
        }
        Err(_) => Ok(path),
    }
}
