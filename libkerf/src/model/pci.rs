use serde::{Deserialize, Serialize};

use std::fmt;

/// The address of a PCI function: `0000:09:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
pub struct PciAddress {
    /// The domain.
    pub domain: u16,
    /// The bus.
    pub bus: u8,
    /// The device on the bus, below 32.
    pub slot: u8,
    /// The function of the device, below 8.
    pub function: u8,
}

impl PciAddress {
    /// Parses `domain:bus:slot.function`, all hexadecimal, or the node name that the kernel and kerf derive from it,
    /// `pci_0000_09_00_0`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (domain, bus, slot, function) = match text.strip_prefix("pci_") {
            Some(name) => {
                let mut parts = name.split('_');
                let parts = (
                    parts.next()?,
                    parts.next()?,
                    parts.next()?,
                    parts.next()?,
                    parts.next(),
                );
                let (domain, bus, slot, function, None) = parts else {
                    return None;
                };
                (domain, bus, slot, function)
            }
            None => {
                let (domain, rest) = text.split_once(':')?;
                let (bus, rest) = rest.split_once(':')?;
                let (slot, function) = rest.split_once('.')?;
                (domain, bus, slot, function)
            }
        };
        Some(Self {
            domain: hex(domain, 4, 0xffff)?,
            bus: u8::try_from(hex(bus, 2, 0xff)?).ok()?,
            slot: u8::try_from(hex(slot, 2, 0x1f)?).ok()?,
            function: u8::try_from(hex(function, 1, 7)?).ok()?,
        })
    }

    /// Returns the address in the first cell of a PCI node's `reg`.
    #[must_use]
    pub fn from_cell(domain: u16, cell: u32) -> Self {
        let byte = |shift: u32, mask: u32| {
            let value = (cell >> shift) & mask;
            u8::try_from(value).unwrap_or(u8::MAX)
        };
        Self {
            domain,
            bus: byte(16, 0xff),
            slot: byte(11, 0x1f),
            function: byte(8, 7),
        }
    }

    /// Returns the first cell of a PCI node's `reg`.
    #[must_use]
    pub fn cell(self) -> u32 {
        u32::from(self.bus) << 16 | u32::from(self.slot) << 11 | u32::from(self.function) << 8
    }

    /// Returns the name that kerf gives the device's node: `pci_0000_09_00_0`.
    #[must_use]
    pub fn node_name(self) -> String {
        self.to_string()
            .replace([':', '.'], "_")
            .replacen("", "pci_", 1)
    }
}

fn hex(text: &str, digits: usize, most: u16) -> Option<u16> {
    let is_hex = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    let value = u16::from_str_radix(text, 16).ok()?;
    (is_hex && text.len() <= digits && value <= most).then_some(value)
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            slot,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{slot:02x}.{function:x}")
    }
}

/// Returns whether the kernel's `sscanf("%x:%x:%x.%x")` accepts a text that [`PciAddress::parse`]
/// refuses: it ignores trailing text, and truncates numbers that are too large.
pub(crate) fn is_taken_by_kernel(text: &str) -> bool {
    let mut rest = text;
    for separator in [Some(':'), Some(':'), Some('.'), None] {
        let digits = rest.trim_start_matches([' ', '\t', '\n']);
        let digits = digits.strip_prefix("0x").unwrap_or(digits);
        let end = digits
            .find(|c: char| !c.is_ascii_hexdigit())
            .unwrap_or(digits.len());
        if end == 0 {
            return false;
        }
        rest = &digits[end..];
        match separator {
            Some(separator) => match rest.strip_prefix(separator) {
                Some(after) => rest = after,
                None => return false,
            },
            None => return true,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_they_are_written() {
        let address = PciAddress::parse("0000:09:1f.7").unwrap();
        assert_eq!(address.to_string(), "0000:09:1f.7");
        assert_eq!(address.node_name(), "pci_0000_09_1f_7");
        assert_eq!(PciAddress::parse("pci_0000_09_1f_7"), Some(address));
        assert_eq!(PciAddress::parse("0:9:1f.7"), Some(address));
        assert_eq!(PciAddress::from_cell(0, address.cell()), address);
    }

    #[test]
    fn other_texts_are_no_addresses() {
        for text in [
            "",
            "09:00.0",
            "0000:09:20.0",
            "0000:09:00.8",
            "0000:09:00.0x",
            "+1:0:0.0",
            "pci_0_0_0_0_0",
        ] {
            assert_eq!(PciAddress::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_kernel_takes_more_than_it_should() {
        assert!(is_taken_by_kernel("0000:09:00.0 (nic)"));
        assert!(is_taken_by_kernel("0000:09:00.9"));
        assert!(!is_taken_by_kernel("0000:09:00"));
        assert!(!is_taken_by_kernel("nic"));
    }
}
