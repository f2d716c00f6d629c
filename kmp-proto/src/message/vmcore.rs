//! VMCORE_*: a survivor reads the memory of a fenced kernel.

use super::{LayoutError, Payload, at_most, fixed_only};
use crate::wire::Layout;
use crate::wire::field::{code_enum, fixed};
use crate::wire::record::{CRITICAL, DATA, RANGE, append, once, records};

/// Most memory ranges in one request.
const RANGES_MAX: usize = 1024;

code_enum! {
    /// How a chunk is encoded.
    ChunkEncoding: u16 {
        /// As it lies in memory.
        Raw = 0, "raw";
        /// All zero: no bytes follow.
        Zero = 1, "zero";
        /// zstd.
        Zstd = 2, "zstd";
    }
}

fixed! {
    /// Fixed part of VMCORE_START.
    pub VmcoreStartFixed, 24 {
        /// Number of the capture.
        capture: u64 = 0,
        /// The fenced generation.
        generation: u64 = 8,
        /// Largest chunk wanted, bytes.
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
    /// Fixed part of VMCORE_DATA.
    pub VmcoreDataFixed, 32 {
        /// Number of the capture.
        capture: u64 = 0,
        /// Physical address of the chunk.
        address: u64 = 8,
        /// Bytes of memory it stands for.
        length: u64 = 16,
        /// CRC-32/ISO-HDLC of those bytes, decoded.
        chunk_crc32: u32 = 24,
        /// How they are encoded.
        encoding: ChunkEncoding = 28,
        ; reserved 2
    }
}

fixed! {
    /// VMCORE_COMPLETE, and the replies to it and to VMCORE_START.
    pub VmcoreComplete, 24 {
        /// Number of the capture.
        capture: u64 = 0,
        /// Bytes of memory sent.
        bytes: u64 = 8,
        /// 0 complete, 1 some ranges could not be read.
        status: u16 = 16,
        ; reserved 6
    }
}

fixed_only!(VmcoreComplete);

/// VMCORE_START.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmcoreStart {
    /// Fixed part.
    pub fixed: VmcoreStartFixed,
    /// What to read.
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
        let mut ranges = Vec::new();
        for record in records(rest) {
            let record = record?;
            match record.kind {
                RANGE if ranges.len() == RANGES_MAX => {
                    return Err(LayoutError::TooMany(RANGES_MAX));
                }
                RANGE => ranges.push(MemoryRange::exact(record.bytes)?),
                _ => record.skip()?,
            }
        }
        Ok(Self { fixed, ranges })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        for range in &self.ranges {
            let mut bytes = Vec::with_capacity(MemoryRange::BYTES);
            range.append(&mut bytes);
            append(out, RANGE, CRITICAL, &bytes);
        }
    }

    fn writable(&self) -> Result<(), LayoutError> {
        at_most(self.ranges.len(), RANGES_MAX)
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
    ("VMCORE_DATA", VmcoreDataFixed::LAYOUT),
    ("VMCORE_COMPLETE", VmcoreComplete::LAYOUT),
];
