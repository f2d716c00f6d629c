//! The kernel's own symbol table (kallsyms) in its memory: names without debug symbols. VMCOREINFO gives its location
//! since Linux 6.0.
//!
//! Names are compressed: each is a length (one byte, or two if bit 7 of the first is set) and that many bytes, each
//! of which stands for a token, a piece of text. The first character is the symbol's type.

use super::{Kernel, KernelError};

/// Maximum number of symbols: a kernel has about 150,000.
const SYMBOLS_MAX: u32 = 1 << 20;
/// Maximum length of a name, bytes.
const NAME_MAX_BYTES: usize = 512;
/// Maximum size of the packed names, bytes: a kernel has about 2 MiB.
const NAMES_MAX_BYTES: usize = 24 << 20;
/// Interval between markers, in names: a lookup starts at the preceding marker.
const MARKER_EVERY: usize = 256;
/// Number of bytes of names per read.
const PART_BYTES: usize = 64 << 10;

/// The table.
pub struct Symbols {
    /// Sorted by address, as in the kernel.
    addresses: Vec<u64>,
    names: Vec<u8>,
    /// Offsets in `names` of every 256th name.
    markers: Vec<usize>,
    tokens: Vec<Vec<u8>>,
}

/// A place in the kernel's code or data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The symbol at or before it.
    pub symbol: String,
    /// Bytes from there.
    pub offset: u64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}+{:#x}", self.symbol, self.offset)
    }
}

impl Kernel<'_> {
    /// Reads the symbol table.
    ///
    /// # Errors
    ///
    /// When VMCOREINFO does not contain its location (before Linux 6.0), or it cannot be read.
    pub fn symbols(&self) -> Result<Symbols, KernelError> {
        let info = self.info();
        let what = "the table of symbols";
        let count_at = info.symbol("kallsyms_num_syms")?;
        let count = self.u32_at(count_at, what)?;
        if count == 0 || count > SYMBOLS_MAX {
            return Err(KernelError::Nonsense {
                what: "the number of symbols",
                virt: count_at,
            });
        }
        // At most SYMBOLS_MAX.
        let mut offsets = vec![0; count as usize * 4];
        let offsets_at = info.symbol("kallsyms_offsets")?;
        let read = self.read(offsets_at, &mut offsets);
        read.map_err(|source| KernelError::Memory { what, source })?;
        let (offsets, _) = offsets.as_chunks::<4>();
        let offsets: Vec<i32> = offsets.iter().map(|o| i32::from_le_bytes(*o)).collect();
        let base = match info.symbol("kallsyms_relative_base") {
            Ok(at) => Base::of(&offsets, self.u64_at(at, what)?),
            Err(_) => Base::Each(offsets_at),
        };
        let addresses = (0_u64..).zip(&offsets);
        let addresses = addresses.map(|(n, offset)| base.address(n, *offset));
        let addresses = addresses.collect();
        let tokens = self.tokens(info.symbol("kallsyms_token_table")?, {
            info.symbol("kallsyms_token_index")?
        })?;
        let (names, markers) = self.names(info.symbol("kallsyms_names")?, count)?;
        Ok(Symbols {
            addresses,
            names,
            markers,
            tokens,
        })
    }

    fn tokens(&self, table: u64, index: u64) -> Result<Vec<Vec<u8>>, KernelError> {
        let places: [u8; 512] = self.bytes(index, "the symbols' tokens")?;
        let (places, _) = places.as_chunks::<2>();
        Ok(places
            .iter()
            .map(|place| table.wrapping_add(u64::from(u16::from_le_bytes(*place))))
            .map(|at| self.text_at(at, NAME_MAX_BYTES))
            .collect())
    }

    /// Returns the packed names, and the offset of every 256th one.
    fn names(&self, at: u64, count: u32) -> Result<(Vec<u8>, Vec<usize>), KernelError> {
        let mut names = Vec::new();
        let mut markers = Vec::new();
        let mut place = 0;
        for number in 0..count as usize {
            if number % MARKER_EVERY == 0 {
                markers.push(place);
            }
            while names.len() < place + 2 {
                if names.len() > NAMES_MAX_BYTES {
                    let what = "the symbols' names";
                    return Err(KernelError::Nonsense { what, virt: at });
                }
                self.more_names(at, &mut names)?;
            }
            place = packed_name(&names, place).map_or(place + 1, |(_, end)| end);
        }
        while names.len() < place {
            self.more_names(at, &mut names)?;
        }
        Ok((names, markers))
    }

    fn more_names(&self, at: u64, names: &mut Vec<u8>) -> Result<(), KernelError> {
        let start = names.len();
        names.resize(start + PART_BYTES, 0);
        let read = self.read(at.wrapping_add(start as u64), &mut names[start..]);
        read.map_err(|source| KernelError::Memory {
            what: "the symbols' names",
            source,
        })
    }
}

/// The base of the table's offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// Negative offsets count backwards from this base; others are absolute (per-CPU data). Linux 6.12 and older.
    Negative(u64),
    /// All offsets count from this base, unsigned. Linux 6.16 and 6.18, for example.
    All(u64),
    /// Each offset counts from its own location, in the table that begins here. Linux 7.2 and newer, which have no
    /// base.
    Each(u64),
}

