use super::{At, By, Instance, Reader, Resources};
use crate::check::{Finding, Rule, Stance};
use crate::tree::DeviceTree;
use serde::{Deserialize, Serialize};

/// The kind of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The resources that the host gives to a pool, written once: sizes without addresses.
    Baseline,
    /// A pool as the kernel shows it: chunks of memory, free CPUs.
    Pool,
    /// One instance, as shown by the kernel.
    Instance,
    /// A change of a pool or of instances.
    Overlay,
}

impl Kind {
    /// Returns the kind of a tree, determined in the same way as in the kernel and kerf.
    #[must_use]
    pub fn of(tree: &DeviceTree) -> Kind {
        let root = tree.root();
        let compatible = root.property("compatible").and_then(|p| p.text().ok());
        let has_fragments = root.children_with_prefix("fragment@").next().is_some();
        if compatible == Some("linux,multikernel-overlay") || has_fragments {
            return Kind::Overlay;
        }
        if root.property("model").is_some() {
            return Kind::Instance;
        }
        let Some(resources) = root.child("resources") else {
            return Kind::Baseline;
        };
        let mut memory = resources.children_with_prefix("memory@");
        let is_live = resources.property("cpus-available").is_some()
            || memory.any(|node| node.property("reg").is_some());
        if is_live { Kind::Pool } else { Kind::Baseline }
    }
}

/// A pool and its instances; kerf calls this the global tree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct System {
    /// The pool.
    pub resources: Resources,
    /// The instances, in the order of the tree.
    pub instances: Vec<Instance>,
    /// Names for virtual functions and namespaces, from kerf 0.1.
    pub references: Vec<DeviceReference>,
}

/// A name for a virtual function or namespace of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct DeviceReference {
    /// The node's name.
    pub name: String,
    /// Its device.
    pub parent: Option<String>,
    /// The virtual function.
    pub function: Option<u32>,
    /// The namespace.
    pub namespace: Option<u32>,
}

impl System {
    /// Reads a baseline, a pool, or either with instances.
    pub(crate) fn read(tree: &DeviceTree, read: &mut Reader<'_>) -> System {
        let root = At::root(tree.root());
        // kerf ignores an empty property.
        if root
            .node
            .property("compatible")
            .is_some_and(|p| !p.bytes().is_empty())
        {
            read.text(&root, "compatible", By::Kerf);
        }
        System {
            resources: Resources::read(&root, read),
            instances: read_instances(&root, read),
            references: DeviceReference::read_all(&root, read),
        }
    }

    /// Returns the instance with this name.
    #[must_use]
    pub fn instance(&self, name: &str) -> Option<&Instance> {
        self.instances.iter().find(|instance| instance.name == name)
    }

    /// Returns the CPUs of the pool that no instance has, in the pool's order.
    #[must_use]
    pub fn free_cpus(&self) -> Vec<u64> {
        let held: std::collections::HashSet<u64> = self
            .instances
            .iter()
            .flat_map(|i| i.cpus.iter().copied())
            .collect();
        let pool = self
            .resources
            .free_cpus
            .as_ref()
            .unwrap_or(&self.resources.cpus);
        pool.iter()
            .copied()
            .filter(|cpu| !held.contains(cpu))
            .collect()
    }
}

fn read_instances(root: &At<'_>, read: &mut Reader<'_>) -> Vec<Instance> {
    let Some(instances) = root.child("instances") else {
        return Vec::new();
    };
    let nodes = instances.node.children().iter();
    nodes
        .map(|node| Instance::read(&instances.enter(node), node.name(), read))
        .collect()
}

impl Instance {
    /// Reads the tree that the kernel serves for one instance, as `kerf dump` writes it.
    pub(crate) fn read_own(tree: &DeviceTree, read: &mut Reader<'_>) -> Option<Instance> {
        let root = At::root(tree.root());
        let Some(name) = read.text(&root, "model", By::Kerf) else {
            if tree.root().property("model").is_none() {
                let problem = "the root has no model, which names the instance";
                let advice = "give the tree of one instance, from instances/NAME/device_tree";
                let finding = Finding::new(Rule::UnknownKind, root.path(), problem, advice);
                read.push(finding.of("model").judged(Stance::Takes, Stance::Refuses));
            }
            return None;
        };
        let mut instance = Instance::read(&root, name, read);
        let devices = super::Device::read_buses(&root, read);
        let mut names: Vec<String> = devices.into_iter().map(|device| device.name).collect();
        names.sort();
        instance.devices.extend(names);
        Some(instance)
    }
}

impl DeviceReference {
    fn read_all(root: &At<'_>, read: &mut Reader<'_>) -> Vec<DeviceReference> {
        let is_reference = |name: &str| name.contains("_vf") || name.contains("_ns");
        let nodes = root.node.children().iter();
        nodes
            .filter(|node| is_reference(node.name()))
            .map(|node| {
                let at = root.enter(node);
                let (function, namespace) =
                    (node.name().contains("_vf"), node.name().contains("_ns"));
                DeviceReference {
                    name: node.name().to_owned(),
                    parent: read.text(&at, "parent", By::Kerf).map(str::to_owned),
                    function: read.u32(&at, "vf-id", By::Kerf).filter(|_| function),
                    namespace: read
                        .u32(&at, "namespace-id", By::Kerf)
                        .filter(|_| namespace),
                }
            })
            .collect()
    }
}
