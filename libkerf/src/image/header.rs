//! The setup header of a bzImage.
//!
//! Source of the layout: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".

use thiserror::Error;

use super::{u16_at, u32_at};

const SETUP_SECTORS: usize = 0x1f1;
const PARAGRAPHS: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const VERSION: usize = 0x20e;
const PAYLOAD_START: usize = 0x248;
const PAYLOAD_BYTES: usize = 0x24c;

const BOOT_FLAG_VALUE: u16 = 0xaa55;
const MAGIC_VALUE: &[u8] = b"HdrS";
const SECTOR_BYTES: usize = 512;
/// The sectors of an image whose field is 0: a default from the time before the field.
const SETUP_SECTORS_DEFAULT: u8 = 4;
/// Offset from which the version pointer counts.
const VERSION_BASE: usize = 0x200;

/// The oldest supported boot protocol: 2.06 (Linux 2.6.22).
const PROTOCOL_MIN: u16 = 0x206;
/// The oldest boot protocol with the location of the payload: 2.08 (Linux 2.6.26).
const PROTOCOL_WITH_PAYLOAD: u16 = 0x208;
/// Maximum length of the version text, in bytes, including its terminating NUL.
pub(super) const VERSION_MAX_BYTES: usize = 1024;
/// Maximum length of a release, in bytes. Linux itself has at most 64 (`__NEW_UTS_LEN`).
const RELEASE_MAX_BYTES: usize = 255;

/// Maximum number of bytes of an image that [`release`] reads: the header, and the version at its farthest position.
pub const HEAD_MAX_BYTES: usize = VERSION_BASE + u16::MAX as usize + VERSION_MAX_BYTES;

/// Why an image is not a bootable bzImage.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// The image is shorter than a header.
    #[error("it ends before its header does")]
    Short,
    /// The image does not begin with a boot sector.
    #[error("it has no boot flag")]
    NoBootFlag,
    /// The boot sector is not that of a kernel.
    #[error("it has no setup header")]
    NoHeader,
    /// The kernel is older than Linux 2.6.22.
    #[error("its boot protocol {0:#x} is too old")]
    TooOld(u16),
    /// The image is shorter than its header states.
    #[error("it is cut short: {actual} of {expected} bytes")]
    CutShort {
        /// Actual number of bytes.
        actual: u64,
        /// Number of bytes according to the header.
        expected: u64,
    },
    /// The pointer to the version is 0, or points beyond the end.
    #[error("its header names no version")]
    NoVersion,
    /// The version is not terminated within its maximum length.
    #[error("its version does not end")]
    Endless,
    /// The version is not UTF-8.
    #[error("its version is not text")]
    NotText,
    /// The version does not begin with a release such as `6.12.9-amd64`.
    #[error("its version is not one of Linux")]
    NotLinux,
}

/// Returns the release in the header of a bzImage, such as `6.12.9-amd64`: at most 255 printable ASCII characters, of
/// which the first is a digit. `head` is the beginning of the image, [`HEAD_MAX_BYTES`] or the whole image;
/// `image_bytes` is the size of the whole image.
///
/// # Errors
///
/// The fault of the image.
pub fn release(head: &[u8], image_bytes: u64) -> Result<&str, HeaderError> {
    if u16_at(head, BOOT_FLAG).ok_or(HeaderError::Short)? != BOOT_FLAG_VALUE {
        return Err(HeaderError::NoBootFlag);
    }
    if head.len() < MAGIC + MAGIC_VALUE.len() {
        return Err(HeaderError::Short);
    }
    let header = SetupHeader::of(head).ok_or(HeaderError::NoHeader)?;
    let protocol = header.protocol().ok_or(HeaderError::Short)?;
    if protocol < PROTOCOL_MIN {
        return Err(HeaderError::TooOld(protocol));
    }
    let expected = header.image_bytes().ok_or(HeaderError::Short)?;
    if image_bytes < expected {
        return Err(HeaderError::CutShort {
            actual: image_bytes,
            expected,
        });
    }
    let version = std::str::from_utf8(header.version()?).map_err(|_| HeaderError::NotText)?;
    let release = version.split_whitespace().next().unwrap_or_default();
    let is_one = release.starts_with(|first: char| first.is_ascii_digit())
        && release.bytes().all(|byte| byte.is_ascii_graphic())
        && release.len() <= RELEASE_MAX_BYTES;
    is_one.then_some(release).ok_or(HeaderError::NotLinux)
}

