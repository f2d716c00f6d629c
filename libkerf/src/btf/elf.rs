//! Finds a section of an ELF file by name.

use super::BtfError;
use crate::image::ELF64;

const HEADER_BYTES: usize = 64;
const SECTIONS: usize = 40;
const SECTION_BYTES: usize = 58;
const SECTION_COUNT: usize = 60;
const SECTION_NAMES: usize = 62;
/// Size of a section header of 64-bit ELF, bytes.
const ENTRY: usize = 64;

/// Returns the bytes of the section `name` of a 64-bit ELF file.
pub(super) fn section<'f>(file: &'f [u8], name: &str) -> Result<&'f [u8], BtfError> {
    if file.len() < HEADER_BYTES || !file.starts_with(ELF64) {
        return Err(BtfError::NotElf);
    }
    let broken = BtfError::Cut;
    let u16_at = |at| crate::image::u16_at(file, at).ok_or(broken);
    let start = offset(file, SECTIONS)?;
    let (size, count) = (u16_at(SECTION_BYTES)?, u16_at(SECTION_COUNT)?);
    if usize::from(size) != ENTRY {
        return Err(BtfError::Missing);
    }
    let table = file.get(start..).ok_or(broken)?;
    let headers: Vec<&[u8]> = table.chunks_exact(ENTRY).take(count.into()).collect();
    let names = headers.get(usize::from(u16_at(SECTION_NAMES)?));
    let names = contents(file, names.ok_or(BtfError::Missing)?)?;
    for header in headers {
        let at = crate::image::u32_at(header, 0).ok_or(broken)?;
        let own = names.get(usize::try_from(at).unwrap_or(usize::MAX)..);
        let own = own.and_then(|own| own.strip_prefix(name.as_bytes()));
        if own.is_some_and(|rest| rest.first() == Some(&0)) {
            return contents(file, header);
        }
    }
    Err(BtfError::Missing)
}

fn contents<'f>(file: &'f [u8], header: &[u8]) -> Result<&'f [u8], BtfError> {
    let (start, bytes) = (offset(header, 24)?, offset(header, 32)?);
    let end = start.checked_add(bytes).ok_or(BtfError::Cut)?;
    file.get(start..end).ok_or(BtfError::Cut)
}

fn offset(bytes: &[u8], at: usize) -> Result<usize, BtfError> {
    let offset = crate::image::u64_at(bytes, at).ok_or(BtfError::Cut)?;
    usize::try_from(offset).map_err(|_| BtfError::Cut)
}
