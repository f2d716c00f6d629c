//! VMCOREINFO: the kernel's description of itself, lines of `KEY=value`.
//!
//! It is in a note of the dump or, if the dump was made without the kernel's help, in the memory: the kernel prepares
//! the note at boot, at the start of a page.

use std::collections::HashMap;

use crate::dump::layout::NoteHeader;
use crate::dump::notes::{VMCOREINFO, VMCOREINFO_MAX_BYTES};
use crate::memory::{PAGE, PAGE_BYTES, PhysRange, PhysicalMemory};

use zerocopy::FromBytes;

/// Maximum number of lines.
const LINES_MAX: usize = 4096;
/// Number of bytes per read when memory is searched for the note.
const SEARCH_BYTES: usize = 256 * PAGE_BYTES;

/// The place where VMCOREINFO was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In a note or header of the dump.
    Note,
    /// In the memory, by a search.
    Memory {
        /// The page.
        phys: u64,
    },
}

/// A value that VMCOREINFO does not have, or that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VMCOREINFO has no usable {0}")]
pub struct Missing(
    /// The key.
    pub String,
);

/// VMCOREINFO.
#[derive(Clone, Debug)]
pub struct VmcoreInfo {
    values: HashMap<String, String>,
    text: Vec<u8>,
    origin: Origin,
}

impl VmcoreInfo {
    /// Parses its text; ignores lines that are not `KEY=value`, and everything after a zero byte.
    pub fn parse(text: &[u8], origin: Origin) -> Self {
        let end = text.iter().position(|byte| *byte == 0);
        let text = &text[..end.unwrap_or(text.len())];
        let values = String::from_utf8_lossy(text)
            .lines()
            .take(LINES_MAX)
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Self {
            values,
            text: text.to_vec(),
            origin,
        }
    }

    /// Searches the memory for the note, from both ends of each range towards its middle: a kernel allocates its
    /// boot data near one of them. In guests of 192 MiB to 5 GiB the distance was at most 70 MiB. A search
    /// without a result takes about a tenth of a second per gigabyte.
    pub fn search(memory: &dyn PhysicalMemory) -> Option<Self> {
        Self::search_for(memory, |_| true)
    }

    /// As [`VmcoreInfo::search`], for the first note that is `accepted`: memory may contain notes of other kernels,
    /// such as those of its guests.
    pub fn search_for(
        memory: &dyn PhysicalMemory,
        mut accepted: impl FnMut(&Self) -> bool,
    ) -> Option<Self> {
        let mut buf = vec![0; SEARCH_BYTES];
        let mut ranges = memory.ranges().to_vec();
        while !ranges.is_empty() {
            for range in &mut ranges {
                let low = take_low(memory, range);
                let high = take_high(range);
                for window in [low, high] {
                    let found = Self::search_window(memory, window, &mut buf, &mut accepted);
                    if found.is_some() {
                        return found;
                    }
                }
            }
            ranges.retain(|range| !range.is_empty());
        }
        None
    }

    fn search_window(
        memory: &dyn PhysicalMemory,
        window: PhysRange,
        buf: &mut [u8],
        accepted: &mut impl FnMut(&Self) -> bool,
    ) -> Option<Self> {
        let start = next(memory, window);
        // A window fits into the buffer.
        let length = usize::try_from(window.end.saturating_sub(start)).ok()?;
        let part = buf.get_mut(..length)?;
        let whole = memory.read(start, part).is_ok();
        let pages = part.chunks_exact_mut(PAGE_BYTES);
        (0..).zip(pages).find_map(|(number, page)| {
            let phys = start + number * PAGE;
            if !whole {
                memory.read(phys, page).ok()?;
            }
            let text = note_in(page)?;
            Some(Self::parse(text, Origin::Memory { phys })).filter(&mut *accepted)
        })
    }

    /// Returns the place where it was found.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Returns the original text.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// Returns the kernel's release.
    pub fn release(&self) -> Option<&str> {
        self.get("OSRELEASE")
    }

    /// Returns the kernel's build id, in hexadecimal digits.
    pub fn build_id(&self) -> Option<&str> {
        self.get("BUILD-ID")
    }

    /// Returns the time when a crash kernel was started with kexec, in seconds since 1970; only in dumps of a kdump
    /// kernel.
    pub fn crash_time(&self) -> Option<u64> {
        self.get("CRASHTIME")?.parse().ok()
    }

