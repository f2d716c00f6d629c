//! VMCORE_*: a survivor reads the memory of a fenced kernel.

use super::{LayoutError, Payload, at_most, fixed_only};
use crate::checksum::crc32;
use crate::wire::Layout;
use crate::wire::field::{code_enum, fixed};
use crate::wire::record::{CRITICAL, DATA, PCI_PORT, RANGE, WINDOW, append, once, records};

/// Maximum number of memory ranges in one request.
pub const RANGES_MAX: usize = 1024;
/// Maximum number of windows of lent memory in one request.
pub const WINDOWS_MAX: usize = 16;
/// Maximum length of a PCI port's address, bytes.
pub const PCI_PORT_MAX_BYTES: usize = 32;
/// Maximum size of a chunk, bytes: with its other fields it fits into a frame of 1 MiB.
pub const CHUNK_MAX_BYTES: u32 = 512 * 1024;

code_enum! {
    /// Encoding of a chunk.
    ChunkEncoding: u16 {
        /// Plain bytes.
        Raw = 0, "raw";
        /// All zero: no bytes follow.
        Zero = 1, "zero";
    }
}

code_enum! {
    /// Whether all requested memory was read.
    CaptureStatus: u16 {
        /// All of it was read.
        Complete = 0, "complete";
        /// Some of it could not be read.
        Incomplete = 1, "incomplete";
    }
}

fixed! {
    /// Fixed part of VMCORE_START.
    pub VmcoreStartFixed, 24 {
        /// Number of the capture.
        capture: u64 = 0,
        /// The fenced generation.
        generation: u64 = 8,
        /// Maximum size of a chunk, bytes.
        chunk_bytes: u32 = 16,
        ; reserved 4
    }
}

fixed! {
    /// A range of physical memory: a RANGE record.
    pub MemoryRange, 16 {
        /// First address.
        start: u64 = 0,
        /// Length in bytes.
        length: u64 = 8,
        ; reserved 0
    }
}

fixed! {
    /// Memory of the fenced kernel, and its location in the lent memory: a WINDOW record.
    pub MemoryWindow, 24 {
        /// First address in the fenced kernel.
        start: u64 = 0,
        /// Length in bytes.
        length: u64 = 8,
        /// Offset of its first byte in the lent memory.
        offset: u64 = 16,
        ; reserved 0
    }
}

fixed! {
    /// Fixed part of VMCORE_DATA.
    pub VmcoreDataFixed, 32 {
        /// Number of the capture.
        capture: u64 = 0,
        /// Physical address of the chunk.
        address: u64 = 8,
        /// Number of memory bytes in the chunk.
        length: u64 = 16,
        /// CRC-32/ISO-HDLC of these bytes, decoded.
        chunk_crc32: u32 = 24,
        /// Encoding of the bytes.
        encoding: ChunkEncoding = 28,
        ; reserved 2
    }
}

fixed! {
    /// VMCORE_COMPLETE, and the replies to it and to VMCORE_START.
    pub VmcoreComplete, 24 {
        /// Number of the capture.
        capture: u64 = 0,
        /// Bytes of memory: to be sent, sent, or received.
        bytes: u64 = 8,
        /// Whether the memory is complete.
        status: CaptureStatus = 16,
        ; reserved 6
    }
}

fixed_only!(VmcoreComplete);

/// VMCORE_START.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmcoreStart {
    /// Fixed part.
    pub fixed: VmcoreStartFixed,
    /// Location of the lent memory: below the PCI port with this address in the survivor.
    pub pci_port: Option<String>,
    /// The lent parts of the memory.
    pub windows: Vec<MemoryWindow>,
    /// The ranges to read, in this order.
    pub ranges: Vec<MemoryRange>,
}

/// VMCORE_DATA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmcoreData {
    /// Fixed part.
    pub fixed: VmcoreDataFixed,
    /// The encoded bytes.
    pub data: Vec<u8>,
}