/// The header of an image, which may have faults elsewhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct SetupHeader<'i> {
    image: &'i [u8],
}

impl<'i> SetupHeader<'i> {
    /// Returns the header of an image, or of its beginning; `None` if it has none.
    pub(super) fn of(image: &'i [u8]) -> Option<Self> {
        let rest = image.get(MAGIC..)?;
        rest.starts_with(MAGIC_VALUE).then_some(Self { image })
    }

    fn protocol(self) -> Option<u16> {
        u16_at(self.image, PROTOCOL)
    }

    /// Returns the size of the part before the protected-mode code, bytes.
    fn setup_bytes(self) -> Option<usize> {
        let sectors = match *self.image.get(SETUP_SECTORS)? {
            0 => SETUP_SECTORS_DEFAULT,
            sectors => sectors,
        };
        Some((usize::from(sectors) + 1) * SECTOR_BYTES)
    }

    /// Returns the minimum size of the image, bytes.
    fn image_bytes(self) -> Option<u64> {
        let paragraphs = u32_at(self.image, PARAGRAPHS)?;
        Some(self.setup_bytes()? as u64 + u64::from(paragraphs) * 16)
    }

    /// Returns the compressed kernel, if the header states its location and it is complete.
    pub(super) fn payload(self) -> Option<&'i [u8]> {
        if self.protocol()? < PROTOCOL_WITH_PAYLOAD {
            return None;
        }
        let start = usize::try_from(u32_at(self.image, PAYLOAD_START)?).ok()?;
        let start = self.setup_bytes()?.checked_add(start)?;
        let bytes = usize::try_from(u32_at(self.image, PAYLOAD_BYTES)?).ok()?;
        self.image.get(start..)?.get(..bytes)
    }

    /// Returns the version, without its terminating NUL. It may be empty.
    pub(super) fn version(self) -> Result<&'i [u8], HeaderError> {
        let pointer = u16_at(self.image, VERSION).ok_or(HeaderError::Short)?;
        let text = self.image.get(VERSION_BASE + usize::from(pointer)..);
        let text = text
            .filter(|_| pointer != 0)
            .ok_or(HeaderError::NoVersion)?;
        let text = &text[..text.len().min(VERSION_MAX_BYTES)];
        let end = text.iter().position(|byte| *byte == 0);
        Ok(&text[..end.ok_or(HeaderError::Endless)?])
    }
}

