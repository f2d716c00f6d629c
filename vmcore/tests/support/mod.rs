//! A machine's memory for tests, and writing it.

#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking, and not each test uses all of it"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::dump::PrStatus;
use kmorph_vmcore::memory::PAGE_BYTES;
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output, WriteError, Written};
use kmorph_vmcore::{DumpError, MemoryError, PhysRange, PhysicalMemory};
use zerocopy::FromZeros;

/// Memory of which each page that is not zero is named.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pages {
    pub(crate) ranges: Vec<PhysRange>,
    pub(crate) pages: BTreeMap<u64, Vec<u8>>,
    /// A page that cannot be read.
    pub(crate) broken: Option<u64>,
}

impl Pages {
    /// Memory in these stretches: first page, pages.
    pub(crate) fn new(stretches: &[(u64, u64)]) -> Self {
        let range = |&(first, count): &(u64, u64)| PhysRange {
            start: first * 4096,
            end: (first + count) * 4096,
        };
        Self {
            ranges: stretches.iter().map(range).collect(),
            ..Self::default()
        }
    }

    pub(crate) fn page(&self, pfn: u64) -> Vec<u8> {
        let page = self.pages.get(&pfn).cloned();
        page.unwrap_or_else(|| vec![0; PAGE_BYTES])
    }
}

impl PhysicalMemory for Pages {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, phys: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut at = phys;
        let mut rest = buf;
        while !rest.is_empty() {
            let (pfn, within) = (at / 4096, usize::try_from(at % 4096).unwrap());
            if !self.ranges.iter().any(|range| range.contains(at)) {
                return Err(MemoryError::Absent { phys: at });
            }
            if self.broken == Some(pfn) {
                let what = "a page of the test";
                return Err(DumpError::Damaged { offset: at, what }.into());
            }
            let (now, later) = rest.split_at_mut((4096 - within).min(rest.len()));
            match self.pages.get(&pfn) {
                Some(page) => now.copy_from_slice(&page[within..within + now.len()]),
                None => now.fill(0),
            }
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }
}

/// Every format that is written.
pub(crate) const OUTPUTS: [Output; 5] = [
    Output::Elf,
    Output::Kdump(Compression::None),
    Output::Kdump(Compression::Zlib),
    Output::Kdump(Compression::Lzo),
    Output::Kdump(Compression::Zstd),
];

pub(crate) fn options(output: Output) -> Options {
    Options {
        output,
        level: 1,
        threads: 3,
        time: Duration::from_secs(1_800_000_000),
    }
}

/// Writes the memory, with the registers of one CPU.
pub(crate) fn write(
    memory: &dyn PhysicalMemory,
    options: Options,
    path: &Path,
) -> Result<Written, WriteError> {
    write_with(memory, options, &Control::default(), path)
}

/// The same, watched by `control`.
pub(crate) fn write_with(
    memory: &dyn PhysicalMemory,
    options: Options,
    control: &Control,
    path: &Path,
) -> Result<Written, WriteError> {
    let mut cpu = PrStatus::new_zeroed();
    cpu.registers.rip = 0xffff_ffff_8100_0000_u64.into();
    let contents = Contents {
        memory,
        kernel: None,
        cpus: &[cpu],
        level_of_source: 0,
    };
    writer::write(contents, options, control, path)
}

/// Ranges as a dump tells them: touching ones are one.
pub(crate) fn joined(ranges: &[PhysRange]) -> Vec<PhysRange> {
    let mut joined: Vec<PhysRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(*range),
        }
    }
    joined
}
