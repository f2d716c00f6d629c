//! Builds trees from the model.

use super::{DeviceKind, Instance, Resources, System, Virtio};
use crate::check;
use crate::tree::{DeviceTree, Node, Property};

impl Resources {
    /// Returns the baseline that requests these resources: CPUs, and memory by size. Existing
    /// memory of the pool counts as requested. Devices get their known properties; the kernel also
    /// requires the vendor and device ids of a PCI device, which the caller must add.
    #[must_use]
    pub fn to_baseline(&self) -> DeviceTree {
        let mut resources = Node::new("resources").with_u64_list("cpus", &self.cpus);
        if let Some(ways) = self.llc_ways {
            resources = resources.with_u32("llc-way-mask", ways);
        }
        let chunks = self.chunks.iter().map(|chunk| (chunk.size, chunk.node));
        let requests = self
            .requests
            .iter()
            .map(|request| (request.size, request.node));
        for (number, (size, node)) in chunks.chain(requests).enumerate() {
            let memory = Node::new(format!("memory@{number}")).with_u64("size", size);
            resources.push(match node {
                Some(node) => memory.with_u32("numa-node-id", node),
                None => memory,
            });
        }
        if !self.devices.is_empty() {
            let devices = self.devices.iter().map(|device| {
                let node = Node::new(device.name.clone());
                let node = match &device.kind {
                    DeviceKind::Pci(address) => {
                        let node = node.with_text("device-type", "pci");
                        node.with_text("pci-id", &address.to_string())
                    }
                    DeviceKind::Platform(name) => node
                        .with_text("device-type", "platform")
                        .with_text("device-name", name),
                    DeviceKind::Other => node,
                };
                let node = match &device.functions {
                    Some(functions) => node.with_u32_list("available-vfs", functions),
                    None => node,
                };
                match &device.namespaces {
                    Some(namespaces) => node.with_u32_list("available-ns", namespaces),
                    None => node,
                }
            });
            resources.push(Node::new("devices").with_children(devices));
        }
        let mut root = Node::new("").with_text("compatible", "linux,multikernel-host");
        root.push(resources);
        let mut aliases = Node::new("aliases");
        for device in &self.devices {
            if let Some(alias) = &device.alias {
                aliases = aliases.with_text(alias, &format!("/resources/devices/{}", device.name));
            }
        }
        if !aliases.properties().is_empty() {
            root.push(aliases);
        }
        DeviceTree::new(root)
    }
}

impl System {
    /// Returns the baseline with the instances in it: kerf's global tree, for files and for
    /// [`check::system`]. The kernel accepts instances only in overlays.
    #[must_use]
    pub fn to_tree(&self) -> DeviceTree {
        let mut tree = self.resources.to_baseline();
        if !self.instances.is_empty() {
            let nodes = self.instances.iter().map(|instance| {
                let mut node = Node::new(instance.name.clone());
                instance.write_to_node(&mut node);
                node
            });
            tree.root_mut()
                .push(Node::new("instances").with_children(nodes));
        }
        tree
    }
}

impl Instance {
    /// Returns the instance's own tree, as [`check::instance`] reads it.
    #[must_use]
    pub fn to_tree(&self) -> DeviceTree {
        let root = Node::new("").with_text("compatible", "multikernel-v1");
        let mut tree = DeviceTree::new(root);
        self.write_to(&mut tree);
        tree
    }

    /// Makes the tree of one instance match this. Other contents of the tree are kept, and a tree that already
    /// matches is not changed.
    pub fn write_to(&self, tree: &mut DeviceTree) {
        let (before, _) = check::instance(tree);
        if before.as_ref() == Some(self) {
            return;
        }
        let root = tree.root_mut();
        root.set(text("model", &self.name));
        if before.is_some_and(|before| before.devices != self.devices) {
            // The kernel shows devices by their buses.
            let bridges = |node: &Node| {
                let compatible = node.property("compatible").and_then(|p| p.text().ok());
                compatible == Some("multikernel,pci-host-bridge")
            };
            root.children_mut().retain(|child| !bridges(child));
        }
        // Devices on a bus are not listed again.
        let on_buses = check::instance(tree).0.unwrap_or_default().devices;
        self.write_to_node(tree.root_mut());
        if !on_buses.is_empty() && on_buses == self.devices {
            set(resources_of(tree.root_mut()), "device-names", None);
        }
    }