/// Creates a minimal bzImage with this version and payload, for tests. The version is truncated at 255 bytes.
#[must_use]
pub fn synthetic(version: &str, payload: &[u8]) -> Vec<u8> {
    const SECTORS: u8 = 1;
    const VERSION_POINTER: u16 = 0x100;
    /// The payload follows other contents, as in an image with its decompressor.
    const PAYLOAD_OFFSET: u32 = 0x200;
    let mut image = vec![0; 0x600];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(SETUP_SECTORS, &[SECTORS]);
    put(BOOT_FLAG, &BOOT_FLAG_VALUE.to_le_bytes());
    put(MAGIC, MAGIC_VALUE);
    put(PROTOCOL, &0x20f_u16.to_le_bytes());
    put(VERSION, &VERSION_POINTER.to_le_bytes());
    let text = version.as_bytes();
    let at = VERSION_BASE + usize::from(VERSION_POINTER);
    put(at, &text[..text.len().min(0xff)]);
    put(PAYLOAD_START, &PAYLOAD_OFFSET.to_le_bytes());
    // A test's payload is small; a larger one is incomplete according to the header.
    let bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    put(PAYLOAD_BYTES, &bytes.to_le_bytes());
    image.extend_from_slice(payload);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(image: &[u8]) -> Result<&str, HeaderError> {
        release(image, image.len() as u64)
    }

    fn with<const N: usize>(at: usize, bytes: [u8; N]) -> Vec<u8> {
        let mut image = synthetic("6.1.0 (x@y)", b"");
        image[at..at + N].copy_from_slice(&bytes);
        image
    }

    #[test]
    fn the_release_is_the_first_word_of_the_version() {
        assert_eq!(
            judged(&synthetic("6.12.9-amd64 (x@y)", b"")),
            Ok("6.12.9-amd64")
        );
        let mut far = with(VERSION, [0xff; 2]);
        far.resize(VERSION_BASE + usize::from(u16::MAX), 0);
        far.extend_from_slice(b"6.12.9 (far)\0");
        assert_eq!(judged(&far), Ok("6.12.9"));
        far.truncate(HEAD_MAX_BYTES);
        assert_eq!(release(&far, 2 << 20), Ok("6.12.9"));
    }

    #[test]
    fn what_cannot_be_run_is_refused_for_what_is_wrong_with_it() {
        use HeaderError::{CutShort, NoBootFlag, NoHeader, NoVersion, NotLinux, NotText, TooOld};
        let long = with(PARAGRAPHS, 100_u32.to_le_bytes());
        let (actual, expected) = (long.len() as u64, 1024 + 1600);
        let mut endless = with(VERSION, [0xff; 2]);
        endless.resize(HEAD_MAX_BYTES * 2, b'6');
        let huge = synthetic(&"6".repeat(256), b"");
        for (image, why) in [
            (vec![], HeaderError::Short),
            (vec![0; 4096], NoBootFlag),
            (with(MAGIC, *b"HdrX"), NoHeader),
            (with(PROTOCOL, 0x205_u16.to_le_bytes()), TooOld(0x205)),
            (long, CutShort { actual, expected }),
            (with(VERSION, [0; 2]), NoVersion),
            (with(VERSION, [0xff; 2]), NoVersion),
            (endless, HeaderError::Endless),
            (synthetic("garbage", b""), NotLinux),
            (synthetic("", b""), NotLinux),
            (synthetic("6.1\u{7f} x", b""), NotLinux),
            (with(0x305, [0xff]), NotText),
        ] {
            assert_eq!(judged(&image), Err(why));
        }
        // A release of maximum length, and one that is longer than the text that synthetic() accepts.
        assert!(judged(&huge).is_ok_and(|release| release.len() == RELEASE_MAX_BYTES));
        let mut longer = synthetic("6", b"");
        longer[0x300..0x300 + 256].fill(b'6');
        assert_eq!(judged(&longer), Err(NotLinux));
    }

    proptest::proptest! {
        /// For any bytes: a refusal, or a printable release that the lenient reader finds too.
        #[test]
        fn both_ways_to_ask_agree_about_any_bytes(
            changes in proptest::collection::vec((0x1f0..0x320_usize, 0..=255_u8), 0..6),
            cut in 0x1f0..0x700_usize,
            beyond in 0..0x2_0000_usize,
        ) {
            let mut image = synthetic("6.12.9-amd64 (x@y)", b"\x28\xb5\x2f\xfd");
            image.resize(image.len() + beyond, b'7');
            for (at, byte) in changes {
                image[at] = byte;
            }
            image.truncate(cut.max(beyond));
            let version = crate::image::version(&image);
            if let Ok(release) = judged(&image) {
                proptest::prop_assert!(release.starts_with(|c: char| c.is_ascii_digit()));
                proptest::prop_assert!(release.bytes().all(|byte| byte.is_ascii_graphic()));
                proptest::prop_assert!((1..=RELEASE_MAX_BYTES).contains(&release.len()));
                let is_in = version.as_ref().is_some_and(|version| version.contains(release));
                proptest::prop_assert!(is_in, "{release:?} {version:?}");
                let is_one = matches!(crate::image::kind(&image), crate::image::Kind::BzImage { .. });
                proptest::prop_assert!(is_one);
            }
        }
    }

    #[test]
    fn an_image_that_ends_anywhere_in_its_header_is_refused() {
        let image = synthetic("6.1.0", b"");
        for cut in 0..0x306 {
            let refused = release(&image[..cut], image.len() as u64);
            assert!(refused.is_err(), "{cut}: {refused:?}");
            if cut <= VERSION {
                assert_eq!(refused, Err(HeaderError::Short), "{cut}");
            }
        }
    }
}
