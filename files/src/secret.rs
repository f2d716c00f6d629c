//! Files with secrets that a user names.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::fs::{Mode, OFlags, fstat, openat};
use rustix::io::Errno;

use crate::walk::{self, Missing, system};
use crate::{Refusal, checks};

/// How the file is opened: never through a symbolic link, and never waiting for a FIFO's other end.
const SAFELY: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

/// Reads the file at `path`, which holds secrets: a regular file of root or this user, at most `max_bytes` long, that
/// no one else can read or change. If this user is not root, the group of a file of root may read it. Each directory
/// on the path is checked as for the daemon's own files.
///
/// # Errors
/// If another user can change or read the file, or anything on the way lets one replace it; when it is no regular
/// file, or larger; when the system refuses.
pub fn read_secret(path: &Path, max_bytes: u64) -> Result<Vec<u8>, Refusal> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Refusal::Type {
            path: path.to_owned(),
            found: "not the path of a file",
            wanted: "a regular file",
        });
    };
    let directory = walk::walk(parent, Missing::Fails)?;
    let path = directory.path.join(name);
    let opened = openat(&directory.fd, name, SAFELY, Mode::empty());
    let opened = opened.map_err(|errno| match errno {
        Errno::LOOP => Refusal::Symlink { path: path.clone() },
        errno => system("opening", &path)(errno),
    })?;
    let stat = fstat(&opened).map_err(system("looking at", &path))?;
    checks::secret_file(&stat, &path)?;
    let mut bytes = Vec::new();
    let read = File::from(opened)
        .take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes);
    let read = read.map_err(|source| Refusal::System {
        what: "reading",
        path: path.clone(),
        source,
    })?;
    match u64::try_from(read).is_ok_and(|read| read <= max_bytes) {
        true => Ok(bytes),
        false => Err(Refusal::TooLarge { path, max_bytes }),
    }
}
