//! The bytes of a dump file, independent of its storage format.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::error::DumpError;

/// Bytes with random access, for several threads at once.
pub trait Bytes: Send + Sync {
    /// Returns the number of bytes.
    fn len(&self) -> u64;

    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    ///
    /// I/O errors; [`io::ErrorKind::UnexpectedEof`] if the bytes end earlier.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Returns the next offset from `offset` on that may contain other bytes than zero: everything before it is a hole.
    fn next_data(&self, offset: u64) -> u64 {
        offset
    }

    /// Returns true if `length` bytes from `offset` on were written: false beyond the end, and where a
    /// flattened file has no record.
    fn holds(&self, offset: u64, length: u64) -> bool {
        offset
            .checked_add(length)
            .is_some_and(|end| end <= self.len())
    }

    /// Returns true if it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A file of known length.
#[derive(Debug)]
pub struct FileBytes {
    file: File,
    len: u64,
}

impl FileBytes {
    /// Takes the file and determines its length once.
    ///
    /// # Errors
    ///
    /// I/O errors while the length is determined; [`io::ErrorKind::InvalidInput`] if the file does not support random
    /// access, such as a pipe.
    pub fn new(mut file: File) -> io::Result<Self> {
        let meta = file.metadata()?;
        let kind = meta.file_type();
        let len = if kind.is_file() {
            meta.len()
        } else if kind.is_block_device() {
            file.seek(SeekFrom::End(0))?
        } else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a file nor a block device",
            ));
        };
        Ok(Self { file, len })
    }
}

impl Bytes for FileBytes {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn next_data(&self, offset: u64) -> u64 {
        seek_data(&self.file, offset).clamp(offset, self.len.max(offset))
    }
}

/// Returns the offset of the next data in a file from `offset` on: `u64::MAX` if there is only a hole, `offset`
/// if the system does not know.
pub(crate) fn seek_data(file: &File, offset: u64) -> u64 {
    let Ok(wanted) = i64::try_from(offset) else {
        return offset;
    };
    // All readers share the file position, but none of them reads at the file position.
    match lseek64(file.as_fd(), wanted, Whence::SeekData) {
        Ok(data) => u64::try_from(data).unwrap_or(offset),
        Err(Errno::ENXIO) => u64::MAX,
        Err(_) => offset,
    }
}

impl Bytes for Vec<u8> {
    fn len(&self) -> u64 {
        self.as_slice().len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        self.get(start..).unwrap_or_default().read_exact(buf)
    }
}

/// Fills `buf` from `offset`; `what` names the data in an error.
pub(crate) fn read(
    bytes: &dyn Bytes,
    offset: u64,
    buf: &mut [u8],
    what: &'static str,
) -> Result<(), DumpError> {
    let file_bytes = bytes.len();
    let end = offset.checked_add(buf.len() as u64);
    if end.is_none_or(|end| end > file_bytes) {
        return Err(DumpError::CutOff {
            offset,
            what,
            file_bytes,
        });
    }
    bytes
        .read_exact_at(buf, offset)
        .map_err(|source| DumpError::Io { offset, source })
}

/// Reads a structure with a fixed layout at `offset`.
pub(crate) fn read_struct<T: FromBytes + FromZeros + IntoBytes>(
    bytes: &dyn Bytes,
    offset: u64,
    what: &'static str,
) -> Result<T, DumpError> {
    let mut value = T::new_zeroed();
    read(bytes, offset, value.as_mut_bytes(), what)?;
    Ok(value)
}
