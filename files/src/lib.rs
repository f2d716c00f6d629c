//! Opening files without trusting what other users may have put in the way.
//!
//! Three kinds of files, three modules:
//!
//! - [`OwnDir`]: what the daemon writes. Each directory on the way is opened from `/` down, one component at a time,
//!   without following symbolic links (`openat`, `O_NOFOLLOW`); owner, mode and type of each are checked. Whatever
//!   lies in such a directory is opened relative to it, and checked the same way.
//! - [`read_named`] and [`open_named`]: what a user or a client names. Only regular files are opened, never waiting
//!   for a FIFO's other end or for a device, and read up to a bound.
//! - [`read_secret`]: what a user names that holds secrets. Reached and checked like the daemon's own, but never changed.

#![forbid(unsafe_code)]

mod checks;
mod named;
mod own_dir;
mod refusal;
mod secret;
mod walk;

pub use named::{NamedFileError, open_named, read_named};
pub use own_dir::OwnDir;
pub use refusal::Refusal;
pub use secret::read_secret;

/// Mode of directories that are for their owner only.
pub const PRIVATE_DIR: u32 = 0o700;
/// Mode of files that are for their owner only.
pub const PRIVATE_FILE: u32 = 0o600;
