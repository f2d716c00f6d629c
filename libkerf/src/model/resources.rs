use super::{At, By, Device, MAX_NUMA_NODES, NO_NODE, PAGE_BYTES, PciAddress, Reader};
use crate::check::{Finding, Rule, Stance};
use serde::{Deserialize, Serialize};

/// The contents of a pool, actual or requested: the node `/resources`, and the nodes of devices next to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Resources {
    /// Physical ids of all CPUs of the pool, in the order of the tree.
    pub cpus: Vec<u64>,
    /// CPUs that no instance has; known only for a pool that was read from the kernel.
    pub free_cpus: Option<Vec<u64>>,
    /// The memory of the pool.
    pub chunks: Vec<Chunk>,
    /// The memory that the pool requests.
    pub requests: Vec<MemoryRequest>,
    /// Devices, in the order of the tree.
    pub devices: Vec<Device>,
    /// The NUMA nodes, if the tree describes them.
    pub topology: Vec<NumaNode>,
    /// Last-level cache ways for instances, one bit for each.
    pub llc_ways: Option<u32>,
    /// The unit, in bytes, in which memory moves to and from a running instance.
    pub granule: Option<u64>,
}

/// A contiguous range of the pool's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
pub struct Chunk {
    /// Physical address.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
    /// The NUMA node, if the tree states it.
    pub node: Option<u32>,
}

impl Chunk {
    /// Returns the first address after the chunk; it may exceed the highest address by one.
    #[must_use]
    pub fn end(self) -> u128 {
        u128::from(self.base) + u128::from(self.size)
    }
}

/// Memory that the pool requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct MemoryRequest {
    /// Size in bytes.
    pub size: u64,
    /// The requested NUMA node, or any.
    pub node: Option<u32>,
}

/// A NUMA node of `/resources/topology`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct NumaNode {
    /// Its number.
    pub id: u32,
    /// Physical address of its memory.
    pub base: u64,
    /// Size of its memory, in bytes.
    pub size: u64,
    /// Physical ids of its CPUs.
    pub cpus: Vec<u64>,
}

impl Resources {
    /// Returns the size of the memory, as kerf adds it up in a tree: the actual memory, otherwise the requested memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u128 {
        match self.chunks.as_slice() {
            [] => self.expected_bytes(),
            chunks => chunks.iter().map(|c| u128::from(c.size)).sum(),
        }
    }

    /// Returns the size of the actual and the requested memory together, in bytes.
    #[must_use]
    pub fn expected_bytes(&self) -> u128 {
        let chunks = self.chunks.iter().map(|c| c.size);
        let requests = self.requests.iter().map(|r| r.size);
        chunks.chain(requests).map(u128::from).sum()
    }

    /// Returns the device that an instance means by `reference`.
    #[must_use]
    pub fn device(&self, reference: &str) -> Option<&Device> {
        let named = |device: &&Device| device.name == reference;
        // The last device with the name counts, as in kerf.
        let by_name = self.devices.iter().rev().find(named);
        by_name.or_else(|| self.devices.iter().find(|d| d.is_called(reference)))
    }

    /// Reads `/resources`, and the buses and aliases next to it.
    pub(super) fn read(root: &At<'_>, read: &mut Reader<'_>) -> Resources {
        let Some(at) = root.child("resources") else {
            let advice = "add a node resources with cpus and memory@0 { size }";
            let finding = Finding::new(
                Rule::ResourcesMissing,
                root.path(),
                "no node /resources",
                advice,
            );
            read.push(finding);
            return Resources::default();
        };
        let mut resources = Resources {
            cpus: read.cpus(&at, "cpus").unwrap_or_default(),
            free_cpus: read.cpus(&at, "cpus-available"),
            llc_ways: read.u32(&at, "llc-way-mask", By::Kernel),
            granule: root
                .node
                .property("memory-granule")
                .and_then(|p| p.u64().ok()),
            ..Resources::default()
        };
        resources.read_memory(&at, read);
        resources.read_topology(&at, read);
        resources.devices = Device::read_all(&at, read);
        let buses = Device::read_buses(root, read);
        resources.devices.extend(buses);
        resources.read_aliases(root, read);
        resources
    }

    fn read_memory(&mut self, at: &At<'_>, read: &mut Reader<'_>) {
        for node in at.node.children_with_prefix("memory@") {
            let at = at.enter(node);
            let node_id = numa_node_id(&at, read);
            if let Some(reg) = node.property("reg") {
                match reg.range() {
                    Ok((base, size)) => self.chunks.push(Chunk {
                        base,
                        size,
                        node: node_id,
                    }),
                    Err(shape) => read.misshapen(&at, reg, shape, By::Both),
                }
            } else if let Some(size) = read.u64(&at, "size", By::Both) {
                check_size(&at, size, read);
                self.requests.push(MemoryRequest {
                    size,
                    node: node_id,
                });
            } else if node.property("size").is_none() {
                let advice = "add size, in bytes, as a 64-bit cell";
                let finding =
                    Finding::new(Rule::MemoryItem, at.path(), "no size and no reg", advice);
                read.push(finding.of("size"));
            }
        }
        self.refuse_legacy(at, read);
    }

    /// Refuses `memory-base` and `memory-bytes`, which described a pool before generation B.
    fn refuse_legacy(&self, at: &At<'_>, read: &mut Reader<'_>) {
        let any_memory = at.node.children_with_prefix("memory@").next().is_some();
        for name in ["memory-base", "memory-bytes"] {
            if at.node.property(name).is_none() {
                continue;
            }
            let kernel = if any_memory {
                Stance::Takes
            } else {
                Stance::Refuses
            };
            let problem = "this is how generation A (kerf 0.1.0) gives pool memory";
            let advice =
                "write memory@0 { size = /bits/ 64 <…>; } and let the kernel pick the address";
            let finding = Finding::new(Rule::OlderForm, at.path(), problem, advice);
            read.push(finding.of(name).judged(kernel, Stance::Refuses));
        }
    }

    fn read_topology(&mut self, at: &At<'_>, read: &mut Reader<'_>) {
        let Some(topology) = at.child("topology") else {
            return;
        };
        let Some(nodes) = topology.child("numa-nodes") else {
            return;
        };
        for node in nodes.node.children_with_prefix("node@") {
            let at = nodes.enter(node);
            let id = node
                .unit_address()
                .and_then(|unit| unit.parse::<u32>().ok());
            let Some(id) = id else {
                let problem = format!("{:?} is not node@ and a decimal number", node.name());
                let finding = Finding::new(
                    Rule::NumaName,
                    at.path(),
                    problem,
                    "name it node@0, node@1, …",
                );
                read.push(finding);
                continue;
            };
            read.u32_list(&at, "distance-matrix", By::Kerf);
            read.text(&at, "memory-type", By::Kerf);
            let cpus = read.u32_list(&at, "cpus", By::Kerf).unwrap_or_default();
            self.topology.push(NumaNode {
                id,
                base: read.u64(&at, "memory-base", By::Kerf).unwrap_or(0),
                size: read.u64(&at, "memory-size", By::Kerf).unwrap_or(0),
                cpus: cpus.into_iter().map(u64::from).collect(),
            });
        }
    }

    fn read_aliases(&mut self, root: &At<'_>, read: &mut Reader<'_>) {
        let Some(at) = root.child("aliases") else {
            return;
        };
        for property in at.node.properties() {
            let name = property.name();
            let target = match property.text() {
                Ok(target) => target,
                Err(shape) => {
                    read.misshapen(&at, property, shape, By::Kerf);
                    continue;
                }
            };
            match alias_target(root, target).and_then(|name| self.device_index(&name)) {
                Some(index) => self.devices[index].alias = Some(name.to_owned()),
                None => {
                    let problem = format!("{target:?} is not a device");
                    let advice = "point it to a node under /resources/devices, or remove it";
                    let finding = Finding::new(Rule::AliasDangling, at.path(), problem, advice);
                    read.push(finding.of(name));
                }
            }
            if name.len() > MAX_ALIAS_BYTES {
                let problem = format!(
                    "{} characters; the kernel cuts it to {MAX_ALIAS_BYTES}",
                    name.len()
                );
                let finding =
                    Finding::new(Rule::AliasLong, at.path(), problem, "choose a shorter one");
                read.push(finding.of(name));
            }
        }
    }

    fn device_index(&self, name: &str) -> Option<usize> {
        self.devices.iter().rposition(|device| device.name == name)
    }
}