    /// Writes id and resources, in the form of an instance's tree and of `/instances`.
    fn write_to_node(&self, node: &mut Node) {
        let u64_of = |value: u64| value.to_be_bytes().to_vec();
        let u32_of = |value: u32| value.to_be_bytes().to_vec();
        set(node, "id", self.id.map(u32_of));
        let resources = resources_of(node);
        let cpus = self.cpus.iter().flat_map(|cpu| cpu.to_be_bytes()).collect();
        set(
            resources,
            "cpus",
            Some(cpus).filter(|c: &Vec<u8>| !c.is_empty()),
        );
        set(resources, "memory-base", self.memory_base.map(u64_of));
        let bytes = Some(self.memory_bytes).filter(|bytes| *bytes > 0);
        set(resources, "memory-bytes", bytes.map(u64_of));
        let nodes = self.numa_nodes.iter().flat_map(|n| n.to_be_bytes());
        let nodes = Some(nodes.collect()).filter(|n: &Vec<u8>| !n.is_empty());
        set(resources, "numa-nodes", nodes);
        let policies = [
            ("cpu-affinity", &self.cpu_affinity),
            ("memory-policy", &self.memory_policy),
        ];
        for (name, policy) in policies {
            set(
                resources,
                name,
                policy.as_ref().map(|p| text(name, p).bytes().to_vec()),
            );
        }
        set(resources, "llc-way-mask", self.llc_ways.map(u32_of));
        // Use one string: kerf does not read a list of several, and splits this one at the spaces.
        remove_children(resources, "devices");
        let devices = Some(self.devices.join(" ")).filter(|names| !names.is_empty());
        let devices = devices.map(|names| text("device-names", &names).bytes().to_vec());
        set(resources, "device-names", devices);
        Virtio::write(&self.virtio, resources);
        if self.uring.is_none() {
            remove_children(resources, "uring");
        }
        if let Some(uring) = &self.uring {
            let child = resources.child_or_new("uring");
            set(child, "sq-entries", uring.sq_entries.map(u32_of));
            set(child, "cq-entries", uring.cq_entries.map(u32_of));
            set(child, "shim-data-pages", uring.shim_pages.map(u32_of));
        }
        let kcore = self.host_kcore.then(Vec::new);
        if kcore.is_some() || node.child("options").is_some() {
            set(node.child_or_new("options"), "enable-host-kcore", kcore);
        }
    }
}

fn text(name: &str, value: &str) -> Property {
    Property::new(name, [value.as_bytes(), &[0]].concat())
}

/// Sets a property, or removes it.
fn set(node: &mut Node, name: &str, value: Option<Vec<u8>>) {
    match value {
        Some(value) => node.set(Property::new(name, value)),
        None => while node.remove_property(name).is_some() {},
    }
}

/// Removes all children that readers could find by this name: a tree may contain it more than once.
fn remove_children(node: &mut Node, name: &str) {
    while node.remove_child(name).is_some() {}
}

