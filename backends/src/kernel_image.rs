//! Kernel images, as untrusted input. [`libkerf::image`] parses their header.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use libkerf::image::HEAD_MAX_BYTES;
use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

/// Maximum size of an image, in bytes.
pub const IMAGE_MAX_BYTES: u64 = 512 * 1024 * 1024;
/// Number of bytes read and hashed at a time.
const READ_BYTES: usize = 64 * 1024;

const TOO_LARGE: &str = "it is larger than any kernel image";

/// A kernel image that was read and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelImage {
    path: PathBuf,
    release: String,
    sha256: String,
}

/// Why a file is not a usable kernel image.
#[derive(Debug, thiserror::Error)]
pub enum BadImage {
    /// The file cannot be read.
    #[error("the kernel image {path:?} cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is not a kernel.
    #[error(
        "{path:?} is no kernel image: {reason}; give a bzImage such as /boot/vmlinuz-<release>"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// The fault of the image.
        reason: String,
    },
}

impl KernelImage {
    /// Reads the whole image at `path` in pieces. Blocking; takes about a second per gigabyte.
    ///
    /// # Errors
    /// When it cannot be read or is not a bzImage, with the fault.
    pub fn read(path: &Path) -> Result<Self, BadImage> {
        let unreadable = |source| BadImage::Unreadable {
            path: path.to_owned(),
            source,
        };
        let refuse = |reason: &str| BadImage::NotAKernel {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        // Opening a FIFO would block; files other than regular ones are refused below.
        let file = std::fs::File::options()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        if !meta.is_file() {
            return Err(refuse("it is not a regular file"));
        }
        if meta.len() > IMAGE_MAX_BYTES {
            return Err(refuse(TOO_LARGE));
        }
        Self::from_reader(path, file)
    }

    /// Checks `image`, the complete contents of the file at `path`, which is not read.
    ///
    /// # Errors
    /// When it is not a bzImage, with the fault.
    pub fn parse(path: &Path, image: &[u8]) -> Result<Self, BadImage> {
        Self::from_reader(path, image)
    }

    fn from_reader(path: &Path, mut image: impl Read) -> Result<Self, BadImage> {
        let unreadable = |source| BadImage::Unreadable {
            path: path.to_owned(),
            source,
        };
        let refuse = |reason: &dyn std::fmt::Display| BadImage::NotAKernel {
            path: path.to_owned(),
            reason: reason.to_string(),
        };
        let (mut head, mut hash) = (Vec::new(), Sha256::new());
        let mut piece = vec![0; READ_BYTES];
        let mut length = 0_u64;
        loop {
            let count = match image.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(unreadable(error)),
            };
            // The file may have grown since it was opened.
            length += count as u64;
            if length > IMAGE_MAX_BYTES {
                return Err(refuse(&TOO_LARGE));
            }
            hash.update(&piece[..count]);
            let wanted = count.min(HEAD_MAX_BYTES - head.len());
            head.extend_from_slice(&piece[..wanted]);
        }
        let release = libkerf::image::release(&head, length).map_err(|error| refuse(&error))?;
        let mut sha256 = String::with_capacity(64);
        for byte in hash.finalize() {
            let _ = write!(sha256, "{byte:02x}");
        }
        Ok(Self {
            path: path.to_owned(),
            release: release.to_owned(),
            sha256,
        })
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns its release, such as `6.12.9-amd64`, from its own header.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Returns the SHA-256 of the whole file, hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

/// Creates a minimal valid image for tests and the embedded demo: a header, and a compressed ELF file with its
/// release and without code.
pub fn synthetic(release: &str) -> Vec<u8> {
    const KERNEL_BYTES: u16 = 512;
    let text = format!("{release} (kmorph test image)");
    let said = &text.as_bytes()[..text.len().min(0xff)];
    let mut kernel = vec![0; usize::from(KERNEL_BYTES)];
    // 64 bits, little-endian, one program header that covers the rest.
    kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (kernel[32], kernel[54], kernel[56], kernel[72]) = (64, 56, 1, 120);
    kernel[96..98].copy_from_slice(&(KERNEL_BYTES - 120).to_le_bytes());
    kernel[120..134].copy_from_slice(b"Linux version ");
    kernel[134..134 + said.len()].copy_from_slice(said);
    // A zstd frame (RFC 8878) with one uncompressed block, followed by the size as in the kernel's build.
    let mut payload = vec![0x28, 0xb5, 0x2f, 0xfd, 0x60];
    payload.extend((KERNEL_BYTES - 256).to_le_bytes());
    payload.extend(&(u32::from(KERNEL_BYTES) << 3 | 1).to_le_bytes()[..3]);
    payload.extend(kernel);
    payload.extend(u32::from(KERNEL_BYTES).to_le_bytes());

    libkerf::image::synthetic(&text, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields of the header, from its description: `syssize` and `kernel_version`.
    const SYSSIZE: usize = 0x1f4;
    const VERSION_POINTER: usize = 0x20e;

    fn read(bytes: &[u8]) -> Result<KernelImage, BadImage> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinuz");
        std::fs::write(&path, bytes).unwrap();
        KernelImage::read(&path)
    }

    #[test]
    fn the_release_comes_from_the_header_and_the_hash_from_the_bytes() {
        let image = read(&synthetic("6.12.9-amd64")).unwrap();
        assert_eq!(image.release(), "6.12.9-amd64");
        let other = read(&synthetic("6.12.8-amd64")).unwrap();
        assert_ne!(image.sha256(), other.sha256());
        assert_eq!(image.sha256().len(), 64);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_the_reason() {
        let mut long = synthetic("6.1.0");
        long[SYSSIZE..SYSSIZE + 4].copy_from_slice(&100_000u32.to_le_bytes());
        let mut nameless = synthetic("6.1.0");
        nameless[VERSION_POINTER..VERSION_POINTER + 2].fill(0);
        let mut wild = synthetic("6.1.0");
        wild[VERSION_POINTER..VERSION_POINTER + 2].fill(0xff);
        for (bytes, reason) in [
            (&b""[..], "ends before"),
            (&[0u8; 4096][..], "no boot flag"),
            (&synthetic("6.1.0")[..0x204], "ends before"),
            (&long, "cut short"),
            (&nameless, "names no version"),
            (&wild, "names no version"),
            (&synthetic("garbage")[..], "not one of Linux"),
        ] {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(matches!(
            KernelImage::read(Path::new("/nonexistent")),
            Err(BadImage::Unreadable { .. })
        ));
        assert!(KernelImage::read(Path::new("/dev")).is_err());
    }

    /// The bytes of a valid image without an end, and the largest piece that was requested.
    struct Endless {
        header: Vec<u8>,
        left: u64,
        largest: usize,
    }

    impl Read for &mut Endless {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            self.largest = self.largest.max(into.len());
            let left = usize::try_from(self.left).unwrap_or(usize::MAX);
            let count = into.len().min(left);
            into[..count].fill(0);
            let header = count.min(self.header.len());
            into[..header].copy_from_slice(&self.header[..header]);
            self.header.drain(..header);
            self.left -= count as u64;
            Ok(count)
        }
    }

    fn endless(bytes: u64) -> Endless {
        Endless {
            header: synthetic("6.1.0"),
            left: bytes,
            largest: 0,
        }
    }

    #[test]
    fn a_large_image_is_read_a_piece_at_a_time() {
        let mut image = endless(8 << 20);
        let read = KernelImage::from_reader(Path::new("vmlinuz"), &mut image).unwrap();
        assert_eq!((image.left, read.release()), (0, "6.1.0"));
        assert!(image.largest <= READ_BYTES, "{}", image.largest);
        let mut whole = synthetic("6.1.0");
        whole.resize(8 << 20, 0);
        assert_eq!(
            read,
            KernelImage::parse(Path::new("vmlinuz"), &whole).unwrap()
        );
        let expected = Sha256::digest(&whole);
        let expected: String = expected.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(read.sha256(), expected);
    }

    #[test]
    fn a_version_as_far_behind_as_it_can_be_is_found() {
        let mut image = synthetic("6.1.0");
        image[VERSION_POINTER..VERSION_POINTER + 2].fill(0xff);
        image.resize(0x200 + usize::from(u16::MAX), 0);
        image.extend_from_slice(b"6.12.9 (far)");
        image.resize(2 << 20, 0);
        assert_eq!(read(&image).unwrap().release(), "6.12.9");
    }
}