/// Maximum length of an alias in the kernel.
const MAX_ALIAS_BYTES: usize = 31;

/// Returns the reference name of the device at a path.
fn alias_target(root: &At<'_>, path: &str) -> Option<String> {
    let mut node = root.node;
    let mut bridge = None;
    for part in path.strip_prefix('/')?.split('/').filter(|p| !p.is_empty()) {
        node = node.child(part)?;
        bridge = bridge.or(Some(node));
    }
    let on_bus = bridge?.property("compatible").and_then(|p| p.text().ok())
        == Some("multikernel,pci-host-bridge");
    if !on_bus {
        let in_devices = path.trim_start_matches('/').starts_with("resources");
        return in_devices.then(|| node.name().to_owned());
    }
    let domain = bridge?
        .property("linux,pci-domain")
        .and_then(|p| p.u32().ok());
    let domain = u16::try_from(domain.unwrap_or(0)).unwrap_or(u16::MAX);
    let cell = *node.property("reg")?.u32_list().ok()?.first()?;
    Some(PciAddress::from_cell(domain, cell).node_name())
}

/// Returns a node's `numa-node-id`, if present and valid.
pub(crate) fn numa_node_id(at: &At<'_>, read: &mut Reader<'_>) -> Option<u32> {
    let id = read.u32(at, "numa-node-id", By::Both)?;
    check_numa(at, "numa-node-id", id, read);
    (id != NO_NODE).then_some(id)
}

pub(crate) fn check_numa(at: &At<'_>, property: &str, id: u32, read: &mut Reader<'_>) {
    if id >= MAX_NUMA_NODES && id != NO_NODE {
        let problem = format!("{id} is not below {MAX_NUMA_NODES}");
        let finding = Finding::new(
            Rule::NumaRange,
            at.path(),
            problem,
            "name a NUMA node of the machine",
        );
        read.push(finding.of(property));
    }
}

pub(crate) fn check_size(at: &At<'_>, size: u64, read: &mut Reader<'_>) {
    if size == 0 || !size.is_multiple_of(PAGE_BYTES) {
        let problem = format!("{size} bytes are not a positive multiple of {PAGE_BYTES}");
        let above = size
            .checked_next_multiple_of(PAGE_BYTES)
            .map_or(PAGE_BYTES, |s| s.max(PAGE_BYTES));
        let finding = Finding::new(
            Rule::MemorySize,
            at.path(),
            problem,
            format!("{above:#x} would do"),
        );
        read.push(finding.of("size"));
    }
}
