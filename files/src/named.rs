//! Files that a user or a client names.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// Why a named file is not read.
#[derive(Debug, thiserror::Error)]
pub enum NamedFileError {
    /// The file cannot be opened or read.
    #[error("cannot read {path:?}: {source}")]
    System {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The path is a directory, a FIFO, a device or a socket.
    #[error("cannot read {path:?}: it is {found}; use a regular file")]
    NotRegular {
        /// The file.
        path: PathBuf,
        /// Its type, with an article.
        found: &'static str,
    },
    /// The file exceeds the size limit.
    #[error("cannot read {path:?}: it is larger than {max_bytes} bytes; use a smaller file")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound, bytes.
        max_bytes: u64,
    },
}

impl From<NamedFileError> for io::Error {
    fn from(error: NamedFileError) -> Self {
        let kind = match &error {
            NamedFileError::System { source, .. } => source.kind(),
            NamedFileError::NotRegular { .. } => io::ErrorKind::InvalidInput,
            NamedFileError::TooLarge { .. } => io::ErrorKind::FileTooLarge,
        };
        Self::new(kind, error)
    }
}

/// Opens the regular file at `path` for reading; symbolic links are followed. It does not wait for the other end of
/// a FIFO, and a device is not read. A file system that does not answer can still keep the caller waiting.
///
/// # Errors
/// If it cannot be opened, is not a regular file, or has more than `max_bytes` bytes.
pub fn open_named(path: &Path, max_bytes: u64) -> Result<File, NamedFileError> {
    let system = |source| NamedFileError::System {
        path: path.to_owned(),
        source,
    };
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut options = File::options();
    options.read(true).custom_flags(flags.bits().cast_signed());
    let file = options.open(path).map_err(system)?;
    let about = file.metadata().map_err(system)?;
    if !about.is_file() {
        return Err(NamedFileError::NotRegular {
            path: path.to_owned(),
            found: describe(about.file_type()),
        });
    }
    if about.len() > max_bytes {
        return Err(too_large(path, max_bytes));
    }
    Ok(file)
}

/// Reads the regular file at `path`, as [`open_named`] opens it. One that grows meanwhile is read to the bound and
/// then refused.
///
/// # Errors
/// As [`open_named`]; also when reading fails.
pub fn read_named(path: &Path, max_bytes: u64) -> Result<Vec<u8>, NamedFileError> {
    let file = open_named(path, max_bytes)?;
    let mut bytes = Vec::new();
    let read = file
        .take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes);
    let read = read.map_err(|source| NamedFileError::System {
        path: path.to_owned(),
        source,
    })?;
    match u64::try_from(read).is_ok_and(|read| read <= max_bytes) {
        true => Ok(bytes),
        false => Err(too_large(path, max_bytes)),
    }
}

fn too_large(path: &Path, max_bytes: u64) -> NamedFileError {
    NamedFileError::TooLarge {
        path: path.to_owned(),
        max_bytes,
    }
}

fn describe(kind: std::fs::FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "not a regular file"
    }
}
