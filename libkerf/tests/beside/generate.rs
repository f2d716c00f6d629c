//! Valid and invalid trees, generated from a seed.

use libkerf::tree::{DeviceTree, Node, Property};

use crate::kerf::As;

/// A small pseudo-random generator: the same seed gives the same trees on every machine.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % end
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

pub(crate) struct Case {
    pub(crate) kind: As,
    pub(crate) tree: DeviceTree,
    /// Chunks of the pool in /proc/iomem.
    pub(crate) iomem: Vec<(u64, u64)>,
}

const MIB: u64 = 1 << 20;

pub(crate) fn case(seed: u64) -> Case {
    let random = &mut Random::new(seed);
    let kind = *random.pick(&[
        As::Baseline,
        As::System,
        As::System,
        As::System,
        As::Instance,
        As::Overlay,
    ]);
    let live = random.chance(50);
    let mut iomem = Vec::new();
    let mut root = match kind {
        As::Baseline => pool(random, false, &mut iomem),
        As::System => {
            let pool = pool(random, live, &mut iomem);
            with_instances(random, pool, live)
        }
        As::Instance => own_instance(random),
        As::Overlay => overlay(random),
    };
    // Half of the trees stay unchanged, and are mostly valid.
    if random.chance(50) {
        for _ in 0..=random.below(2) {
            breakage(random, &mut root);
        }
    }
    if random.chance(80) {
        iomem.clear();
    } else if random.chance(30) {
        iomem.pop();
    }
    Case {
        kind,
        tree: DeviceTree::new(root),
        iomem,
    }
}

const CPUS: usize = 8;

fn pool(random: &mut Random, live: bool, iomem: &mut Vec<(u64, u64)>) -> Node {
    let compatible = if live {
        "multikernel-v1"
    } else {
        "linux,multikernel-host"
    };
    let cpus: Vec<u64> = (1..=CPUS as u64).map(|n| n * 2).collect();
    let mut resources = Node::new("resources").with_u64_list("cpus", &cpus);
    if live {
        resources = resources.with_u64_list("cpus-available", &cpus);
    }
    for node in 0..=random.below(2) {
        let size = 64 * MIB * (1 + random.below(8) as u64);
        let base = (1 + node as u64) << 32;
        let name = if live {
            format!("memory@{base:x}")
        } else {
            format!("memory@{node}")
        };
        let mut memory = Node::new(name);
        if live {
            memory = memory
                .with_text("device_type", "memory")
                .with_u64_list("reg", &[base, size]);
            iomem.push((base, size));
        } else {
            memory = memory.with_u64("size", size);
        }
        if random.chance(80) {
            memory = memory.with_u32("numa-node-id", u32::try_from(node).unwrap());
        }
        resources.push(memory);
    }
    if random.chance(60) {
        resources.push(devices(random));
    }
    if random.chance(30) {
        resources.push(topology());
    }
    let mut root = Node::new("").with_text("compatible", compatible);
    if random.chance(15) {
        resources = resources.with_u32("llc-way-mask", 0xff0);
    }
    root.push(resources);
    if random.chance(40) {
        root.push(Node::new("aliases").with_text("eth0", "/resources/devices/nic0"));
    }
    if live && random.chance(50) {
        root.push(bus());
    }
    root
}

fn devices(random: &mut Random) -> Node {
    let mut devices = Node::new("devices");
    for n in 0..1 + random.below(3) {
        let mut nic = Node::new(format!("nic{n}"))
            .with_text("device-type", "pci")
            .with_text("pci-id", &format!("0000:0{n}:00.0"))
            .with_u32("vendor-id", 0x8086)
            .with_u32("device-id", 0x1572);
        if random.chance(50) {
            nic = nic
                .with_u32("sriov-vfs", 4)
                .with_u32_list("available-vfs", &[1, 2, 3]);
        }
        if random.chance(30) {
            nic = nic
                .with_u32("namespaces", 2)
                .with_u32_list("available-ns", &[1, 2]);
        }
        devices.push(nic);
    }
    if random.chance(30) {
        let uart = Node::new("uart").with_text("device-type", "platform");
        devices.push(uart.with_text("device-name", "serial8250"));
    }
    devices
}

fn topology() -> Node {
    let node = |id: u64, cpus: &[u32]| {
        Node::new(format!("node@{id}"))
            .with_u64("memory-base", id << 32)
            .with_u64("memory-size", 1 << 32)
            .with_u32_list("cpus", cpus)
            .with_text("memory-type", "dram")
            .with_u32_list("distance-matrix", &[10, 20])
    };
    let nodes = Node::new("numa-nodes").with_child(node(0, &[2, 4, 6, 8]));
    Node::new("topology").with_child(nodes.with_child(node(1, &[10, 12, 14, 16])))
}

