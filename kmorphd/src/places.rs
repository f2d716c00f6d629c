//! What is wrong with the places that the daemon is told to use, found out without making anything.

use std::path::Path;

use kmorph_files::OwnDir;

/// Size of the path in a socket's address, with the NUL at its end (unix(7)).
const SOCKET_PATH_MAX: usize = 108;
/// Below the runtime directory, the longest path of a socket of an instance with the shortest name.
const SHORTEST_INSTANCE: &str = "/instances/a/1/handover.sock";

/// Refuses paths that no socket can have.
///
/// # Errors
/// When the control socket's is too long, or the runtime directory's for the sockets of any instance.
pub(crate) fn fit(run_dir: &Path, socket: &Path) -> Result<(), String> {
    let over = |length: usize| length.saturating_sub(SOCKET_PATH_MAX - 1);
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

/// Looks at the directories, or at what is there of the way to them, the way the start does.
///
/// # Errors
/// When another user could change what the daemon writes there, or the system refuses.
pub(crate) fn look(directories: &[&Path]) -> Result<(), kmorph_files::Refusal> {
    for directory in directories {
        if let Some(there) = directory.ancestors().find(|path| path.exists()) {
            OwnDir::shared(there)?;
        }
    }
    Ok(())
}
