//! Opens files without trusting what other users may have put in the way.
//!
//! Three kinds of files, three modules:
//!
//! - [`OwnDir`] is for files that the daemon writes. Each directory on the path is opened from `/` down, one
//!   component at a time, without following symbolic links (`openat`, `O_NOFOLLOW`), and its owner, mode and type are
//!   checked. Files in such a directory are opened relative to it, and checked the same way.
//! - [`read_named`] and [`open_named`] are for files named by a user or a client. They open only regular files, never
//!   wait for the other end of a FIFO or for a device, and read up to a limit.
//! - [`read_secret`] is for files with secrets named by a user. They are opened and checked like the daemon's own,
//!   but never changed.

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
