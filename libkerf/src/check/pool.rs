use std::collections::{HashMap, HashSet};

use crate::model::{Device, PciAddress, Resources, System};

/// An indexed pool, to check instances against.
pub(super) struct Pool<'a> {
    pub(super) resources: &'a Resources,
    pub(super) cpus: HashSet<u64>,
    pub(super) highest_cpu: Option<u64>,
    /// CPUs that no instance has.
    pub(super) free: Vec<u64>,
    /// The NUMA nodes of the memory, as far as the tree states them.
    pub(super) nodes: Vec<u32>,
    names: HashMap<&'a str, &'a Device>,
    aliases: HashMap<&'a str, &'a Device>,
    addresses: HashMap<PciAddress, &'a Device>,
}

impl<'a> Pool<'a> {
    pub(super) fn of(system: &'a System) -> Self {
        let resources = &system.resources;
        let devices = || resources.devices.iter();
        let mut nodes: Vec<u32> = resources.chunks.iter().filter_map(|c| c.node).collect();
        nodes.extend(resources.requests.iter().filter_map(|r| r.node));
        nodes.extend(resources.topology.iter().map(|n| n.id));
        nodes.sort_unstable();
        nodes.dedup();
        Self {
            resources,
            cpus: resources.cpus.iter().copied().collect(),
            highest_cpu: resources.cpus.iter().max().copied(),
            free: system.free_cpus(),
            nodes,
            names: devices().map(|d| (d.name.as_str(), d)).collect(),
            aliases: devices()
                .filter_map(|d| Some((d.alias.as_deref()?, d)))
                .collect(),
            addresses: devices().filter_map(|d| Some((d.pci()?, d))).collect(),
        }
    }

    /// Returns the device with this reference of an instance: its node's name, its alias or its address.
    pub(super) fn device(&self, reference: &str) -> Option<&'a Device> {
        let by_address = || self.addresses.get(&PciAddress::parse(reference)?);
        let by_name = self
            .names
            .get(reference)
            .or_else(|| self.aliases.get(reference));
        by_name.or_else(by_address).copied()
    }
}
