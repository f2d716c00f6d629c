//! The hardware of a machine: its CPUs and their locations, its memory blocks, the pool in `/proc/iomem`.
//!
//! All files are read below a root directory, so that tests can provide their own machine.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// A CPU and its location.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Cpu {
    /// Physical id: APIC id on x86. This is how multikernel names CPUs.
    pub id: u64,
    /// The running kernel's number for it, if that kernel has the CPU.
    pub logical: Option<u32>,
    /// NUMA node.
    pub node: u32,
    /// Socket.
    pub package: u32,
    /// Core within the socket. SMT siblings have the same core.
    pub core: u32,
}

/// A machine, as far as known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Machine {
    cpus: BTreeMap<u64, Cpu>,
    memory_block: Option<u64>,
    iomem: Option<Iomem>,
}

/// The entries about multikernel in `/proc/iomem`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Iomem {
    /// Chunks of the pool: base and size in bytes.
    pub chunks: Vec<(u64, u64)>,
    /// The used parts: base, size in bytes, and the name given by the kernel.
    pub used: Vec<(u64, u64, String)>,
}

/// Default size of a memory block, in bytes, if the kernel does not report it.
pub const DEFAULT_MEMORY_BLOCK: u64 = 128 << 20;

const POOL: &str = "Multikernel Memory Pool";

impl Machine {
    /// Creates a machine with these CPUs.
    #[must_use]
    pub fn new(cpus: impl IntoIterator<Item = Cpu>) -> Self {
        Self {
            cpus: cpus.into_iter().map(|cpu| (cpu.id, cpu)).collect(),
            ..Self::default()
        }
    }

    /// Returns this machine with these contents of `/proc/iomem`.
    #[must_use]
    pub fn with_iomem(mut self, iomem: Iomem) -> Self {
        self.iomem = Some(iomem);
        self
    }

    /// Reads the machine below a root directory: `/` for the running one.
    ///
    /// CPUs that have left the host are in neither `/proc/cpuinfo` nor `/sys`, so a pool's CPUs are
    /// missing here.
    ///
    /// # Errors
    ///
    /// If `/proc/cpuinfo` cannot be read. Other missing information is omitted.
    pub fn read(root: &Path) -> io::Result<Self> {
        let cpuinfo = std::fs::read_to_string(root.join("proc/cpuinfo"))?;
        let nodes = nodes(&root.join("sys/devices/system/node"));
        let cpus = parse_cpuinfo(&cpuinfo).into_iter().map(|mut cpu| {
            let node = cpu.logical.and_then(|logical| nodes.get(&logical));
            cpu.node = node.copied().unwrap_or(0);
            cpu
        });
        let block = root.join("sys/devices/system/memory/block_size_bytes");
        let block = std::fs::read_to_string(block).ok();
        let iomem = std::fs::read_to_string(root.join("proc/iomem")).ok();
        Ok(Self {
            cpus: cpus.map(|cpu| (cpu.id, cpu)).collect(),
            memory_block: block.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()),
            iomem: iomem.map(|text| Iomem::parse(&text)),
        })
    }

    /// Returns the CPU with this physical id.
    #[must_use]
    pub fn cpu(&self, id: u64) -> Option<&Cpu> {
        self.cpus.get(&id)
    }

    /// Returns all CPUs, by physical id.
    pub fn cpus(&self) -> impl Iterator<Item = &Cpu> {
        self.cpus.values()
    }

    /// Returns the chunks of the pool in `/proc/iomem`, base and size in bytes; `None` if there are
    /// none, or the file was unreadable. Without root's rights all addresses there are zero.
    #[must_use]
    pub fn pool_chunks(&self) -> Option<&[(u64, u64)]> {
        let chunks = self.iomem.as_ref()?.chunks.as_slice();
        (!chunks.is_empty()).then_some(chunks)
    }

    /// Returns the contents of `/proc/iomem`, if it was readable.
    #[must_use]
    pub fn iomem(&self) -> Option<&Iomem> {
        self.iomem.as_ref()
    }

    /// Returns the unit, in bytes, in which memory moves to and from a running kernel.
    #[must_use]
    pub fn memory_block(&self) -> u64 {
        self.memory_block.unwrap_or(DEFAULT_MEMORY_BLOCK)
    }
}

