//! Kernel images: what a bzImage says of itself, and the kernel that is packed in it.
//!
//! Source of the layout: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".

mod unpack;

pub use unpack::{UnpackError, unpack};

/// The largest image that is read or unpacked, in bytes.
pub const MAX_IMAGE_BYTES: u64 = 1 << 30;

const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const VERSION: usize = 0x20e;
const PAYLOAD_START: usize = 0x248;
const PAYLOAD_BYTES: usize = 0x24c;
/// The oldest boot protocol that says where the payload is.
const PROTOCOL_MIN: u16 = 0x208;
/// What an ELF file begins with.
const ELF: &[u8] = b"\x7fELF";
/// What a kernel says first; its version follows.
const BANNER: &[u8] = b"Linux version ";
/// The longest version that is taken, in bytes.
const MAX_VERSION_BYTES: usize = 1024;

/// How something is packed.
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
    /// lz4, in the frame format or in the older one that the kernel's build makes.
    Lz4,
    /// lzma, the format before xz.
    Lzma,
    /// lzop.
    Lzo,
}

impl Compression {
    /// What files of each begin with.
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

    /// How bytes are packed, from what they begin with.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let mut known = Self::MAGICS.iter();
        known
            .find(|(magic, _)| bytes.starts_with(magic))
            .map(|(_, compression)| *compression)
    }

    /// Its name, as kerf writes it.
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

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'i> {
    /// A kernel as boot loaders take it.
    BzImage {
        /// The packed kernel in it, when the header says where it is.
        payload: Option<&'i [u8]>,
    },
    /// An unpacked kernel.
    Vmlinux,
    /// Something else.
    Unknown,
}

/// What an image is, as kerf tells it.
#[must_use]
pub fn kind(image: &[u8]) -> Kind<'_> {
    if image.get(MAGIC..MAGIC + 4) == Some(b"HdrS") {
        Kind::BzImage {
            payload: payload(image),
        }
    } else if image.starts_with(ELF) {
        Kind::Vmlinux
    } else {
        Kind::Unknown
    }
}

/// The version that an image gives: in its header, or in what it says first.
#[must_use]
pub fn version(image: &[u8]) -> Option<String> {
    match kind(image) {
        Kind::BzImage { .. } => {
            let pointer = usize::from(u16_at(image, VERSION)?);
            if pointer == 0 {
                return None;
            }
            text_until(image.get(0x200 + pointer..)?, &[0])
        }
        Kind::Vmlinux => {
            let at = image.windows(BANNER.len()).position(|w| w == BANNER)?;
            text_until(&image[at + BANNER.len()..], b"\n\0")
        }
        Kind::Unknown => None,
    }
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    if u16_at(image, PROTOCOL)? < PROTOCOL_MIN {
        return None;
    }
    let sectors = match *image.get(SETUP_SECTORS)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = usize::try_from(u32_at(image, PAYLOAD_START)?).ok()?;
    let start = ((sectors + 1) * 512).checked_add(start)?;
    let bytes = usize::try_from(u32_at(image, PAYLOAD_BYTES)?).ok()?;
    image.get(start..)?.get(..bytes)
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

fn text_until(bytes: &[u8], ends: &[u8]) -> Option<String> {
    let bytes = &bytes[..bytes.len().min(MAX_VERSION_BYTES)];
    let end = bytes.iter().position(|byte| ends.contains(byte))?;
    // As kerf decodes it: what is not ASCII is replaced.
    let readable = |byte: &u8| match byte.is_ascii() {
        true => char::from(*byte),
        false => '\u{fffd}',
    };
    Some(bytes[..end].iter().map(readable).collect()).filter(|text: &String| !text.is_empty())
}

/// A bzImage with this payload, for tests.
#[cfg(test)]
pub(crate) fn pack(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0_u8; 0x600];
    image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
    image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[SETUP_SECTORS] = 1;
    image[PAYLOAD_START..PAYLOAD_START + 4].copy_from_slice(&0x200_u32.to_le_bytes());
    let bytes = u32::try_from(payload.len()).unwrap();
    image[PAYLOAD_BYTES..PAYLOAD_BYTES + 4].copy_from_slice(&bytes.to_le_bytes());
    image[VERSION..VERSION + 2].copy_from_slice(&0x300_u16.to_le_bytes());
    image[0x500..0x50d].copy_from_slice(b"6.12.9 (x@y)\0");
    image.extend_from_slice(payload);
    image
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
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        assert_eq!(kind(&image), Kind::BzImage { payload: None });
        assert_eq!(version(&image), None);
        for cut in 0..image.len() {
            let _ = (kind(&image[..cut]), version(&image[..cut]));
        }
    }
}