fn bus() -> Node {
    let leaf = Node::new("pci@0,0")
        .with_u32_list("reg", &[0x0009_0000, 0, 0, 0, 0])
        .with_u32("vendor-id", 0x8086)
        .with_u32("device-id", 0x1572);
    Node::new("pci@9")
        .with_text("compatible", "multikernel,pci-host-bridge")
        .with_u32("linux,pci-domain", 0)
        .with_child(leaf)
}

fn with_instances(random: &mut Random, root: Node, live: bool) -> Node {
    let mut instances = Node::new("instances");
    let mut cpu = 1;
    for n in 0..random.below(4) {
        let count = 1 + random.below(2);
        let cpus: Vec<u64> = (cpu..cpu + count as u64).map(|n| n * 2).collect();
        cpu += count as u64;
        let placed = live && random.chance(70);
        let base = if placed {
            (1 << 32) + n as u64 * 16 * MIB
        } else {
            0
        };
        let mut resources = Node::new("resources")
            .with_u64_list("cpus", &cpus)
            .with_u64("memory-base", base)
            .with_u64("memory-bytes", 16 * MIB);
        if random.chance(40) {
            let names = [
                "nic0",
                "eth0",
                "nic0_vf1",
                "nic1_ns2",
                "0000:00:00.0",
                "nic9",
                "nic0_vf9",
                "nic0_ns7",
                "nic0_vfx",
            ];
            let mut devices = vec![*random.pick(&names)];
            if random.chance(20) {
                devices.push(*random.pick(&names));
            }
            resources = resources.with_text_list("device-names", &devices);
        }
        if random.chance(15) {
            resources =
                resources.with_u32("llc-way-mask", *random.pick(&[0x30, 0xc0, 0x70, 0xf, 0x50]));
        }
        if random.chance(20) {
            let nodes = [*random.pick(&[0, 1, 7])];
            resources = resources.with_u32_list("numa-nodes", &nodes);
        }
        if random.chance(10) {
            resources.push(Node::new("uring").with_u32("sq-entries", 64));
        }
        let id = u32::try_from(n).unwrap() + 1;
        instances.push(
            Node::new(format!("i{n}"))
                .with_u32("id", id)
                .with_child(resources),
        );
    }
    root.with_child(instances)
}

fn own_instance(random: &mut Random) -> Node {
    let mut root = Node::new("")
        .with_text("compatible", "multikernel-v1")
        .with_text("model", "web")
        .with_u32("id", 3);
    let resources = Node::new("resources")
        .with_u64("memory-base", 1 << 32)
        .with_u64("memory-bytes", 64 * MIB)
        .with_u64_list("cpus", &[2, 4]);
    root.push(resources);
    if random.chance(50) {
        root.push(bus());
    }
    root
}

fn overlay(random: &mut Random) -> Node {
    let mut root = Node::new("").with_text("compatible", "linux,multikernel-overlay");
    for n in 0..1 + random.below(2) {
        let mut resources = Node::new("resources")
            .with_u64_list("cpus", &[2, 4])
            .with_u64("memory-bytes", 64 * MIB);
        if random.chance(70) {
            resources = resources.with_u64("memory-base", 0);
        }
        let create = Node::new("instance-create")
            .with_text("instance-name", &format!("i{n}"))
            .with_u32("id", 1 + u32::try_from(n).unwrap())
            .with_child(resources);
        let remove = Node::new("instance-remove").with_text("instance-name", "gone");
        let operation = if random.chance(70) { create } else { remove };
        root.push(
            Node::new(format!("fragment@{n}"))
                .with_text("target-path", "/instances")
                .with_child(Node::new("__overlay__").with_child(operation)),
        );
    }
    root
}

/// Breaks the tree at a random place.
fn breakage(random: &mut Random, root: &mut Node) {
    match random.below(10) {
        0..=2 => {
            let skip = random.below(64);
            reshape(random, some_node(skip, root));
        }
        3 => {
            let node = some_node(random.below(64), root);
            let names: Vec<String> = node
                .properties()
                .iter()
                .map(|p| p.name().to_owned())
                .collect();
            if !names.is_empty() {
                let name: &String = random.pick(&names);
                node.remove_property(name);
            }
        }
        4 => {
            let node = some_node(random.below(64), root);
            if !node.children().is_empty() {
                let at = random.below(node.children().len());
                node.children_mut().remove(at);
            }
        }
        5 => {
            let node = some_node(random.below(64), root);
            if !node.children().is_empty() {
                let twin = random.pick(node.children()).clone();
                node.push(twin);
            }
        }
        _ => revalue(random, root),
    }
}

