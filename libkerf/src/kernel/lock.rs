//! The lock between kerf and processes with this library.
//!
//! kerf's lock is a file: the process that creates it holds the lock, and a kerf that dies leaves it behind forever.
//! This library uses the same file, and additionally a kernel lock (`flock`) on it: the file keeps kerf out while it
//! exists, and a file that was left behind by a process with this library is not locked and can be taken over.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::linkat;
use thiserror::Error;

/// Path of kerf's lock, for root.
pub const KERF_LOCK: &str = "/var/run/kerf.lock";

/// Polling interval for a held lock.
const POLL: Duration = Duration::from_millis(20);

/// Contents of the file if libkerf created it. kerf's file is empty.
const MARK: &str = "libkerf ";

/// Maximum number of bytes read from the file.
const MAX_TEXT_BYTES: u64 = 256;

/// The lock, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    // Locked until it is closed, which happens after the file is unlinked.
    file: Flock<File>,
}

/// Why the lock was not acquired.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process with this library holds the lock.
    #[error("{} is held by {holder}", path.display())]
    Held {
        /// The file.
        path: PathBuf,
        /// The holder, according to the file.
        holder: String,
    },
    /// kerf holds the lock. A killed kerf leaves the file behind, and the two cases cannot be distinguished.
    #[error("kerf has held {} for {} s: if no kerf is running, remove it", path.display(), age.as_secs())]
    Kerf {
        /// The file.
        path: PathBuf,
        /// Age of the file.
        age: Duration,
    },
    /// The file cannot be created or locked.
    #[error("locking {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl Lock {
    /// Acquires the lock; waits at most `patience`.
    ///
    /// # Errors
    ///
    /// The holder, or why the lock cannot be acquired.
    pub fn take(path: &Path, patience: Duration) -> Result<Self, LockError> {
        let deadline = Instant::now() + patience;
        loop {
            match Self::try_take(path) {
                Err(LockError::Held { .. } | LockError::Kerf { .. })
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(POLL);
                }
                other => return other,
            }
        }
    }

    /// Removes the lock that a killed process with this library has left behind: kerf would wait for it in vain.
    /// Returns whether there was one. A lock of kerf's, or one that is held, stays.
    ///
    /// # Errors
    ///
    /// If the lock cannot be examined.
    pub fn remove_left(path: &Path) -> Result<bool, LockError> {
        // Taking the lock would create a missing file.
        if !path.exists() {
            return Ok(false);
        }
        match Self::try_take(path) {
            Ok(lock) => {
                drop(lock);
                Ok(true)
            }
            Err(LockError::Held { .. } | LockError::Kerf { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn try_take(path: &Path) -> Result<Self, LockError> {
        let io = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => take_over(file, path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => match make(path) {
                Ok(file) => file,
                // Another process was faster.
                Err(Errno::EEXIST) => return Err(held(path, String::new())),
                Err(error) => return Err(io(error.into())),
            },
            Err(error) => return Err(io(error)),
        };
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Unlink the file first: a process that locks it after that sees that it has no name any more.
        if is_in_place(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Creates the file, locked and marked before it has a name, so that no other process sees it in another state.
fn make(path: &Path) -> Result<Flock<File>, Errno> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let file = open(directory, flags, Mode::from_bits_truncate(0o644))?;
    let mut file = lock(File::from(file)).map_err(|(_, error)| error)?;
    sign(&mut file).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(
        AT_FDCWD,
        own.as_str(),
        AT_FDCWD,
        path,
        AtFlags::AT_SYMLINK_FOLLOW,
    )?;
    Ok(file)
}

/// Takes over an existing file that a process with this library has left behind.
fn take_over(file: File, path: &Path) -> Result<Flock<File>, LockError> {
    let io = |source| LockError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = match lock(file) {
        Ok(file) => file,
        Err((mut file, Errno::EWOULDBLOCK)) => return Err(held(path, text_of(&mut file))),
        Err((_, error)) => return Err(io(error.into())),
    };
    if !is_in_place(&file, path) {
        // The lock was released between the open and the lock.
        return Err(held(path, String::new()));
    }
    if !text_of(&mut file).starts_with(MARK) {
        let made = file.metadata().and_then(|metadata| metadata.modified());
        let age = made.ok().and_then(|made| made.elapsed().ok());
        return Err(LockError::Kerf {
            path: path.to_owned(),
            age: age.unwrap_or_default(),
        });
    }
    sign(&mut file).map_err(io)?;
    Ok(file)
}

fn lock(file: File) -> Result<Flock<File>, (File, Errno)> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
}

/// Writes the holder into the file.
fn sign(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{MARK}pid {}", std::process::id())
}

fn text_of(file: &mut File) -> String {
    let mut text = String::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(MAX_TEXT_BYTES).read_to_string(&mut text));
    match read {
        Ok(_) => text.trim_end().to_owned(),
        Err(_) => String::new(),
    }
}

fn held(path: &Path, holder: String) -> LockError {
    LockError::Held {
        path: path.to_owned(),
        holder: if holder.is_empty() {
            "somebody".to_owned()
        } else {
            holder
        },
    }
}

/// Returns whether the path still names this file.
fn is_in_place(file: &File, path: &Path) -> bool {
    let of = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(own), Ok(named)) => of(own) == of(named),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn one_has_it_and_it_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kerf.lock");
        let lock = Lock::take(&path, SHORT).unwrap();
        assert!(path.exists(), "kerf sees that it is taken");
        let refused = Lock::take(&path, SHORT).unwrap_err();
        let own = format!("libkerf pid {}", std::process::id());
        assert!(
            matches!(&refused, LockError::Held { holder, .. } if *holder == own),
            "{refused}"
        );
        drop(lock);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_dead_process_left_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kerf.lock");
        std::fs::write(&path, "libkerf pid 1\n").unwrap();
        let lock = Lock::take(&path, SHORT).unwrap();
        assert!(
            std::fs::read_to_string(&path)
                .unwrap()
                .contains(&std::process::id().to_string())
        );
        drop(lock);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_dead_process_left_is_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kerf.lock");
        assert!(!Lock::remove_left(&path).unwrap());
        std::fs::write(&path, "libkerf pid 1\n").unwrap();
        assert!(Lock::remove_left(&path).unwrap());
        assert!(!path.exists());
        let lock = Lock::take(&path, SHORT).unwrap();
        assert!(!Lock::remove_left(&path).unwrap(), "it is held");
        assert!(path.exists());
        drop(lock);
        std::fs::write(&path, "").unwrap();
        assert!(!Lock::remove_left(&path).unwrap(), "it is kerf's");
        assert!(path.exists());
    }

    #[test]
    fn kerf_is_not_robbed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kerf.lock");
        std::fs::write(&path, "").unwrap();
        let refused = Lock::take(&path, SHORT).unwrap_err();
        assert!(matches!(refused, LockError::Kerf { .. }), "{refused}");
        assert!(path.exists());
    }

    #[test]
    fn a_lock_that_has_lost_its_name_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kerf.lock");
        // Opened just before its owner releases it, and another process takes it.
        std::fs::write(&path, "libkerf pid 1\n").unwrap();
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        let lock = Lock::take(&path, SHORT).unwrap();
        let refused = take_over(opened, &path).unwrap_err();
        assert!(matches!(refused, LockError::Held { .. }), "{refused}");
        assert!(path.exists());
        drop(lock);
    }

    #[test]
    fn many_at_once_have_it_one_by_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kerf.lock");
        let inside = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        let lock = Lock::take(&path, Duration::from_secs(60)).unwrap();
                        let others = inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        assert_eq!(others, 0);
                        std::thread::sleep(Duration::from_millis(1));
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert!(!path.exists());
    }
}