impl Payload for VmcoreStart {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = VmcoreStartFixed::split(payload)?;
        let (mut pci_port, mut windows, mut ranges) = (None, Vec::new(), Vec::new());
        for record in records(rest) {
            let record = record?;
            match record.kind {
                PCI_PORT => once(&mut pci_port, record.text(PCI_PORT_MAX_BYTES)?, PCI_PORT)?,
                WINDOW if windows.len() == WINDOWS_MAX => {
                    return Err(LayoutError::TooMany(WINDOWS_MAX));
                }
                WINDOW => windows.push(MemoryWindow::exact(record.bytes)?),
                RANGE if ranges.len() == RANGES_MAX => {
                    return Err(LayoutError::TooMany(RANGES_MAX));
                }
                RANGE => ranges.push(MemoryRange::exact(record.bytes)?),
                _ => record.skip()?,
            }
        }
        Ok(Self {
            fixed,
            pci_port,
            windows,
            ranges,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        if let Some(port) = &self.pci_port {
            append(out, PCI_PORT, CRITICAL, port.as_bytes());
        }
        for window in &self.windows {
            let mut bytes = Vec::with_capacity(MemoryWindow::BYTES);
            window.append(&mut bytes);
            append(out, WINDOW, CRITICAL, &bytes);
        }
        for range in &self.ranges {
            let mut bytes = Vec::with_capacity(MemoryRange::BYTES);
            range.append(&mut bytes);
            append(out, RANGE, CRITICAL, &bytes);
        }
    }

    fn writable(&self) -> Result<(), LayoutError> {
        let port = self.pci_port.as_deref().unwrap_or_default();
        if port.len() > PCI_PORT_MAX_BYTES {
            return Err(LayoutError::TextTooLong {
                kind: PCI_PORT,
                limit: PCI_PORT_MAX_BYTES,
            });
        }
        at_most(self.windows.len(), WINDOWS_MAX)?;
        at_most(self.ranges.len(), RANGES_MAX)
    }
}

impl VmcoreData {
    /// Encodes a chunk of memory; an all-zero chunk contains no bytes.
    pub fn chunk(capture: u64, address: u64, memory: &[u8]) -> Self {
        let zero = memory.iter().all(|byte| *byte == 0);
        let (encoding, data) = match zero {
            true => (ChunkEncoding::Zero, Vec::new()),
            false => (ChunkEncoding::Raw, memory.to_vec()),
        };
        Self {
            fixed: VmcoreDataFixed {
                capture,
                address,
                length: memory.len() as u64,
                chunk_crc32: crc32(&[memory]),
                encoding,
            },
            data,
        }
    }

    /// Writes the memory that the chunk represents to `memory`; false if the length differs or the checksum does not
    /// match.
    pub fn decode(&self, memory: &mut [u8]) -> bool {
        if self.fixed.length != memory.len() as u64 {
            return false;
        }
        match self.fixed.encoding {
            ChunkEncoding::Zero if self.data.is_empty() => memory.fill(0),
            ChunkEncoding::Raw if self.data.len() == memory.len() => {
                memory.copy_from_slice(&self.data);
            }
            _ => return false,
        }
        crc32(&[memory]) == self.fixed.chunk_crc32
    }
}

impl Payload for VmcoreData {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = VmcoreDataFixed::split(payload)?;
        let mut data = None;
        for record in records(rest) {
            let record = record?;
            match record.kind {
                DATA => once(&mut data, record.bytes.to_vec(), DATA)?,
                _ => record.skip()?,
            }
        }
        Ok(Self {
            fixed,
            data: data.unwrap_or_default(),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        if !self.data.is_empty() {
            append(out, DATA, CRITICAL, &self.data);
        }
    }
}

pub(super) const LAYOUTS: &[(&str, Layout)] = &[
    ("VMCORE_START", VmcoreStartFixed::LAYOUT),
    ("VMCORE_START", MemoryRange::LAYOUT),
    ("VMCORE_START", MemoryWindow::LAYOUT),
    ("VMCORE_DATA", VmcoreDataFixed::LAYOUT),
    ("VMCORE_COMPLETE", VmcoreComplete::LAYOUT),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_decoded_only_when_it_is_what_was_read() {
        let memory = [7; 8192];
        let chunk = VmcoreData::chunk(5, 0x1000, &memory);
        let mut decoded = [0; 8192];
        assert!(chunk.decode(&mut decoded) && decoded == memory);
        assert!(!chunk.decode(&mut [0; 4096]), "another length");
        let mut changed = chunk.clone();
        changed.data[100] ^= 1;
        assert!(!changed.decode(&mut decoded), "another byte");
        changed.data.pop();
        assert!(!changed.decode(&mut decoded), "a byte less");
    }

    #[test]
    fn of_zeros_no_byte_is_sent() {
        let chunk = VmcoreData::chunk(5, 0, &[0; 4096]);
        assert!(chunk.data.is_empty());
        let mut decoded = [9; 4096];
        assert!(chunk.decode(&mut decoded) && decoded == [0; 4096]);
        let with_bytes = VmcoreData {
            data: vec![0; 4096],
            ..chunk
        };
        assert!(!with_bytes.decode(&mut decoded));
    }

    #[test]
    fn the_largest_chunk_fits_into_a_frame() {
        let chunk = VmcoreData::chunk(5, 0, &[7; CHUNK_MAX_BYTES as usize]);
        let mut frame = Vec::new();
        let message = crate::message::Message::VmcoreData(chunk);
        crate::codec::encode(&message, 1, 1, &mut frame).unwrap();
    }
}