fn some_node(skip: usize, node: &mut Node) -> &mut Node {
    let count = count(node);
    nth(skip % count, node).expect("there are as many")
}

fn count(node: &Node) -> usize {
    1 + node.children().iter().map(count).sum::<usize>()
}

fn nth(skip: usize, node: &mut Node) -> Option<&mut Node> {
    if skip == 0 {
        return Some(node);
    }
    let mut skip = skip - 1;
    for child in node.children_mut() {
        let size = count(child);
        if skip < size {
            return nth(skip, child);
        }
        skip -= size;
    }
    None
}

/// Gives a property a value of another form.
fn reshape(random: &mut Random, node: &mut Node) {
    if node.properties().is_empty() {
        return;
    }
    let property = random.pick(node.properties()).clone();
    let mut bytes = property.bytes().to_vec();
    match random.below(5) {
        0 => bytes.clear(),
        1 => bytes.truncate(bytes.len() / 2),
        2 => bytes.push(7),
        3 => bytes.extend_from_slice(&[0, 0, 0, 1]),
        _ => bytes.extend_from_slice(b"more\0"),
    }
    node.set(Property::new(property.name(), bytes));
}

/// Gives another value to a property of known meaning.
fn revalue(random: &mut Random, root: &mut Node) {
    let instances = root.child("instances").map_or(0, |i| i.children().len());
    let values = [
        0,
        1,
        4,
        5,
        17,
        4095,
        4096,
        600,
        5000,
        1 << 32,
        1 << 33,
        (1 << 32) + 1,
        u64::MAX - 4095,
        10_000 * MIB,
    ];
    let value = *random.pick(&values);
    if instances > 0 && random.chance(70) {
        let at = random.below(instances);
        let instances = root.child_mut("instances").expect("it is there");
        let instance = &mut instances.children_mut()[at];
        if random.chance(25) {
            instance.set(Property::new(
                "id",
                u32::try_from(value & 0xffff).unwrap().to_be_bytes(),
            ));
            return;
        }
        let Some(resources) = instance.child_mut("resources") else {
            return;
        };
        match random.below(4) {
            0 => resources.set(Property::new("memory-base", value.to_be_bytes())),
            1 => resources.set(Property::new("memory-bytes", value.to_be_bytes())),
            2 => resources.set(list("cpus", &[2, value, value])),
            _ => resources.set(list("cpus", &[8, 10, 3])),
        }
        return;
    }
    let Some(resources) = root.child_mut("resources") else {
        return;
    };
    match random.below(10) {
        0 => resources.set(list("cpus", &[2, 4, 4, value])),
        1 => resources.set(list("cpus-available", &[2, 4])),
        2 => resources.set(Property::new("cpus", [0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 6])),
        3 => resources.set(Property::new("memory-bytes", value.to_be_bytes())),
        4 => resources.set(Property::new("llc-way-mask", [0, 0, 0, 0])),
        5 | 6 => {
            let name = if random.chance(50) {
                "memory@0"
            } else {
                "memory@100000000"
            };
            if let Some(memory) = resources.child_mut(name) {
                match random.below(3) {
                    0 => memory.set(Property::new("size", value.to_be_bytes())),
                    1 => memory.set(list("reg", &[1 << 32, value])),
                    _ => memory.set(Property::new("numa-node-id", 5000_u32.to_be_bytes())),
                }
            }
        }
        7 => {
            if let Some(nic) = resources
                .child_mut("devices")
                .and_then(|d| d.child_mut("nic0"))
            {
                let wrong = ["0000:01:00.0", "9:9", "0000:01:00.0x", "zz"];
                let text = format!("{}\0", random.pick(&wrong));
                nic.set(Property::new("pci-id", text.into_bytes()));
            }
        }
        8 => {
            if let Some(nodes) = resources
                .child_mut("topology")
                .and_then(|t| t.child_mut("numa-nodes"))
            {
                nodes.push(Node::new(*random.pick(&["node@2", "node@x", "node@"])));
            }
        }
        _ => {
            let reference = Node::new("eth0_vf1")
                .with_text("parent", "&nic0")
                .with_u32("vf-id", 9);
            root.push(reference);
        }
    }
}

fn list(name: &str, values: &[u64]) -> Property {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_be_bytes())
        .collect();
    Property::new(name, bytes)
}
