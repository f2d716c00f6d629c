use super::{Create, DeviceMove, Fragment, MemoryMove, Operation, Overlay, Target};
use crate::dtb::{self, DtbError};
use crate::model::Virtio;
use crate::tree::{DeviceTree, Node, Property};

impl Overlay {
    /// Returns the overlay's tree.
    #[must_use]
    pub fn to_tree(&self) -> DeviceTree {
        let mut root = Node::new("").with_text("compatible", "linux,multikernel-overlay");
        if let Some(note) = &self.note {
            root = root.with_text("mk,resources", note);
        }
        let fragments = self.fragments.iter().zip(0_u32..);
        let nodes = fragments.map(|(fragment, unit)| fragment.to_node(unit));
        DeviceTree::new(root.with_children(nodes))
    }

    /// Returns the overlay's blob.
    ///
    /// # Errors
    ///
    /// If a name cannot be written. [`crate::check::overlay`] checks the size.
    pub fn to_blob(&self) -> Result<Vec<u8>, DtbError> {
        dtb::write(&self.to_tree())
    }
}

impl Fragment {
    fn to_node(&self, unit: u32) -> Node {
        let order = Operation::order(&self.target);
        let operations = order.iter().flat_map(|name| {
            let named = self.operations.iter().filter(move |o| o.name() == *name);
            named.map(|operation| operation.to_node(&self.target))
        });
        Node::new(format!("fragment@{unit:x}"))
            .with_text("target-path", &self.target.path())
            .with_child(Node::new("__overlay__").with_children(operations))
    }
}

impl Operation {
    fn to_node(&self, target: &Target) -> Node {
        let node = Node::new(self.name());
        match self {
            Operation::Create(create) => create.to_node(),
            Operation::Remove(name) => node.with_text("instance-name", name),
            Operation::MemoryAdd(items) => {
                let of_pool = *target == Target::Pool;
                node.with_children(
                    items
                        .iter()
                        .zip(0..)
                        .map(|(item, n)| item.to_node(n, of_pool)),
                )
            }
            Operation::MemoryRemove(items) => node.with_children(
                items
                    .iter()
                    .zip(0..)
                    .map(|(item, n)| item.to_node(n, false)),
            ),
            Operation::CpuAdd(items) | Operation::CpuRemove(items) => {
                node.with_children(items.iter().map(|item| {
                    let cpu = Node::new(format!("cpu@{}", item.id)).with_u64("reg", item.id);
                    with_flags(with_numa(cpu, item.node), item.flags)
                }))
            }
            Operation::DeviceAdd(items) | Operation::DeviceRemove(items) => {
                node.with_children(items.iter().zip(0..).map(|(item, n)| item.to_node(n)))
            }
        }
    }
}

fn with_numa(node: Node, id: Option<u32>) -> Node {
    match id {
        Some(id) => node.with_u32("numa-node-id", id),
        None => node,
    }
}

fn with_flags(node: Node, flags: u32) -> Node {
    match flags {
        0 => node,
        flags => node.with_u32("flags", flags),
    }
}

impl MemoryMove {
    fn to_node(self, number: usize, by_size: bool) -> Node {
        let node = Node::new(format!("memory@{number}"));
        let node = match self.base {
            Some(base) if !by_size => node.with_u64_list("reg", &[base, self.size]),
            _ => node.with_u64("size", self.size),
        };
        let node = with_numa(node, self.node);
        match self.kind {
            0 => node,
            kind => node.with_u32("mem-type", kind),
        }
    }
}

impl DeviceMove {
    fn to_node(&self, number: usize) -> Node {
        let mut node =
            Node::new(format!("pci@{number}")).with_text("pci-id", &self.address.to_string());
        if let Some(driver) = &self.driver {
            node = node.with_text("driver", driver);
        }
        if let Some(alias) = &self.alias {
            node = node.with_text("alias", alias);
        }
        with_flags(node, self.flags)
    }
}

impl Create {
    fn to_node(&self) -> Node {
        let instance = &self.instance;
        let mut node = self.rest.clone().unwrap_or_default();
        let mut node = {
            node.set_name("instance-create");
            node.with_text("instance-name", &instance.name)
        };
        if let Some(id) = instance.id {
            node = node.with_u32("id", id);
        }
        self.write_resources(node.child_or_new("resources"));
        if instance.host_kcore {
            let options = node.child_or_new("options");
            options.set(Property::new("enable-host-kcore", []));
        }
        if let Some(tree) = &self.host_tree {
            node.push(Node::new("chosen").with_child(tree.clone()));
        }
        node
    }

    fn write_resources(&self, resources: &mut Node) {
        let instance = &self.instance;
        let mut node = std::mem::take(resources);
        if !instance.cpus.is_empty() {
            node = node.with_u64_list("cpus", &instance.cpus);
        }
        if instance.memory_bytes > 0 {
            node = node.with_u64("memory-bytes", instance.memory_bytes);
        }
        if !instance.numa_nodes.is_empty() {
            node = node.with_u32_list("numa-nodes", &instance.numa_nodes);
        }
        let policies = [
            ("cpu-affinity", &instance.cpu_affinity),
            ("memory-policy", &instance.memory_policy),
        ];
        for (name, policy) in policies {
            if let Some(policy) = policy {
                node = node.with_text(name, policy);
            }
        }
        if let Some(ways) = instance.llc_ways {
            node = node.with_u32("llc-way-mask", ways);
        }
        if !instance.virtio.is_empty() {
            Virtio::write(&instance.virtio, &mut node);
        }
        if let Some(uring) = &instance.uring {
            let sizes = [
                ("sq-entries", uring.sq_entries),
                ("cq-entries", uring.cq_entries),
                ("shim-data-pages", uring.shim_pages),
            ];
            let child = node.child_or_new("uring");
            for (name, size) in sizes {
                if let Some(size) = size {
                    child.set(Property::new(name, size.to_be_bytes()));
                }
            }
        }
        *resources = node;
    }
}