impl Base {
    /// Determines the base. The kernel's image is smaller than 2 GiB: unsigned offsets are never negative as signed
    /// numbers.
    fn of(offsets: &[i32], base: u64) -> Self {
        match offsets.iter().any(|offset| *offset < 0) {
            true => Self::Negative(base),
            false => Self::All(base),
        }
    }

    /// Returns the address of the symbol with this number.
    fn address(self, number: u64, offset: i32) -> u64 {
        let signed = i64::from(offset).cast_unsigned();
        match self {
            Self::Negative(_) if offset >= 0 => signed,
            Self::Negative(base) => base.wrapping_sub(1).wrapping_sub(signed),
            Self::All(base) => base.wrapping_add(u64::from(offset.cast_unsigned())),
            Self::Each(table) => table.wrapping_add(4 * number).wrapping_add(signed),
        }
    }
}

/// Returns start (after its length) and end of the name at `place`.
fn packed_name(names: &[u8], place: usize) -> Option<(usize, usize)> {
    let low = usize::from(*names.get(place)?);
    if low & 0x80 == 0 {
        return Some((place + 1, place + 1 + low));
    }
    let high = usize::from(*names.get(place + 1)?);
    Some((place + 2, place + 2 + (low & 0x7f | high << 7)))
}

impl Symbols {
    /// Returns the symbol that contains an address; `None` outside the kernel's image.
    pub fn place(&self, address: u64) -> Option<Place> {
        let behind = self.addresses.partition_point(|start| *start <= address);
        let mut index = behind.checked_sub(1)?;
        let start = self.addresses[index];
        // An address after the last symbol belongs to none.
        if start < super::START_KERNEL_MAP || behind == self.addresses.len() {
            return None;
        }
        // Of several names for one address, the kernel's own messages use the first.
        while index > 0 && self.addresses[index - 1] == start {
            index -= 1;
        }
        Some(Place {
            symbol: self.name(index)?,
            offset: address - start,
        })
    }

    /// Returns the addresses of these symbols, in the given order.
    pub fn find<const N: usize>(&self, wanted: [&str; N]) -> [Option<u64>; N] {
        let mut found = [None; N];
        let mut place = 0;
        let mut name = Vec::new();
        for address in &self.addresses {
            let Some((start, end)) = packed_name(&self.names, place) else {
                break;
            };
            place = end;
            self.unpack(start, end, &mut name);
            for (slot, wanted) in found.iter_mut().zip(wanted) {
                if slot.is_none() && name.get(1..) == Some(wanted.as_bytes()) {
                    *slot = Some(*address);
                }
            }
        }
        found
    }

    fn name(&self, index: usize) -> Option<String> {
        let mut place = *self.markers.get(index / MARKER_EVERY)?;
        for _ in 0..index % MARKER_EVERY {
            place = packed_name(&self.names, place)?.1;
        }
        let (start, end) = packed_name(&self.names, place)?;
        let mut name = Vec::new();
        self.unpack(start, end, &mut name);
        Some(String::from_utf8_lossy(name.get(1..)?).into_owned())
    }

    fn unpack(&self, start: usize, end: usize, name: &mut Vec<u8>) {
        name.clear();
        for token in self.names.get(start..end).unwrap_or_default() {
            if let Some(text) = self.tokens.get(usize::from(*token)) {
                name.extend(text);
            }
            if name.len() > NAME_MAX_BYTES {
                name.truncate(NAME_MAX_BYTES);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols() -> Symbols {
        let mut tokens = vec![Vec::new(); 256];
        tokens[1] = b"T".to_vec();
        tokens[2] = b"do_".to_vec();
        tokens[3] = b"exit".to_vec();
        tokens[4] = b"panic".to_vec();
        let base = crate::kernel::START_KERNEL_MAP;
        Symbols {
            addresses: vec![0x20, base + 0x100, base + 0x180, base + 0x180, base + 0x900],
            names: vec![2, 1, 3, 3, 1, 2, 3, 0x82, 0, 1, 4, 2, 1, 3, 1, 1],
            markers: vec![0],
            tokens,
        }
    }

    #[test]
    fn an_address_has_the_symbol_at_or_before_it() {
        let symbols = symbols();
        let base = crate::kernel::START_KERNEL_MAP;
        let place = |address| symbols.place(address).map(|p| p.to_string());
        assert_eq!(place(base + 0x17f).as_deref(), Some("do_exit+0x7f"));
        assert_eq!(place(base + 0x181).as_deref(), Some("panic+0x1"));
        assert_eq!(place(base + 0x900), None);
        assert_eq!(place(0x30), None);
        assert_eq!(symbols.find(["panic", "x"]), [Some(base + 0x180), None]);
    }

    #[test]
    fn offsets_count_from_what_their_kernel_means() {
        const BASE: u64 = 0xffff_ffff_8100_0000;
        let old = Base::of(&[0x1000, -1, -17], BASE);
        assert_eq!(old.address(0, 0x1000), 0x1000);
        assert_eq!(old.address(1, -1), BASE);
        assert_eq!(old.address(2, -17), BASE + 0x10);
        let without_sign = Base::of(&[0, 0x10], BASE);
        assert_eq!(without_sign.address(1, 0x10), BASE + 0x10);
        let each = Base::Each(BASE + 0x20_0000);
        assert_eq!(each.address(0, -0x20_0000), BASE);
        assert_eq!(each.address(2, 0x10), BASE + 0x20_0018);
    }
}
