//! Listening sockets that the backend left open for this process.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use kmorph_launch::{LISTENERS_ENV, close_all_but};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Why what was inherited cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// The variable does not hold what it should.
    #[error("{LISTENERS_ENV}={value:?}: {reason}")]
    Bad {
        /// Its value.
        value: String,
        /// The reason.
        reason: String,
    },
}

/// Takes the inherited sockets, in order, and makes them close-on-exec. Without the variable there
/// are none. Every other descriptor above 2 is closed.
///
/// # Errors
/// If a number is no open descriptor, or there are others than `expected` of them.
///
/// # Safety
/// Called at most once, before anything else in the process owns a descriptor above 2.
pub unsafe fn listeners(expected: usize) -> Result<Vec<OwnedFd>, InheritError> {
    let value = std::env::var(LISTENERS_ENV).unwrap_or_default();
    let bad = |reason: String| InheritError::Bad {
        value: value.clone(),
        reason,
    };
    let mut numbers: Vec<RawFd> = Vec::new();
    for word in value.split(':').filter(|word| !word.is_empty()) {
        let number = word
            .parse()
            .map_err(|_| bad(format!("{word:?} is not a descriptor")))?;
        if number < 3 || numbers.contains(&number) {
            return Err(bad(format!("{number} is a standard stream or named twice")));
        }
        // SAFETY: only borrowed to ask whether it is open; fcntl answers EBADF when it is not.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|errno| bad(format!("{number}: {}", errno.desc())))?;
        numbers.push(number);
    }
    if !numbers.is_empty() && numbers.len() != expected {
        return Err(bad(format!(
            "{} sockets for {expected} ports",
            numbers.len()
        )));
    }
    // Close all other descriptors: they are useless here, and another process may wait for their end.
    // SAFETY: the caller promises that nothing in this process owns any of them.
    unsafe { close_all_but(&numbers) }.map_err(|e| bad(format!("closing the others: {e}")))?;
    // SAFETY: each is open, as just seen, named once, and the caller promises nobody else owns it.
    Ok(numbers
        .into_iter()
        .map(|number| unsafe { OwnedFd::from_raw_fd(number) })
        .collect())
}
