//! Unknown contents of an overlay: kept in nodes that may have further contents, refused by name elsewhere, so
//! that writing an overlay never silently loses contents that were read.

use std::collections::HashSet;

use super::read::HOST_TREE;
use crate::check::{Finding, Rule};
use crate::model::{At, Instance, Reader};
use crate::tree::Node;

/// Reports unknown or repeated properties of a node, and children that do not satisfy `is_known`.
pub(super) fn only(
    at: &At<'_>,
    known: &[&str],
    is_known: impl Fn(&Node) -> bool,
    read: &mut Reader<'_>,
) {
    let mut found = Vec::new();
    for property in at.node.properties() {
        let name = property.name();
        if known.contains(&name) && !found.contains(&name) {
            found.push(name);
            continue;
        }
        refuse(at, Some(name), read);
    }
    for child in at.node.children().iter().filter(|child| !is_known(child)) {
        refuse(&at.enter(child), None, read);
    }
}

fn refuse(at: &At<'_>, property: Option<&str>, read: &mut Reader<'_>) {
    let problem = "unknown here: it would be lost when the overlay is written";
    let finding = Finding::new(Rule::OverlayContent, at.path(), problem, "take it out");
    read.push(match property {
        Some(name) => finding.of(name),
        None => finding,
    });
}

/// Reports properties of the root that differ from those of a written overlay.
pub(super) fn check_root(root: &At<'_>, read: &mut Reader<'_>) {
    if let Some(compatible) = root.node.property("compatible")
        && compatible.text() != Ok("linux,multikernel-overlay")
    {
        refuse(root, Some("compatible"), read);
    }
    if let Some(note) = root.node.property("mk,resources")
        && note.text().is_err()
    {
        refuse(root, Some("mk,resources"), read);
    }
}

/// Reports unknown contents of an operation's item.
pub(super) fn check_item(at: &At<'_>, read: &mut Reader<'_>) {
    let name = at.node.name();
    let known: &[&str] = if name.starts_with("memory@") {
        // Generation A's name of the NUMA node has its own report.
        &["reg", "size", "numa-node-id", "numa-node", "mem-type"]
    } else if name.starts_with("cpu@") {
        &["reg", "numa-node-id", "flags"]
    } else {
        &["pci-id", "driver", "flags", "alias"]
    };
    only(at, known, |_| false, read);
    // The kernel accepts these in any format.
    for name in ["mem-type", "flags"] {
        if at.node.property(name).is_some_and(|p| p.u32().is_err()) {
            refuse(at, Some(name), read);
        }
    }
    for name in ["driver", "alias"] {
        if at.node.property(name).is_some_and(|p| p.text().is_err()) {
            refuse(at, Some(name), read);
        }
    }
    if at.node.property("reg").is_some() && at.node.property("size").is_some() {
        refuse(at, Some("size"), read);
    }
}

/// Returns for each property and child whether it is the first one with its name: readers do not find a second
/// one, and writing the node would change its meaning.
fn firsts(node: &Node) -> (Vec<bool>, Vec<bool>) {
    let mut names = HashSet::new();
    let properties = node.properties().iter();
    let properties = properties.map(|there| names.insert(there.name())).collect();
    let (mut whole, mut plain, mut bases) = (HashSet::new(), HashSet::new(), HashSet::new());
    let children = node.children().iter().map(|child| {
        // A name without a unit address also finds nodes with one (libfdt).
        let name = child.name();
        let base = name.split_once('@').map_or(name, |(base, _)| base);
        let is_plain = base == name;
        let is_found = whole.contains(name) || plain.contains(base);
        let is_first = !(is_found || is_plain && bases.contains(base));
        whole.insert(name);
        bases.insert(base);
        if is_plain {
            plain.insert(name);
        }
        is_first
    });
    (properties, children.collect())
}

/// Reports duplicate contents of a node and its descendants.
pub(super) fn check_twins(at: &At<'_>, read: &mut Reader<'_>) {
    let (properties, children) = firsts(at.node);
    for (property, is_first) in at.node.properties().iter().zip(properties) {
        if !is_first {
            refuse(at, Some(property.name()), read);
        }
    }
    for (child, is_first) in at.node.children().iter().zip(children) {
        let child = at.enter(child);
        match is_first {
            true => check_twins(&child, read),
            false => refuse(&child, None, read),
        }
    }
}

/// Removes duplicates, which were reported.
fn without_twins(node: &mut Node) {
    let (properties, children) = firsts(node);
    let mut properties = properties.into_iter();
    node.retain_properties(|_| properties.next().unwrap_or(true));
    let mut children = children.into_iter();
    node.children_mut()
        .retain(|_| children.next().unwrap_or(true));
    node.children_mut().iter_mut().for_each(without_twins);
}

/// Contents of a node `instance-create` other than its instance and its host tree.
pub(super) fn of_create(node: &Node, instance: &Instance) -> Option<Node> {
    let mut rest = node.clone();
    without_twins(&mut rest);
    rest.remove_property("instance-name");
    if instance.id.is_some() {
        rest.remove_property("id");
    }
    // Other contents of `chosen` are refused.
    if rest
        .child("chosen")
        .is_some_and(|c| c.child(HOST_TREE).is_some())
    {
        rest.remove_child("chosen");
    }
    if rest
        .child("options")
        .is_some_and(|options| !is_empty(options))
    {
        prune(&mut rest, "options", |options| {
            options.remove_property("enable-host-kcore");
        });
    }
    prune(&mut rest, "resources", |resources| {
        let known = [
            ("cpus", !instance.cpus.is_empty()),
            ("memory-bytes", instance.memory_bytes > 0),
            ("numa-nodes", !instance.numa_nodes.is_empty()),
            ("cpu-affinity", instance.cpu_affinity.is_some()),
            ("memory-policy", instance.memory_policy.is_some()),
            ("llc-way-mask", instance.llc_ways.is_some()),
        ];
        for (name, is_read) in known {
            if is_read {
                resources.remove_property(name);
            }
        }
        if resources
            .child("virtio")
            .is_some_and(|virtio| !is_empty(virtio))
        {
            prune(resources, "virtio", |virtio| of_virtio(virtio, instance));
        }
        let uring = instance.uring.unwrap_or_default();
        prune(resources, "uring", |child| {
            let known = [
                ("sq-entries", uring.sq_entries),
                ("cq-entries", uring.cq_entries),
                ("shim-data-pages", uring.shim_pages),
            ];
            for (name, size) in known {
                if size.is_some() {
                    child.remove_property(name);
                }
            }
        });
    });
    (!is_empty(&rest)).then_some(rest)
}

/// Drops unread devices, which are refused.
fn of_virtio(virtio: &mut Node, instance: &Instance) {
    for device in virtio.children_mut() {
        for name in ["device-id", "queues", "queue-size"] {
            device.remove_property(name);
        }
    }
    virtio.children_mut().retain(|device| {
        let mut known = instance.virtio.iter();
        !is_empty(device) && known.any(|there| there.name == device.name())
    });
}

fn is_empty(node: &Node) -> bool {
    node.properties().is_empty() && node.children().is_empty()
}

/// Removes the known contents from a child, and the child itself if it is then empty.
fn prune(node: &mut Node, name: &str, take: impl FnOnce(&mut Node)) {
    if let Some(child) = node.child_mut(name) {
        take(child);
        if is_empty(child) {
            node.remove_child(name);
        }
    }
}
