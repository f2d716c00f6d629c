//! The trees that the kernel's files show.

use super::Mk;
use crate::fdt::Fdt;

impl Mk {
    /// Returns the tree in the root file.
    pub(crate) fn pool_tree(&self) -> Vec<u8> {
        let root = Fdt::new("")
            .text("compatible", "multikernel-v1")
            .prop("id", &[0; 4]);
        let Some(pool) = &self.pool else {
            let own = Fdt::new("resources").u64s("cpus", &self.host);
            return with_kids(root, vec![own]).blob();
        };
        let mut all = pool.free.clone();
        all.extend(self.instances.iter().flat_map(|i| &i.cpus));
        let resources = Fdt::new("resources")
            .u64s("cpus", &all)
            .u64s("cpus-available", &pool.free);
        let chunks = pool.chunks.iter().map(|(base, size, node)| {
            let memory = Fdt::new(&format!("memory@{base:x}")).text("device_type", "memory");
            memory
                .u64s("reg", &[*base, *size])
                .prop("numa-node-id", &node.to_be_bytes())
        });
        let resources = with_kids(resources, chunks.collect());
        let buses = pool.pci.iter().map(|id| bus(id));
        with_kids(root, [resources].into_iter().chain(buses).collect()).blob()
    }

    /// Returns the tree in an instance's file.
    pub(crate) fn instance_tree(&self, name: &str) -> Option<Vec<u8>> {
        let instance = self.instances.iter().find(|i| i.name == name)?;
        let root = Fdt::new("")
            .text("compatible", "multikernel-v1")
            .text("model", name);
        let root = root.prop("id", &instance.id.to_be_bytes());
        let mut resources = Fdt::new("resources");
        if let Some((base, _)) = instance.regions.first() {
            let bytes: u64 = instance.regions.iter().map(|(_, size)| size).sum();
            resources = resources
                .u64s("memory-base", &[*base])
                .u64s("memory-bytes", &[bytes]);
        }
        if !instance.cpus.is_empty() {
            resources = resources.u64s("cpus", &instance.cpus);
        }
        let buses = instance.pci.iter().map(|id| bus(id));
        Some(with_kids(root, [resources].into_iter().chain(buses).collect()).blob())
    }
}

fn with_kids(mut fdt: Fdt, kids: Vec<Fdt>) -> Fdt {
    fdt.kids = kids;
    fdt
}

/// Returns a host bridge with one device.
fn bus(id: &str) -> Fdt {
    let hex = |text: &str| u32::from_str_radix(text, 16).unwrap();
    let (domain, bus, rest) = (hex(&id[..4]), hex(&id[5..7]), &id[8..]);
    let (slot, function) = (hex(&rest[..2]), hex(&rest[3..]));
    let cell = bus << 16 | slot << 11 | function << 8;
    let reg: Vec<u8> = [cell, 0, 0, 0, 0]
        .iter()
        .flat_map(|c| c.to_be_bytes())
        .collect();
    let leaf = Fdt::new(&format!("pci@{slot:x},{function:x}")).prop("reg", &reg);
    let leaf = leaf
        .prop("vendor-id", &[0, 0, 0x80, 0x86])
        .prop("device-id", &[0, 0, 0x15, 0x72]);
    let bridge =
        Fdt::new(&format!("pci@{bus:x}")).text("compatible", "multikernel,pci-host-bridge");
    with_kids(
        bridge.prop("linux,pci-domain", &domain.to_be_bytes()),
        vec![leaf],
    )
}
