//! The host's view of its memory, `/proc/kcore`: an ELF file whose segments contain the physical addresses of their
//! memory.
//!
//! An instance's memory is host memory that the host does not use. With CONFIG_STRICT_DEVMEM, which distributions
//! enable, `/dev/mem` does not show it, with any kernel command line; kcore does.
//!
//! Source of the layout: Linux, fs/proc/kcore.c; elf(5).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Class 64-bit, little-endian.
const IDENT: &[u8] = b"\x7fELF\x02\x01";
const HEADER_BYTES: usize = 64;
/// Size of a segment's header, bytes.
const SEGMENT_BYTES: usize = 56;
const LOAD: u32 = 1;
/// The physical address of a segment that does not show contiguous physical memory.
const NOWHERE: u64 = u64::MAX;
/// Maximum number of segments: a kernel has one for each range of memory, and a few more.
const SEGMENTS_MAX: u16 = 4096;

/// A range of physical addresses in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// First address.
    pub start: u64,
    /// Its length, bytes.
    pub length: u64,
    /// Its offset in the file.
    pub offset: u64,
}

/// Returns the memory in the file, in file order.
///
/// # Errors
/// If the file cannot be read, or is not in the kernel's format.
pub fn shown(file: &File) -> io::Result<Vec<Shown>> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    if !header.starts_with(IDENT) {
        return Err(invalid("not a 64-bit ELF file"));
    }
    let table = u64_at(&header, 32);
    let (size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != SEGMENT_BYTES || count > SEGMENTS_MAX {
        return Err(invalid("unexpected segments"));
    }
    let mut segments = vec![0; SEGMENT_BYTES * usize::from(count)];
    file.read_exact_at(&mut segments, table)?;
    let of = |segment: &[u8]| Shown {
        start: u64_at(segment, 24),
        length: u64_at(segment, 32),
        offset: u64_at(segment, 8),
    };
    let loads = segments
        .chunks_exact(SEGMENT_BYTES)
        .filter(|segment| segment[..4] == LOAD.to_le_bytes());
    Ok(loads
        .map(of)
        .filter(|shown| shown.start != NOWHERE)
        .collect())
}

/// Returns the parts of `shown` with the addresses from `base` on, in ascending order; `None` if one of the
/// addresses is missing.
pub fn parts(shown: &[Shown], base: u64, length: u64) -> Option<Vec<Shown>> {
    let end = base.checked_add(length)?;
    let mut parts = Vec::new();
    let mut at = base;
    while at < end {
        let found = shown.iter().find(|shown| {
            at.checked_sub(shown.start)
                .is_some_and(|off| off < shown.length)
        })?;
        let skipped = at - found.start;
        let length = (found.length - skipped).min(end - at);
        parts.push(Shown {
            start: at,
            length,
            offset: found.offset.checked_add(skipped)?,
        });
        at += length;
    }
    Some(parts)
}

/// Opens the file and checks whether it shows any memory to this process.
pub(super) fn open(path: &Path) -> io::Result<(File, Vec<Shown>)> {
    let file = File::open(path)?;
    let shown = shown(&file)?;
    Ok((file, shown))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes[at..]
        .first_chunk()
        .map_or(0, |chunk| u16::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..]
        .first_chunk()
        .map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

/// Creates the beginning of such a file, up to [`SYNTHETIC_OFFSET`], with `memory_bytes` from physical address `base`
/// on. For tests.
#[must_use]
pub fn synthetic(base: u64, memory_bytes: u64) -> Vec<u8> {
    let mut file = IDENT.to_vec();
    file.resize(HEADER_BYTES, 0);
    file[32..40].copy_from_slice(&64_u64.to_le_bytes());
    file[54..56].copy_from_slice(&56_u16.to_le_bytes());
    file[56..58].copy_from_slice(&3_u16.to_le_bytes());
    // A note, non-contiguous memory (like vmalloc's), and the memory.
    let segments = [
        (4_u32, 0, 0, 0),
        (LOAD, 4096, NOWHERE, 4096),
        (LOAD, SYNTHETIC_OFFSET, base, memory_bytes),
    ];
    for (kind, offset, base, bytes) in segments {
        let mut segment = [0; SEGMENT_BYTES];
        segment[0..4].copy_from_slice(&kind.to_le_bytes());
        segment[8..16].copy_from_slice(&offset.to_le_bytes());
        segment[24..32].copy_from_slice(&base.to_le_bytes());
        segment[32..40].copy_from_slice(&bytes.to_le_bytes());
        file.extend(segment);
    }
    file
}

/// Offset of the memory in a file from [`synthetic`], bytes.
pub const SYNTHETIC_OFFSET: u64 = 8192;

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn memory_is_found_by_its_physical_address() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&synthetic(0x4000_0000, 0x20_0000)).unwrap();
        let (_, shown) = open(file.path()).unwrap();
        let all = Shown {
            start: 0x4000_0000,
            length: 0x20_0000,
            offset: SYNTHETIC_OFFSET,
        };
        assert_eq!(shown, [all]);
        let part = parts(&shown, 0x4000_1000, 0x1000).unwrap();
        let wanted = Shown {
            start: 0x4000_1000,
            length: 0x1000,
            offset: SYNTHETIC_OFFSET + 0x1000,
        };
        assert_eq!(part, [wanted]);
        assert_eq!(parts(&shown, 0x3fff_f000, 0x2000), None);
        assert_eq!(parts(&shown, 0x401f_f000, 0x2000), None);
        assert_eq!(parts(&shown, u64::MAX, 2), None);
    }

    #[test]
    fn a_range_may_lie_in_several_segments() {
        let one = |start, length, offset| Shown {
            start,
            length,
            offset,
        };
        let shown = [one(0x2000, 0x1000, 0x100), one(0x1000, 0x1000, 0x9000)];
        let found = parts(&shown, 0x1800, 0x1000).unwrap();
        assert_eq!(
            found,
            [one(0x1800, 0x800, 0x9800), one(0x2000, 0x800, 0x100)]
        );
    }

    #[test]
    fn what_is_no_such_file_is_refused() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert!(open(file.path()).is_err());
        let mut bytes = synthetic(0, 4096);
        bytes[57] = 0xff;
        file.write_all(&bytes).unwrap();
        assert!(open(file.path()).is_err());
        assert!(open(Path::new("/nonexistent")).is_err());
    }
}
