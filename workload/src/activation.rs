//! The listening sockets that a process inherits, by the convention of sd_listen_fds(3).
//!
//! There are `LISTEN_FDS` sockets from descriptor 3 on, named in `LISTEN_FDNAMES`. `LISTEN_PID` may be missing; if
//! set, it must be this process.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

const FIRST: RawFd = 3;
/// Maximum number of sockets.
const MAX_LISTEN_FDS: usize = 64;

/// Why the sockets could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// `LISTEN_FDS` is not a number, or too large.
    #[error("LISTEN_FDS is {0:?}, not a number up to {MAX_LISTEN_FDS}")]
    Count(String),
    /// A descriptor is not open.
    #[error("LISTEN_FDS says descriptor {0} is a listening socket, but it is not open")]
    NotOpen(RawFd),
}

/// Takes the sockets, with their names; empty if there are none.
///
/// # Safety
/// Call this at most once, before any other code takes descriptors from 3 on by their number.
///
/// # Errors
/// See [`ActivationError`].
pub unsafe fn take_listeners() -> Result<Vec<(String, OwnedFd)>, ActivationError> {
    let Ok(text) = std::env::var("LISTEN_FDS") else {
        return Ok(Vec::new());
    };
    let anothers =
        std::env::var("LISTEN_PID").is_ok_and(|pid| pid.parse() != Ok(std::process::id()));
    if anothers {
        return Ok(Vec::new());
    }
    let count = text
        .parse::<usize>()
        .ok()
        .filter(|count| *count <= MAX_LISTEN_FDS)
        .ok_or(ActivationError::Count(text))?;
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    let mut taken = Vec::with_capacity(count);
    for number in (FIRST..).take(count) {
        // SAFETY: the number is only borrowed to check whether it is open; `fcntl` returns EBADF if
        // it is not.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|_| ActivationError::NotOpen(number))?;
        // SAFETY: it is open, as just checked, and the caller guarantees that no other code owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let name = names
            .next()
            .map_or_else(|| format!("{number}"), str::to_owned);
        taken.push((name, fd));
    }
    Ok(taken)
}
