use std::borrow::Cow;
use std::io::{self, Read};

use lzma_rust2::{LzmaReader, XzReader};
use thiserror::Error;

use super::{Compression, ELF64, Kind, MAX_IMAGE_BYTES, kind, u16_at, u32_at, u64_at};

/// Magic number of the legacy lz4 format, which may repeat; blocks follow.
const LZ4_BLOCKS: u32 = 0x184c_2102;
/// Maximum size of a decompressed block in the legacy lz4 format.
const LZ4_BLOCK_BYTES: usize = 8 << 20;

/// Maximum memory for lzma decompression besides its output, in KiB. Kernels are compressed with 32 MiB.
const LZMA_MEMORY_KIB: u32 = 256 << 10;

/// Why a bzImage cannot be unpacked.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// The header does not state the location of the kernel, or the kernel is incomplete.
    #[error("the bzImage is cut short, or too old to say where the kernel in it is")]
    NoPayload,
    /// The compression format is not supported.
    #[error(
        "the kernel in the bzImage is packed with {}, which is not unpacked here: unpack it with the \
         kernel's scripts/extract-vmlinux",
        .0.map_or("something unknown", Compression::as_str)
    )]
    Compression(Option<Compression>),
    /// The decompression failed.
    #[error("the kernel in the bzImage does not unpack: {0}")]
    Broken(io::Error),
    /// The kernel is larger than [`MAX_IMAGE_BYTES`].
    #[error("the kernel in the bzImage has more than {MAX_IMAGE_BYTES} bytes")]
    TooLarge,
    /// The decompressed data is not a kernel.
    #[error("what is packed in the bzImage is no 64-bit ELF file")]
    NotElf,
}

/// Returns the image in the form that a multikernel kernel loads: the kernel in a bzImage, or any
/// other image unchanged. Whether that is a kernel is checked by its loader.
///
/// # Errors
///
/// Why a bzImage cannot be unpacked.
pub fn unpack(image: &[u8]) -> Result<Cow<'_, [u8]>, UnpackError> {
    let payload = match kind(image) {
        Kind::BzImage { payload } => payload.ok_or(UnpackError::NoPayload)?,
        Kind::Vmlinux | Kind::Unknown => return Ok(image.into()),
    };
    let mut kernel = match Compression::of(payload) {
        Some(Compression::Gzip) => read(flate2::read::GzDecoder::new(payload))?,
        // The unpacked size follows the end of the frame.
        Some(Compression::Zstd) => {
            let decoder = zstd::stream::read::Decoder::with_buffer(payload);
            read(decoder.map_err(UnpackError::Broken)?.single_frame())?
        }
        Some(Compression::Lz4) if u32_at(payload, 0) == Some(LZ4_BLOCKS) => lz4_blocks(payload)?,
        Some(Compression::Lz4) => read(lz4_flex::frame::FrameDecoder::new(payload))?,
        Some(Compression::Xz) => read(XzReader::new(payload, false))?,
        Some(Compression::Lzma) => {
            let reader = LzmaReader::new_mem_limit(payload, LZMA_MEMORY_KIB, None);
            read(reader.map_err(UnpackError::Broken)?)?
        }
        Some(Compression::Bzip2) => read(bzip2::read::BzDecoder::new(payload))?,
        other @ (Some(Compression::Lzo) | None) => return Err(UnpackError::Compression(other)),
    };
    // Relocations may follow the file.
    let end = elf_bytes(&kernel).ok_or(UnpackError::NotElf)?;
    kernel.truncate(end);
    Ok(kernel.into())
}

