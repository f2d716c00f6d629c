//! The build id of a kernel image with debug information; a `vmlinux` of another build has different addresses.

use std::fmt::Write as _;
use std::fs::File;
use std::path::Path;

use crate::bytes::{self, Bytes, FileBytes};
use crate::dump::layout::{ELF_IDENT, ElfHeader, PT_NOTE, ProgramHeader, SHT_NOTE, SectionHeader};
use crate::dump::notes::gnu_build_id;
use crate::error::DumpError;

/// Maximum size of a section or segment of notes, bytes: a kernel has less than 1 KiB.
const NOTES_MAX_BYTES: u64 = 64 << 10;

/// Returns the build id of the ELF file at `path`, in hexadecimal; `None` if the file has none or is not a 64-bit ELF
/// file.
///
/// # Errors
///
/// When the file cannot be read, or is cut off.
pub(super) fn of_file(path: &Path) -> Result<Option<String>, DumpError> {
    let opened = File::open(path).and_then(FileBytes::new);
    let file = opened.map_err(|source| DumpError::Io { offset: 0, source })?;
    let Ok(header) = bytes::read_struct::<ElfHeader>(&file, 0, "the ELF header") else {
        return Ok(None);
    };
    if !header.ident.starts_with(&ELF_IDENT) {
        return Ok(None);
    }
    // Split debug information may have stale segments; its sections are right. A file without section headers has
    // only segments.
    for number in 0..u64::from(header.shnum.get()) {
        let at = table_entry(header.shoff.get(), number, size_of::<SectionHeader>());
        let section: SectionHeader = bytes::read_struct(&file, at, "a section header")?;
        if section.kind.get() == SHT_NOTE
            && let Some(id) = in_notes(&file, section.offset.get(), section.size.get())?
        {
            return Ok(Some(id));
        }
    }
    for number in 0..u64::from(header.phnum.get()) {
        let at = table_entry(header.phoff.get(), number, size_of::<ProgramHeader>());
        let segment: ProgramHeader = bytes::read_struct(&file, at, "a program header")?;
        if segment.kind.get() == PT_NOTE
            && let Some(id) = in_notes(&file, segment.offset.get(), segment.filesz.get())?
        {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

fn table_entry(table: u64, number: u64, entry_bytes: usize) -> u64 {
    table.saturating_add(number.saturating_mul(entry_bytes as u64))
}

fn in_notes(file: &dyn Bytes, offset: u64, length: u64) -> Result<Option<String>, DumpError> {
    // NOTES_MAX_BYTES fits.
    let mut notes = vec![0; usize::try_from(length.min(NOTES_MAX_BYTES)).unwrap_or(0)];
    bytes::read(file, offset, &mut notes, "notes")?;
    Ok(gnu_build_id(&notes).map(|id| {
        id.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }))
}

#[cfg(test)]
mod tests {
    use zerocopy::{FromZeros, IntoBytes};

    use super::*;
    use crate::dump::notes::put_note;

    /// Returns an ELF file with one section or one segment of notes.
    fn elf(in_a_section: bool) -> Vec<u8> {
        let mut notes = Vec::new();
        put_note(b"Xen\0", 6, b"linux", &mut notes);
        put_note(b"GNU\0", 3, &[0xab, 0x01, 0xff], &mut notes);
        let mut header = ElfHeader::new_zeroed();
        header.ident[..7].copy_from_slice(&ELF_IDENT);
        let mut section = SectionHeader::new_zeroed();
        section.kind = SHT_NOTE.into();
        section.offset = 256.into();
        section.size = (notes.len() as u64).into();
        let mut segment = ProgramHeader::new_zeroed();
        segment.kind = PT_NOTE.into();
        segment.offset = 256.into();
        segment.filesz = (notes.len() as u64).into();
        match in_a_section {
            true => (header.shoff, header.shnum) = (64.into(), 1.into()),
            false => (header.phoff, header.phnum) = (64.into(), 1.into()),
        }
        let mut file = header.as_bytes().to_vec();
        match in_a_section {
            true => file.extend(section.as_bytes()),
            false => file.extend(segment.as_bytes()),
        }
        file.resize(256, 0);
        file.extend(notes);
        file
    }

    #[test]
    fn it_is_read_from_sections_and_from_segments() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        for in_a_section in [true, false] {
            let whole = elf(in_a_section);
            std::fs::write(&path, &whole).unwrap();
            assert_eq!(of_file(&path).unwrap().as_deref(), Some("ab01ff"));
            std::fs::write(&path, &whole[..whole.len() - 30]).unwrap();
            assert!(of_file(&path).is_err());
        }
        std::fs::write(&path, "no ELF file").unwrap();
        assert_eq!(of_file(&path).unwrap(), None);
    }
}