fn resources_of(node: &mut Node) -> &mut Node {
    node.child_or_new("resources")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Uring, Virtio};
    use crate::{dtb, dts};

    fn full() -> Instance {
        Instance {
            name: "web".to_owned(),
            id: Some(3),
            cpus: vec![8, 10],
            memory_base: Some(0x8_4000_0000),
            memory_bytes: 1 << 28,
            devices: vec!["nic0".to_owned(), "disk0_ns2".to_owned()],
            numa_nodes: vec![1],
            cpu_affinity: Some("compact".to_owned()),
            memory_policy: Some("bind".to_owned()),
            llc_ways: Some(3),
            uring: Some(Uring {
                sq_entries: Some(64),
                ..Uring::default()
            }),
            virtio: vec![Virtio {
                name: "net@0".to_owned(),
                device_id: 1,
                queues: 2,
                queue_size: Some(256),
            }],
            host_kcore: true,
            ..Instance::default()
        }
    }

    #[test]
    fn an_instance_is_read_as_it_was_written() {
        for instance in [
            full(),
            Instance {
                name: "bare".to_owned(),
                ..Instance::default()
            },
        ] {
            let tree = instance.to_tree();
            let source = dts::read(&dts::write(&tree).unwrap()).unwrap();
            let blob = dtb::read(&dtb::write(&tree).unwrap()).unwrap();
            for tree in [&tree, &source, &blob] {
                assert_eq!(check::instance(tree).0.as_ref(), Some(&instance));
            }
        }
    }

    #[test]
    fn what_is_not_known_stays_and_what_is_the_same_is_not_touched() {
        let mut tree = full().to_tree();
        tree.root_mut().set(Property::new("vendor,note", [1, 2]));
        let text = format!("// by hand\n{}", dts::write(&tree).unwrap());
        let mut read = dts::read(&text).unwrap();
        full().write_to(&mut read);
        assert_eq!(dts::write(&read).unwrap(), text);
        let fewer = Instance {
            cpus: vec![8],
            devices: Vec::new(),
            uring: None,
            ..full()
        };
        fewer.write_to(&mut read);
        assert_eq!(check::instance(&read).0, Some(fewer));
        assert!(read.root().property("vendor,note").is_some());
    }

    #[test]
    fn what_readers_would_find_by_the_name_is_changed_also_when_it_is_there_twice() {
        let text = "/dts-v1/; / { compatible = \"multikernel-v1\"; model = \"web\"; id = <3>;
            resources@ { cpus = <0 8>; uring { sq-entries = <8>; }; uring@1 { sq-entries = <9>; };
                devices { nic { }; }; devices@1 { disk { }; }; }; };";
        let mut tree = dts::read(text).unwrap();
        let mut instance = check::instance(&tree).0.unwrap();
        assert_eq!(instance.cpus, [8]);
        instance.cpus.push(9);
        instance.uring = None;
        instance.devices.clear();
        instance.write_to(&mut tree);
        assert_eq!(check::instance(&tree).0, Some(instance));
    }

    #[test]
    fn devices_on_buses_stay_there_until_they_change() {
        let text = "/dts-v1/; / { compatible = \"multikernel-v1\"; model = \"web\"; id = <1>;
            resources { cpus = <0 8>; };
            pci@9 { compatible = \"multikernel,pci-host-bridge\"; linux,pci-domain = <0>;
                pci@0,0 { reg = <0x90000 0 0 0 0>; vendor-id = <1>; device-id = <2>; }; }; };";
        let mut tree = dts::read(text).unwrap();
        let mut instance = check::instance(&tree).0.unwrap();
        assert_eq!(instance.devices.len(), 1);
        instance.cpus.push(9);
        instance.write_to(&mut tree);
        assert_eq!(check::instance(&tree).0.as_ref(), Some(&instance));
        assert!(tree.root().child("pci").is_some());
        instance.devices = vec!["nic7".to_owned()];
        instance.write_to(&mut tree);
        assert_eq!(check::instance(&tree).0, Some(instance));
        assert!(tree.root().child("pci").is_none());
    }

    #[test]
    fn a_system_is_read_as_it_was_written() {
        let text = "/dts-v1/; / { resources { cpus = <0 8 0 10>; memory@0 { size = <0 0x40000000>; }; };
            instances { web { id = <1>; resources { cpus = <0 8>; memory-bytes = <0 0x1000000>; }; }; }; };";
        let (system, _) = check::system(&dts::read(text).unwrap(), check::Context::default());
        let (again, _) = check::system(&system.to_tree(), check::Context::default());
        assert_eq!(again, system);
    }
}
