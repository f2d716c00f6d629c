//! The origin of an image: its file's size and SHA-256, its format, and a kernel's version, as kerf
//! records them.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::{Image, RecordError, io_error};
use crate::image::{self, Compression, Kind, MAX_IMAGE_BYTES};

/// Magic bytes of an uncompressed initial file system.
const CPIO: [&[u8]; 3] = [b"070701", b"070702", b"070707"];

impl Image {
    /// Returns the record of a kernel image. Blocking: reads the whole file.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or is larger than [`MAX_IMAGE_BYTES`]. A file that is not a kernel is not an
    /// error: its format is then `unknown`.
    pub fn of_kernel(path: &Path) -> Result<Self, RecordError> {
        Self::of_open_kernel(path, &mut open(path)?)
    }

    /// As [`Image::of_kernel`], for an open file with the path `path`; reads it from its beginning.
    ///
    /// # Errors
    ///
    /// See [`Image::of_kernel`].
    pub fn of_open_kernel(path: &Path, file: &mut File) -> Result<Self, RecordError> {
        let bytes = read(path, file)?;
        Ok(Self::of_kernel_bytes(path, &bytes))
    }

    /// As [`Image::of_kernel`], for the bytes of a file.
    pub(crate) fn of_kernel_bytes(path: &Path, bytes: &[u8]) -> Self {
        let (format, compression) = match image::kind(bytes) {
            Kind::BzImage { payload } => ("bzImage", payload.and_then(Compression::of)),
            Kind::Vmlinux => ("vmlinux", None),
            Kind::Unknown => ("unknown", None),
        };
        Self {
            format: Some(format.to_owned()),
            compression: compression.map(|compression| compression.as_str().to_owned()),
            version: image::version(bytes),
            ..Self::of_bytes(path, bytes)
        }
    }

    /// Returns the record of an initramfs. Blocking: reads the whole file.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or is larger than [`MAX_IMAGE_BYTES`].
    pub fn of_initrd(path: &Path) -> Result<Self, RecordError> {
        Self::of_open_initrd(path, &mut open(path)?)
    }

    /// As [`Image::of_initrd`], for an open file with the path `path`; reads it from its beginning.
    ///
    /// # Errors
    ///
    /// See [`Image::of_initrd`].
    pub fn of_open_initrd(path: &Path, file: &mut File) -> Result<Self, RecordError> {
        let bytes = read(path, file)?;
        let is_archive = CPIO.iter().any(|magic| bytes.starts_with(magic));
        let compression = if is_archive {
            Some("cpio")
        } else {
            Compression::of(&bytes).map(Compression::as_str)
        };
        Ok(Self {
            compression: compression.map(str::to_owned),
            ..Self::of_bytes(path, &bytes)
        })
    }

    fn of_bytes(path: &Path, bytes: &[u8]) -> Self {
        let mut sha256 = String::with_capacity(64);
        for byte in Sha256::digest(bytes) {
            let _ = write!(sha256, "{byte:02x}");
        }
        Self {
            // A relative path would be meaningless to a reader of the record.
            path: std::path::absolute(path)
                .unwrap_or_else(|_| path.to_owned())
                .display()
                .to_string(),
            size: bytes.len() as u64,
            sha256,
            ..Self::default()
        }
    }
}

fn open(path: &Path) -> Result<File, RecordError> {
    File::open(path).map_err(io_error("reading", path))
}

pub(crate) fn read(path: &Path, file: &mut File) -> Result<Vec<u8>, RecordError> {
    let mut bytes = Vec::new();
    let mut read = || {
        file.rewind()?;
        (&mut *file)
            .take(MAX_IMAGE_BYTES + 1)
            .read_to_end(&mut bytes)?;
        file.rewind()
    };
    read().map_err(io_error("reading", path))?;
    if bytes.len() as u64 > MAX_IMAGE_BYTES {
        return Err(io_error("reading", path)(
            io::ErrorKind::FileTooLarge.into(),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> Image {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Image::of_kernel(file.path()).unwrap()
    }

    #[test]
    fn an_image_is_described() {
        let found = of(&image::pack(b"\xfd7zXZ\0"));
        assert_eq!(found.format.as_deref(), Some("bzImage"));
        assert_eq!(found.compression.as_deref(), Some("xz"));
        assert_eq!(found.version.as_deref(), Some("6.12.9 (x@y)"));
        let found = of(b"no kernel");
        assert_eq!(
            (found.format.as_deref(), found.version),
            (Some("unknown"), None)
        );
        let found = of(b"abc");
        assert_eq!(
            (found.size, found.sha256.as_str()),
            (
                3,
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
            )
        );
    }
}
