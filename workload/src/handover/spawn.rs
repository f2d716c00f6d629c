//! Passes descriptors from an agent to its workload.
//!
//! Listening sockets follow the convention of socket activation (sd_listen_fds(3)): `LISTEN_FDS` sockets from
//! descriptor 3 on, named in `LISTEN_FDNAMES`. `LISTEN_PID` is not set, because the pid is not known before the fork.
//! The handover socket follows them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{AGENT_FD_ENV, PacketSocket};

/// First descriptor of socket activation.
const LISTEN_FDS_START: RawFd = 3;
/// Maximum number of listening sockets of a workload.
const MAX_LISTENERS: usize = 64;

/// A listening socket and its name in the workload.
#[derive(Debug)]
pub struct ActivatedListener {
    /// Name, without `:`.
    pub name: String,
    /// The socket; bound and listening.
    pub socket: OwnedFd,
}

/// Adds `listeners` and a new handover socket to `command`. Returns the agent's end of the socket.
///
/// The agent's end stays open in this process; `command` may be spawned once. The descriptors that the child inherits
/// stay open here until `command` is dropped.
///
/// # Errors
/// The system's error; `InvalidInput` for too many listeners or a name with `:` or NUL.
pub fn attach(command: &mut Command, listeners: &[ActivatedListener]) -> io::Result<OwnedFd> {
    let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
    if listeners.len() > MAX_LISTENERS {
        return Err(invalid("too many listening sockets for one workload"));
    }
    if listeners.iter().any(|l| l.name.contains([':', '\0'])) {
        return Err(invalid("a listener's name may not contain ':' or NUL"));
    }
    let (ours, theirs) = PacketSocket::pair()?;
    let count = RawFd::try_from(listeners.len()).unwrap_or(0);
    let agent_fd = LISTEN_FDS_START + count;
    // Above all target numbers, so that no source descriptor is overwritten before its use.
    let floor = agent_fd + 1;
    let mut sources = Vec::with_capacity(listeners.len() + 1);
    for fd in listeners
        .iter()
        .map(|l| l.socket.as_fd())
        .chain([theirs.as_fd()])
    {
        sources.push(duplicate_from(fd, floor)?);
    }
    let names: Vec<&str> = listeners.iter().map(|l| l.name.as_str()).collect();
    command
        .env("LISTEN_FDS", listeners.len().to_string())
        .env("LISTEN_FDNAMES", names.join(":"))
        .env_remove("LISTEN_PID")
        .env(AGENT_FD_ENV, agent_fd.to_string());
    // The standard library reports a failed exec through a pipe that it keeps across the fork.
    // Occupying the target numbers here prevents that pipe from getting one of them.
    let placeholders = occupy_below(floor)?;
    place_in_child(command, sources, placeholders);
    Ok(ours)
}

fn duplicate_from(fd: impl AsFd, floor: RawFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(floor))?;
    // SAFETY: F_DUPFD_CLOEXEC has just created this descriptor, and no other code knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Opens descriptors until the lowest free number is at least `floor`.
fn occupy_below(floor: RawFd) -> io::Result<Vec<OwnedFd>> {
    let mut held = Vec::new();
    loop {
        let fd = nix::fcntl::open(
            "/dev/null",
            OFlag::O_RDONLY | OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )?;
        if fd.as_raw_fd() >= floor {
            return Ok(held);
        }
        held.push(fd);
    }
}

fn place_in_child(command: &mut Command, sources: Vec<OwnedFd>, placeholders: Vec<OwnedFd>) {
    let place = move || {
        // Owned by this closure so that the numbers stay occupied until `command` is dropped.
        let _ = &placeholders;
        for (target, source) in (LISTEN_FDS_START..).zip(&sources) {
            // SAFETY: the owner that this call creates is released at once; the number belongs to
            // the program that is about to be executed.
            let placed = unsafe { nix::unistd::dup2_raw(source, target) }?;
            let _ = std::os::fd::IntoRawFd::into_raw_fd(placed);
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and calls only dup2, which is
    // async-signal-safe; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(place) };
}