impl Iomem {
    /// Parses `/proc/iomem`. Lines in another format are skipped.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut iomem = Iomem::default();
        for line in text.lines() {
            let Some((range, name)) = line.split_once(" : ") else {
                continue;
            };
            let Some((start, end)) = range.trim().split_once('-') else {
                continue;
            };
            let hex = |text| u64::from_str_radix(text, 16).ok();
            let (Some(start), Some(end)) = (hex(start), hex(end)) else {
                continue;
            };
            let Some(bytes) = end.checked_sub(start).and_then(|size| size.checked_add(1)) else {
                continue;
            };
            if name.contains(POOL) {
                iomem.chunks.push((start, bytes));
                continue;
            }
            let inside = |(base, size): &(u64, u64)| *base <= start && end <= base + (size - 1);
            if iomem.chunks.iter().any(inside) {
                iomem.used.push((start, bytes, name.trim().to_owned()));
            }
        }
        iomem
    }

    /// Returns the memory of an instance, oldest first: base and size in bytes.
    #[must_use]
    pub fn instance(&self, id: u32, name: &str) -> Vec<(u64, u64)> {
        let prefix = format!("mk-instance-{id}-{name}-region-");
        let number = |name: &str| name.strip_prefix(&prefix)?.parse::<u64>().ok();
        let mut regions: Vec<(u64, u64, u64)> = self
            .used
            .iter()
            .filter_map(|(base, bytes, name)| Some((number(name)?, *base, *bytes)))
            .collect();
        regions.sort_unstable();
        regions
            .into_iter()
            .map(|(_, base, bytes)| (base, bytes))
            .collect()
    }
}

fn parse_cpuinfo(text: &str) -> Vec<Cpu> {
    text.split("\n\n")
        .filter_map(|block| {
            let field = |wanted: &str| {
                let mut lines = block.lines().filter_map(|line| line.split_once(':'));
                let (_, value) = lines.find(|(name, _)| name.trim() == wanted)?;
                value.trim().parse::<u32>().ok()
            };
            let logical = field("processor")?;
            Some(Cpu {
                // Other processors have no APIC id; the kernel's own number serves as well.
                id: u64::from(field("apicid").unwrap_or(logical)),
                logical: Some(logical),
                node: 0,
                package: field("physical id").unwrap_or(0),
                core: field("core id").unwrap_or(logical),
            })
        })
        .collect()
}

/// Returns the NUMA node of each logical CPU.
fn nodes(directory: &Path) -> BTreeMap<u32, u32> {
    let mut nodes = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir(directory) else {
        return nodes;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("node")?.parse().ok());
        let list = std::fs::read_to_string(entry.path().join("cpulist"));
        if let (Some(node), Ok(list)) = (number, list) {
            nodes.extend(cpu_list(&list).into_iter().map(|cpu| (cpu, node)));
        }
    }
    nodes
}

/// Maximum number of CPUs in a list of logical CPUs.
const MAX_LISTED_CPUS: usize = 1 << 16;

fn cpu_list(text: &str) -> Vec<u32> {
    let ranges = text.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<u32>().ok()?..=last.trim().parse::<u32>().ok()?)
    });
    ranges.flatten().take(MAX_LISTED_CPUS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_read_from_its_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let cpu = |n: u32, apic: u32, core: u32| {
            format!("processor\t: {n}\nphysical id\t: 0\ncore id\t: {core}\napicid\t\t: {apic}\n\n")
        };
        write(
            "proc/cpuinfo",
            &[cpu(0, 0, 0), cpu(1, 2, 1), cpu(2, 1, 0)].concat(),
        );
        write("sys/devices/system/node/node0/cpulist", "0,2\n");
        write("sys/devices/system/node/node1/cpulist", "1-1\n");
        write("sys/devices/system/memory/block_size_bytes", "8000000\n");
        let machine = Machine::read(root.path()).unwrap();
        let places: Vec<_> = machine
            .cpus()
            .map(|c| (c.id, c.logical, c.node, c.core))
            .collect();
        assert_eq!(
            places,
            [(0, Some(0), 0, 0), (1, Some(2), 0, 0), (2, Some(1), 1, 1)]
        );
        assert_eq!(machine.memory_block(), 128 << 20);
        assert!(machine.pool_chunks().is_none());
    }

    #[test]
    fn iomem_gives_chunks_and_regions_in_the_order_they_came() {
        let iomem = Iomem::parse(
            "00001000-0009ffff : System RAM\n\
             840000000-8bfffffff : Multikernel Memory Pool\n\
             \x20 848000000-84fffffff : mk-instance-3-web-region-1\n\
             \x20 840000000-847ffffff : mk-instance-3-web-region-0\n\
             \x20 850000000-850000fff : mk-instance-31-web-region-0\n\
             nonsense\n",
        );
        assert_eq!(iomem.chunks, [(0x8_4000_0000, 0x8000_0000)]);
        let regions = iomem.instance(3, "web");
        assert_eq!(
            regions,
            [(0x8_4000_0000, 0x800_0000), (0x8_4800_0000, 0x800_0000)]
        );
    }
}
