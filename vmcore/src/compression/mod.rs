//! The compression methods for pages in a kdump-compressed file.

pub mod lzo;

use std::io;

use crate::memory::PAGE_BYTES;

/// The compression method of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Uncompressed.
    None,
    /// zlib's deflate, with its header and checksum.
    Zlib,
    /// LZO1X.
    Lzo,
    /// Snappy without framing.
    Snappy,
    /// Zstandard, one frame.
    Zstd,
}

impl Compression {
    /// All methods.
    pub(crate) const ALL: [Self; 5] = [Self::None, Self::Zlib, Self::Lzo, Self::Snappy, Self::Zstd];

    /// Returns its bit in a page's descriptor and in the file's status.
    pub(crate) const fn flag(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Zlib => 1,
            Self::Lzo => 2,
            Self::Snappy => 4,
            Self::Zstd => 0x20,
        }
    }

    /// All bits that name a method.
    pub(crate) const FLAGS: u32 = 1 | 2 | 4 | 0x20;

    /// Returns the method in a page's descriptor; `None` if it names several.
    pub(crate) fn of_flags(flags: u32) -> Option<Self> {
        [Self::None, Self::Zlib, Self::Lzo, Self::Snappy, Self::Zstd]
            .into_iter()
            .find(|packing| packing.flag() == flags & Self::FLAGS)
    }

    /// Returns its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Lzo => "lzo",
            Self::Snappy => "snappy",
            Self::Zstd => "zstd",
        }
    }
}

/// Unpacks a page, which must fill `page` completely.
///
/// # Errors
///
/// The rule that the packed bytes violate.
pub(crate) fn unpack(
    packing: Compression,
    packed: &[u8],
    page: &mut [u8; PAGE_BYTES],
) -> Result<(), &'static str> {
    let length = match packing {
        Compression::None => {
            if packed.len() != PAGE_BYTES {
                return Err("an uncompressed page has the wrong length");
            }
            page.copy_from_slice(packed);
            PAGE_BYTES
        }
        Compression::Zlib => {
            let mut inflate = flate2::Decompress::new(true);
            let finished = inflate.decompress(packed, page, flate2::FlushDecompress::Finish);
            if !matches!(finished, Ok(flate2::Status::StreamEnd)) {
                return Err("a page's zlib stream is broken");
            }
            // The output is at most one page.
            usize::try_from(inflate.total_out()).unwrap_or(usize::MAX)
        }
        Compression::Lzo => {
            lzo::decompress(packed, page).map_err(|_| "a page's LZO stream is broken")?
        }
        Compression::Snappy => snap::raw::Decoder::new()
            .decompress(packed, page)
            .map_err(|_| "a page's Snappy stream is broken")?,
        Compression::Zstd => zstd::bulk::decompress_to_buffer(packed, page)
            .map_err(|_| "a page's zstd frame is broken")?,
    };
    if length == PAGE_BYTES {
        Ok(())
    } else {
        Err("a compressed page does not expand to a page")
    }
}

/// Compression level. zlib-rs's level 1 is fast but its output is a third larger than zlib's; this level's output is as
/// small.
const ZLIB_LEVEL: u32 = 2;

/// Packs pages one after the other, with its own memory.
pub(crate) enum Packer {
    None,
    Zlib(Box<flate2::Compress>),
    Lzo(lzo::Compressor),
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Packer {
    /// Creates a packer, with the fastest level except for zlib.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] for Snappy, which can be read but not written; zstd's error if it
    /// gets no memory.
    pub(crate) fn new(packing: Compression) -> io::Result<Self> {
        Ok(match packing {
            Compression::None => Self::None,
            Compression::Zlib => {
                let level = flate2::Compression::new(ZLIB_LEVEL);
                Self::Zlib(Box::new(flate2::Compress::new(level, true)))
            }
            Compression::Lzo => Self::Lzo(lzo::Compressor::default()),
            Compression::Zstd => Self::Zstd(Box::new(zstd::bulk::Compressor::new(1)?)),
            Compression::Snappy => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// Appends the page to `out`, packed if that makes it smaller. Returns the method.
    pub(crate) fn pack(&mut self, page: &[u8], out: &mut Vec<u8>) -> io::Result<Compression> {
        let start = out.len();
        let packing = match self {
            Self::None => Compression::None,
            Self::Zlib(deflate) => {
                deflate.reset();
                out.reserve(page.len() + 64);
                let done = deflate.compress_vec(page, out, flate2::FlushCompress::Finish);
                match done.map_err(io::Error::other)? {
                    flate2::Status::StreamEnd => Compression::Zlib,
                    // The output does not fit, so it is not smaller.
                    _ => Compression::None,
                }
            }
            Self::Lzo(compressor) => {
                compressor.compress(page, out);
                Compression::Lzo
            }
            Self::Zstd(compressor) => {
                out.resize(start + zstd::zstd_safe::compress_bound(page.len()), 0);
                let length = compressor.compress_to_buffer(page, &mut out[start..])?;
                out.truncate(start + length);
                Compression::Zstd
            }
        };
        if packing == Compression::None || out.len() - start >= page.len() {
            out.truncate(start);
            out.extend_from_slice(page);
            return Ok(Compression::None);
        }
        Ok(packing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_packing_that_is_written_is_read() {
        let text = b"Kernel panic - not syncing: ".repeat(147);
        let mut noise = [0_u8; PAGE_BYTES];
        let mut state = 1_u64;
        for byte in &mut noise {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
        for wanted in [
            Compression::None,
            Compression::Zlib,
            Compression::Lzo,
            Compression::Zstd,
        ] {
            let mut packer = Packer::new(wanted).unwrap();
            for (page, shrinks) in [(&text[..PAGE_BYTES], true), (&noise[..], false)] {
                let mut out = vec![9];
                let packing = packer.pack(page, &mut out).unwrap();
                let expected = if shrinks { wanted } else { Compression::None };
                assert_eq!(packing, expected);
                let mut back = [0; PAGE_BYTES];
                unpack(packing, &out[1..], &mut back).unwrap();
                assert_eq!(back, page);
            }
        }
    }

    #[test]
    fn a_page_that_is_too_short_or_too_long_is_refused() {
        let mut page = [0; PAGE_BYTES];
        for length in [PAGE_BYTES - 1, PAGE_BYTES + 1] {
            let bytes = vec![0; length];
            let snappy = snap::raw::Encoder::new().compress_vec(&bytes).unwrap();
            assert!(unpack(Compression::Snappy, &snappy, &mut page).is_err());
            let zstd = zstd::bulk::compress(&bytes, 1).unwrap();
            assert!(unpack(Compression::Zstd, &zstd, &mut page).is_err());
            let mut lzo = Vec::new();
            lzo::Compressor::default().compress(&bytes, &mut lzo);
            assert!(unpack(Compression::Lzo, &lzo, &mut page).is_err());
        }
    }

    #[test]
    fn a_descriptor_that_names_two_packings_names_none() {
        assert_eq!(Compression::of_flags(0x20), Some(Compression::Zstd));
        assert_eq!(Compression::of_flags(3), None);
    }
}