fn read(from: impl Read) -> Result<Vec<u8>, UnpackError> {
    let mut bytes = Vec::new();
    from.take(MAX_IMAGE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(UnpackError::Broken)?;
    bounded(bytes)
}

fn bounded(bytes: Vec<u8>) -> Result<Vec<u8>, UnpackError> {
    match bytes.len() as u64 {
        ..=MAX_IMAGE_BYTES => Ok(bytes),
        _ => Err(UnpackError::TooLarge),
    }
}

/// Unpacks the legacy format: blocks with their sizes. The unpacked size follows the last block.
fn lz4_blocks(payload: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let broken = |what: &str| UnpackError::Broken(io::Error::other(what.to_owned()));
    let mut unpacked = Vec::new();
    let mut block = vec![0; LZ4_BLOCK_BYTES];
    let mut rest = &payload[size_of::<u32>()..];
    while let Some((size, after)) = rest.split_first_chunk() {
        let size = u32::from_le_bytes(*size);
        if size == LZ4_BLOCKS {
            rest = after;
            continue;
        }
        if after.is_empty() {
            break;
        }
        let size = usize::try_from(size).map_err(|_| UnpackError::TooLarge)?;
        let packed = after.get(..size).ok_or_else(|| broken("it is cut short"))?;
        let bytes = lz4_flex::block::decompress_into(packed, &mut block);
        let bytes = bytes.map_err(|error| broken(&error.to_string()))?;
        unpacked.extend_from_slice(&block[..bytes]);
        unpacked = bounded(unpacked)?;
        rest = &after[size..];
    }
    Ok(unpacked)
}

/// Returns the length of an ELF file, without appended data.
fn elf_bytes(file: &[u8]) -> Option<usize> {
    if !file.starts_with(ELF64) {
        return None;
    }
    let (programs, sections) = (u64_at(file, 32)?, u64_at(file, 40)?);
    let size_at = |at| u16_at(file, at).map(u64::from);
    let (program_bytes, program_count) = (size_at(54)?, size_at(56)?);
    let (section_bytes, section_count) = (size_at(58)?, size_at(60)?);
    let mut end = 64
        .max(programs.checked_add(program_bytes * program_count)?)
        .max(sections.checked_add(section_bytes * section_count)?);
    for number in 0..program_count {
        let header = programs.checked_add(program_bytes * number)?;
        let header = usize::try_from(header).ok()?;
        let offset = u64_at(file, header.checked_add(8)?)?;
        let bytes = u64_at(file, header.checked_add(32)?)?;
        end = end.max(offset.checked_add(bytes)?);
    }
    Some(usize::try_from(end).ok()?.min(file.len()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::pack;
    use super::*;

    /// Returns an ELF file with one program header, followed by other data.
    fn kernel() -> (Vec<u8>, Vec<u8>) {
        let mut file = vec![0_u8; 64 + 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64 + 8] = 120;
        file[64 + 32..64 + 36].copy_from_slice(&20_000_000_u32.to_le_bytes());
        let content = (0..20_000_000_u32).map(|n| u8::try_from(n / 1000 % 251).unwrap());
        file.extend(content);
        let mut with_more = file.clone();
        with_more.extend_from_slice(b"relocations");
        (file, with_more)
    }

    fn lz4(bytes: &[u8]) -> Vec<u8> {
        let mut packed = LZ4_BLOCKS.to_le_bytes().to_vec();
        for block in bytes.chunks(LZ4_BLOCK_BYTES) {
            let block = lz4_flex::block::compress(block);
            packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend(block);
        }
        packed
    }

    fn with_size(mut packed: Vec<u8>, bytes: usize) -> Vec<u8> {
        packed.extend(u32::try_from(bytes).unwrap().to_le_bytes());
        packed
    }

    #[test]
    fn what_was_packed_comes_out_without_what_follows_it() {
        let (file, packed) = kernel();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&packed).unwrap();
        let size = packed.len();
        for payload in [
            gzip.finish().unwrap(),
            with_size(zstd::encode_all(packed.as_slice(), 1).unwrap(), size),
            with_size(lz4(&packed), size),
            lz4(&packed),
        ] {
            let image = pack(&payload);
            assert!(unpack(&image).unwrap() == file);
            let cut = unpack(&image[..image.len() - 100]).unwrap_err();
            assert!(matches!(cut, UnpackError::NoPayload), "{cut}");
            let mut broken = payload.clone();
            broken.truncate(payload.len() / 2);
            let refused = unpack(&pack(&broken)).unwrap_err();
            assert!(matches!(refused, UnpackError::Broken(_)), "{refused}");
        }
        assert!(unpack(&file).unwrap() == file);
    }

    #[test]
    fn what_is_no_kernel_is_refused_or_left_to_who_loads_it() {
        assert_eq!(*unpack(b"something").unwrap(), *b"something");
        let refused = unpack(&pack(b"\x89LZO")).unwrap_err();
        assert!(refused.to_string().contains("with lzo"), "{refused}");
        for magic in [&b"\xfd7zXZ\0"[..], b"BZh", b"\x04\x22\x4d\x18", b"\x5d\0"] {
            let refused = unpack(&pack(&[magic, &[0xff; 40]].concat())).unwrap_err();
            assert!(matches!(refused, UnpackError::Broken(_)), "{refused}");
        }
        let refused = unpack(&pack(b"?")).unwrap_err();
        assert!(matches!(refused, UnpackError::Compression(None)));
        let text = zstd::encode_all(&b"no kernel"[..], 1).unwrap();
        assert!(matches!(unpack(&pack(&text)), Err(UnpackError::NotElf)));
        // Headers with arbitrary offsets.
        let mut wild = kernel().0[..200].to_vec();
        for at in [32, 40, 54, 56, 58, 60, 72, 96] {
            let was = wild[at];
            wild[at..at + 2].fill(0xff);
            let _ = unpack(&pack(&zstd::encode_all(wild.as_slice(), 1).unwrap()));
            wild[at] = was;
        }
    }
}
