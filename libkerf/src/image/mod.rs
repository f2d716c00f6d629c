//! Kernel images: the header of a bzImage, and the kernel that is compressed in it.
//!
//! [`kind`] and [`version`] return the same results as kerf, for any bytes. [`release`] is stricter: it refuses an
//! incomplete bzImage, and returns the reason.

mod header;
mod unpack;

pub use header::{HEAD_MAX_BYTES, HeaderError, release, synthetic};
pub use unpack::{UnpackError, unpack};

use header::{SetupHeader, VERSION_MAX_BYTES};

/// Maximum size of an image, also when decompressed, in bytes.
pub const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// The magic bytes of an ELF file.
const ELF: &[u8] = b"\x7fELF";
/// The magic bytes of a 64-bit, little-endian ELF file.
pub(crate) const ELF64: &[u8] = b"\x7fELF\x02\x01";
/// The beginning of a kernel's banner; its version follows.
const BANNER: &[u8] = b"Linux version ";

/// A compression format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// bzip2.
    Bzip2,
    /// Zstandard.
    Zstd,
    /// lz4, in the frame format or in the legacy format of the kernel's build.
    Lz4,
    /// lzma, the format before xz.
    Lzma,
    /// lzop.
    Lzo,
}

impl Compression {
    /// Magic bytes of each format.
    const MAGICS: [(&'static [u8], Compression); 8] = [
        (b"\x1f\x8b", Compression::Gzip),
        (b"\xfd7zXZ\0", Compression::Xz),
        (b"BZh", Compression::Bzip2),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        (b"\x02\x21\x4c\x18", Compression::Lz4),
        (b"\x04\x22\x4d\x18", Compression::Lz4),
        (b"\x5d\0", Compression::Lzma),
        (b"\x89LZO", Compression::Lzo),
    ];

    /// Returns the compression format of these bytes, from their magic.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let mut known = Self::MAGICS.iter();
        known
            .find(|(magic, _)| bytes.starts_with(magic))
            .map(|(_, compression)| *compression)
    }

    /// Returns the name in kerf's format.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Bzip2 => "bzip2",
            Compression::Zstd => "zstd",
            Compression::Lz4 => "lz4",
            Compression::Lzma => "lzma",
            Compression::Lzo => "lzo",
        }
    }
}

/// The kind of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'i> {
    /// A kernel for boot loaders.
    BzImage {
        /// The compressed kernel in it, if the header states its location.
        payload: Option<&'i [u8]>,
    },
    /// An uncompressed kernel.
    Vmlinux,
    /// Something else.
    Unknown,
}

/// Returns the kind of an image, as kerf reports it.
#[must_use]
pub fn kind(image: &[u8]) -> Kind<'_> {
    match SetupHeader::of(image) {
        Some(header) => Kind::BzImage {
            payload: header.payload(),
        },
        None if image.starts_with(ELF) => Kind::Vmlinux,
        None => Kind::Unknown,
    }
}

/// Returns the version of an image, from its header or its banner.
#[must_use]
pub fn version(image: &[u8]) -> Option<String> {
    let version = match SetupHeader::of(image) {
        Some(header) => header.version().ok()?,
        None if image.starts_with(ELF) => {
            let at = image.windows(BANNER.len()).position(|w| w == BANNER)?;
            let text = &image[at + BANNER.len()..];
            let text = &text[..text.len().min(VERSION_MAX_BYTES)];
            &text[..text.iter().position(|byte| b"\n\0".contains(byte))?]
        }
        None => return None,
    };
    // As in kerf: replace bytes that are not ASCII.
    let readable = |byte: &u8| match byte.is_ascii() {
        true => char::from(*byte),
        false => '\u{fffd}',
    };
    Some(version.iter().map(readable).collect()).filter(|text: &String| !text.is_empty())
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Returns a bzImage with this payload.
#[cfg(test)]
pub(crate) fn pack(payload: &[u8]) -> Vec<u8> {
    synthetic("6.12.9 (x@y)", payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_told_by_its_bytes() {
        let image = pack(b"\xfd7zXZ\0");
        let Kind::BzImage { payload } = kind(&image) else {
            panic!("it is one");
        };
        assert_eq!(payload.and_then(Compression::of), Some(Compression::Xz));
        assert_eq!(version(&image).as_deref(), Some("6.12.9 (x@y)"));
        let image = b"\x7fELF....Linux version 6.13.0 (a@b) #1\n\0";
        assert_eq!(kind(image), Kind::Vmlinux);
        assert_eq!(version(image).as_deref(), Some("6.13.0 (a@b) #1"));
        assert_eq!((kind(b"none"), version(b"none")), (Kind::Unknown, None));
    }

    #[test]
    fn a_header_that_points_outside_is_no_panic() {
        let mut image = vec![0xff_u8; 0x260];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kind(&image), Kind::BzImage { payload: None });
        assert_eq!(version(&image), None);
        for cut in 0..image.len() {
            let _ = (kind(&image[..cut]), version(&image[..cut]));
        }
    }
}