    /// Returns the raw value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(|value| value.trim())
    }

    /// Returns the address of a symbol.
    ///
    /// # Errors
    ///
    /// When the value is missing, as for the functions below.
    pub fn symbol(&self, name: &str) -> Result<u64, Missing> {
        self.parsed(&format!("SYMBOL({name})"), |text| {
            u64::from_str_radix(text, 16).ok()
        })
    }

    /// Returns the offset of a member in its structure, bytes.
    pub fn offset(&self, member: &str) -> Result<u64, Missing> {
        self.small(format!("OFFSET({member})"))
    }

    /// Returns the size of a structure, bytes.
    pub fn size(&self, structure: &str) -> Result<u64, Missing> {
        self.small(format!("SIZE({structure})"))
    }

    /// Returns the number of elements of an array.
    pub fn length(&self, array: &str) -> Result<u64, Missing> {
        self.small(format!("LENGTH({array})"))
    }

    /// Returns a number; some are hexadecimal, some negative.
    pub fn number(&self, name: &str) -> Result<i64, Missing> {
        self.parsed(&format!("NUMBER({name})"), |text| {
            match text.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16).ok().map(u64::cast_signed),
                None => text.parse().ok(),
            }
        })
    }

    /// Returns an offset or size: a value larger than any structure is an error.
    fn small(&self, key: String) -> Result<u64, Missing> {
        self.parsed(&key, |text| {
            text.parse().ok().filter(|value: &u64| *value < 1 << 32)
        })
    }

    fn parsed<T>(&self, key: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T, Missing> {
        let value = self.get(key).and_then(parse);
        value.ok_or_else(|| Missing(key.to_owned()))
    }
}

/// Takes a window from the lower end of a range, after skipping memory that is missing or known to be zero.
fn take_low(memory: &dyn PhysicalMemory, range: &mut PhysRange) -> PhysRange {
    let start = next(memory, *range);
    let end = range.end.min(start.saturating_add(SEARCH_BYTES as u64));
    range.start = end;
    PhysRange { start, end }
}

/// Takes a window from the upper end.
fn take_high(range: &mut PhysRange) -> PhysRange {
    let end = range.end;
    range.end = range.start.max(end.saturating_sub(SEARCH_BYTES as u64));
    PhysRange {
        start: range.end,
        end,
    }
}

/// Returns the start of the first readable page in the range that may have contents; the end of the range if there is
/// none.
fn next(memory: &dyn PhysicalMemory, range: PhysRange) -> u64 {
    memory.next_present(memory.next_data(range.start, range.end), range.end)
}

/// Returns the text in a page that begins with the note.
fn note_in(page: &[u8]) -> Option<&[u8]> {
    let (header, rest) = NoteHeader::read_from_prefix(page).ok()?;
    let length = u64::from(header.content_bytes.get());
    let named = header.name_bytes.get() as usize == VMCOREINFO.len() && header.kind.get() == 0;
    if !named || length == 0 || length > VMCOREINFO_MAX_BYTES {
        return None;
    }
    let text = rest
        .strip_prefix(VMCOREINFO)?
        .get(VMCOREINFO.len().next_multiple_of(4) - VMCOREINFO.len()..)?;
    let text = text.get(..usize::try_from(length).ok()?)?;
    text.starts_with(b"OSRELEASE=").then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"OSRELEASE=6.1.0-x\nSYMBOL(prb)=ffffffffa6a622c0\nOFFSET(page.flags)=0\n\
        NUMBER(phys_base)=-503316480\nNUMBER(VMALLOC_START)=0xffffcb5a40000000\nLENGTH(x)=99999999999\n\
        nonsense\n\0behind=1\n";

    #[test]
    fn each_kind_of_value_is_read_in_its_own_way() {
        let info = VmcoreInfo::parse(TEXT, Origin::Note);
        assert_eq!(info.release(), Some("6.1.0-x"));
        assert_eq!(info.symbol("prb"), Ok(0xffff_ffff_a6a6_22c0));
        assert_eq!(info.number("phys_base"), Ok(-503_316_480));
        assert_eq!(info.number("VMALLOC_START"), Ok(-57_886_495_473_664));
        assert_eq!(info.offset("page.flags"), Ok(0));
        assert_eq!(
            info.offset("page.lru"),
            Err(Missing("OFFSET(page.lru)".into()))
        );
        assert!(info.length("x").is_err());
        assert_eq!(info.get("behind"), None);
    }
}
