//! The unfinished file: `<path>.partial`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::WriteError;

/// Mode of a dump: only the owner may read it, because it contains all of the machine's data.
const MODE: u32 = 0o600;

/// Returns the name of the file `path` until it is complete.
pub fn partial_path(path: &Path) -> PathBuf {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    partial.into()
}

pub(super) struct Partial {
    file: File,
    path: PathBuf,
}

impl Partial {
    /// Creates the partial file of `path`. Replaces one that an earlier attempt left.
    pub(super) fn create(path: &Path) -> Result<Self, WriteError> {
        if path.symlink_metadata().is_ok() {
            return Err(WriteError::Exists {
                path: path.to_owned(),
            });
        }
        let path = partial_path(path);
        let create = || {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                return Err(error);
            }
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(MODE);
            options.open(&path)
        };
        match create() {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => Err(WriteError::Create { path, source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Returns an unnamed file in the same directory.
    pub(super) fn scratch(&self) -> Result<File, WriteError> {
        let directory = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_TMPFILE)
            .mode(MODE)
            .open(directory);
        made.map_err(|source| self.error("making a file for the map beside", source))
    }

    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), WriteError> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(|source| self.error("writing", source))
    }

    pub(super) fn set_len(&self, bytes: u64) -> Result<(), WriteError> {
        self.file
            .set_len(bytes)
            .map_err(|source| self.error("sizing", source))
    }

    pub(super) fn sync(&self) -> Result<(), WriteError> {
        self.file
            .sync_all()
            .map_err(|source| self.error("syncing", source))
    }

    /// Renames the file to its final name.
    pub(super) fn finish(&self, path: &Path) -> Result<(), WriteError> {
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
        std::fs::rename(&self.path, path)
            .and_then(|()| File::open(directory.unwrap_or(Path::new("."))))
            .and_then(|directory| directory.sync_all())
            .map_err(|source| self.error("renaming", source))
    }

    pub(super) fn error(&self, doing: &'static str, source: io::Error) -> WriteError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                WriteError::NoRoom { path }
            }
            _ => WriteError::Io {
                doing,
                path,
                source,
            },
        }
    }
}
