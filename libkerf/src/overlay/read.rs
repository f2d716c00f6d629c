use std::collections::HashSet;

use super::rest::{self, only};
use super::{CpuMove, Create, DeviceMove, Fragment, MemoryMove, Operation, Overlay, Target};
use crate::check::{self, Finding, Rule, Stance};
use crate::model::{At, By, Instance, Reader, check_size, numa_node_id, pci_address};
use crate::tree::{DeviceTree, Node};

impl Overlay {
    /// Reads an overlay's tree as the kernel does: fragments by their unit addresses, operations in
    /// its own order.
    pub(crate) fn read(tree: &DeviceTree, read: &mut Reader<'_>) -> Overlay {
        let root = At::root(tree.root());
        if root
            .node
            .property("compatible")
            .is_some_and(|p| !p.bytes().is_empty())
        {
            read.text(&root, "compatible", By::Kerf);
        }
        let note = root
            .node
            .property("mk,resources")
            .and_then(|p| p.text().ok());
        only(
            &root,
            &["compatible", "mk,resources"],
            |child| child.name().starts_with("fragment@"),
            read,
        );
        rest::check_root(&root, read);
        let mut fragments: Vec<(u32, Fragment)> = Vec::new();
        let mut units = HashSet::new();
        let mut any = false;
        for node in root.node.children_with_prefix("fragment@") {
            any = true;
            let at = root.enter(node);
            let unit = unit_address(&at, read);
            if let Some(unit) = unit
                && !units.insert(unit)
            {
                let problem = format!("there is another fragment@{unit:x}");
                let advice = "number the fragments in the order they are to run";
                read.push(Finding::new(
                    Rule::FragmentTwice,
                    at.path(),
                    problem,
                    advice,
                ));
            }
            if let Some(fragment) = Fragment::read(&at, read) {
                fragments.push((unit.unwrap_or(u32::MAX), fragment));
            }
        }
        if !any {
            let advice = "add fragment@0 { target-path; __overlay__ { … }; }";
            let finding = Finding::new(Rule::FragmentMissing, root.path(), "no fragment@N", advice);
            read.push(finding);
        }
        fragments.sort_by_key(|(unit, _)| *unit);
        Overlay {
            note: note.map(str::to_owned),
            fragments: fragments
                .into_iter()
                .map(|(_, fragment)| fragment)
                .collect(),
        }
    }
}

fn unit_address(at: &At<'_>, read: &mut Reader<'_>) -> Option<u32> {
    let text = at.node.unit_address().unwrap_or_default();
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let unit = u32::from_str_radix(digits, 16).ok().filter(|_| is_hex);
    if unit.is_none() {
        let problem = format!("{text:?} is not a 32-bit hexadecimal number");
        let advice = "name it fragment@0, fragment@1, …";
        read.push(Finding::new(Rule::FragmentUnit, at.path(), problem, advice));
    }
    unit
}

impl Fragment {
    fn read(at: &At<'_>, read: &mut Reader<'_>) -> Option<Fragment> {
        let older = older_form(at, read);
        let target = Target::read(at, older, read);
        let Some(overlay) = at.child("__overlay__") else {
            let advice = "put the operations under __overlay__";
            read.push(Finding::new(
                Rule::OverlayMissing,
                at.path(),
                "no node __overlay__",
                advice,
            ));
            return None;
        };
        only(
            at,
            &["target-path"],
            |child| std::ptr::eq(child, overlay.node),
            read,
        );
        // The operations are checked below.
        only(&overlay, &[], |_| true, read);
        // Without a target all operations are read, to find their errors.
        let order = Operation::order(target.as_ref().unwrap_or(&Target::Instances));
        let mut operations = Vec::new();
        let mut run = Vec::new();
        for name in order {
            if let Some(node) = overlay.child(name) {
                run.push(node.node);
                let by = ByKerf::of(name, &overlay);
                operations.extend(Operation::read(&node, name, target.as_ref(), by, read));
            }
        }
        for child in overlay.node.children() {
            let is_run = run.iter().any(|node| std::ptr::eq(*node, child));
            if !is_run {
                let problem = "the kernel does not know this operation, or runs only the first one";
                let advice = format!("operations are {}", order.join(", "));
                let path = overlay.path().child(child.name());
                read.push(Finding::new(Rule::OperationUnknown, path, problem, advice));
            }
        }
        Some(Fragment {
            target: target?,
            operations,
        })
    }
}

/// Reports an overlay from before target-path, which names the instance in each operation.
fn older_form(at: &At<'_>, read: &mut Reader<'_>) -> bool {
    let Some(overlay) = at.child("__overlay__") else {
        return false;
    };
    for operation in overlay.node.children() {
        let has_instance = operation.property("mk,instance").is_some();
        let has_region = operation.children_with_prefix("region@").next().is_some();
        if has_instance || has_region {
            let mark = if has_instance {
                "mk,instance"
            } else {
                "region@"
            };
            let problem =
                format!("{mark} is how overlays of generation A (kerf 0.1.0) are written");
            let advice = "name the target in target-path, and memory as memory@N { reg }";
            let path = overlay.path().child(operation.name());
            let finding = Finding::new(Rule::OlderForm, path, problem, advice);
            read.push(finding.judged(Stance::Refuses, Stance::Takes));
            return true;
        }
    }
    false
}

impl Target {
    fn read(at: &At<'_>, older: bool, read: &mut Reader<'_>) -> Option<Target> {
        let Some(path) = read.text(at, "target-path", By::Kernel) else {
            if at.node.property("target-path").is_none() && !older {
                let advice = "set it to /resources, /instances or /instances/NAME";
                let finding =
                    Finding::new(Rule::TargetMissing, at.path(), "no target-path", advice);
                read.push(finding.of("target-path"));
            }
            return None;
        };
        let target = match path {
            "/resources" => Some(Target::Pool),
            "/instances" => Some(Target::Instances),
            _ => path
                .strip_prefix("/instances/")
                .filter(|name| !name.is_empty() && !name.contains('/'))
                .map(|name| Target::Instance(name.to_owned())),
        };
        if target.is_none() {
            let problem = format!("{path:?} is not a target");
            let advice = "set it to /resources, /instances or /instances/NAME";
            let finding = Finding::new(Rule::TargetUnsupported, at.path(), problem, advice);
            read.push(finding.of("target-path"));
        }
        target
    }
}

/// Whether kerf reads an operation: only the first create or remove operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ByKerf {
    Read,
    NotRead,
}

impl ByKerf {
    fn of(name: &str, overlay: &At<'_>) -> Self {
        match name {
            "instance-create" => ByKerf::Read,
            "instance-remove" if overlay.node.child("instance-create").is_none() => ByKerf::Read,
            _ => ByKerf::NotRead,
        }
    }

    fn text(self) -> By {
        match self {
            ByKerf::Read => By::Both,
            ByKerf::NotRead => By::Kernel,
        }
    }
}

impl Operation {
    fn read(
        at: &At<'_>,
        name: &str,
        target: Option<&Target>,
        by: ByKerf,
        read: &mut Reader<'_>,
    ) -> Option<Operation> {
        let is_of_set = matches!(name, "instance-create" | "instance-remove");
        if target.is_some_and(|target| (*target == Target::Instances) != is_of_set) {
            let right = if is_of_set {
                "/instances"
            } else {
                "/resources or /instances/NAME"
            };
            let problem = format!("{name} is not an operation on this target");
            let finding = Finding::new(
                Rule::OperationMisplaced,
                at.path(),
                problem,
                format!("its target is {right}"),
            );
            read.push(finding);
        }
        let of_pool = target == Some(&Target::Pool);
        match name {
            "instance-create" => {}
            "instance-remove" => only(at, &["instance-name"], |_| false, read),
            // The rule for generation A's contents reports them.
            _ => only(at, &["mk,instance"], |_| true, read),
        }
        Some(match name {
            "instance-create" => Operation::Create(Box::new(Create::read(at, read)?)),
            "instance-remove" => Operation::Remove(instance_name(at, by, read)?),
            "memory-add" => Operation::MemoryAdd(items(at, "memory@", read, |at, read| {
                MemoryMove::read(at, of_pool, read)
            })),
            "memory-remove" => Operation::MemoryRemove(items(at, "memory@", read, |at, read| {
                MemoryMove::read(at, false, read)
            })),
            "cpu-add" => Operation::CpuAdd(items(at, "cpu@", read, CpuMove::read)),
            "cpu-remove" => Operation::CpuRemove(items(at, "cpu@", read, CpuMove::read)),
            "device-add" => Operation::DeviceAdd(items(at, "pci@", read, DeviceMove::read)),
            _ => Operation::DeviceRemove(items(at, "pci@", read, DeviceMove::read)),
        })
    }
}

/// Reads the items of an operation; the kernel skips items with other names.
fn items<T>(
    at: &At<'_>,
    prefix: &str,
    read: &mut Reader<'_>,
    item: impl Fn(&At<'_>, &mut Reader<'_>) -> Option<T>,
) -> Vec<T> {
    let mut found = Vec::new();
    for node in at.node.children() {
        let child = at.enter(node);
        if node.name().starts_with(prefix) {
            rest::check_item(&child, read);
            found.extend(item(&child, read));
        } else if !node.name().starts_with("region@") {
            let problem = format!("the kernel skips it: it is not called {prefix}N");
            read.push(Finding::new(
                Rule::ItemIgnored,
                child.path(),
                problem,
                "rename it, or remove it",
            ));
        }
    }
    found
}

fn instance_name(at: &At<'_>, by: ByKerf, read: &mut Reader<'_>) -> Option<String> {
    let name = read.text(at, "instance-name", by.text());
    if at.node.property("instance-name").is_none() {
        let kerf = match at.node.name().starts_with("instance-create") {
            true => Stance::Refuses,
            false => Stance::Takes,
        };
        let advice = "add instance-name";
        let finding = Finding::new(Rule::NameMissing, at.path(), "it names no instance", advice);
        read.push(finding.of("instance-name").judged(Stance::Refuses, kerf));
    }
    let name = name?;
    check::check_name(name, &at.path(), read.report);
    Some(name.to_owned())
}

impl MemoryMove {
    fn read(at: &At<'_>, by_size: bool, read: &mut Reader<'_>) -> Option<MemoryMove> {
        let node = numa(at, read);
        let kind = loose_u32(at.node, "mem-type");
        if at.node.property("numa-node").is_some() {
            let problem = "numa-node is the name that generation A (kerf 0.1.0) used";
            let finding = Finding::new(Rule::OlderForm, at.path(), problem, "call it numa-node-id");
            read.push(finding.of("numa-node").judged(Stance::Takes, Stance::Takes));
        }
        if !by_size {
            let reg = at.node.property("reg");
            let Some(reg) = reg else {
                let advice = "add reg, a base and a size of 64 bits each";
                let finding = Finding::new(Rule::PropertyShape, at.path(), "no reg", advice);
                read.push(finding.of("reg").judged(Stance::Refuses, Stance::Takes));
                return None;
            };
            return match reg.range() {
                Ok((base, size)) => Some(MemoryMove {
                    base: Some(base),
                    size,
                    node,
                    kind,
                }),
                Err(shape) => {
                    read.misshapen(at, reg, shape, By::Kernel);
                    None
                }
            };
        }
        if at.node.property("reg").is_some() {
            let problem = "pool memory is asked for by size; the kernel picks the address";
            let finding = Finding::new(
                Rule::MemoryByAddress,
                at.path(),
                problem,
                "write size instead",
            );
            read.push(finding.of("reg"));
            return None;
        }
        let size = read.u64(at, "size", By::Kernel);
        if at.node.property("size").is_none() {
            let finding =
                Finding::new(Rule::MemoryItem, at.path(), "no size", "add size, in bytes");
            read.push(finding.of("size").judged(Stance::Refuses, Stance::Takes));
        }
        let size = size?;
        check_size(at, size, read);
        Some(MemoryMove {
            base: None,
            size,
            node,
            kind,
        })
    }
}

/// Returns the NUMA node of an item; kerf reads no items.
fn numa(at: &At<'_>, read: &mut Reader<'_>) -> Option<u32> {
    match at.node.property("numa-node-id")?.u32() {
        Ok(_) => numa_node_id(at, read),
        Err(shape) => {
            let property = at.node.property("numa-node-id")?;
            read.misshapen(at, property, shape, By::Kernel);
            None
        }
    }
}

/// Returns a cell that is 0 for the kernel if it is missing or malformed.
fn loose_u32(node: &Node, name: &str) -> u32 {
    node.property(name).and_then(|p| p.u32().ok()).unwrap_or(0)
}

impl CpuMove {
    fn read(at: &At<'_>, read: &mut Reader<'_>) -> Option<CpuMove> {
        let node = numa(at, read);
        let Some(reg) = at.node.property("reg") else {
            let finding = Finding::new(
                Rule::PropertyShape,
                at.path(),
                "no reg",
                "add reg, the physical id",
            );
            read.push(finding.of("reg").judged(Stance::Refuses, Stance::Takes));
            return None;
        };
        match reg
            .u64()
            .or_else(|shape| reg.u32().map(u64::from).map_err(|_| shape))
        {
            Ok(id) => Some(CpuMove {
                id,
                node,
                flags: loose_u32(at.node, "flags"),
            }),
            Err(shape) => {
                read.misshapen(at, reg, shape, By::Kernel);
                None
            }
        }
    }
}

impl DeviceMove {
    fn read(at: &At<'_>, read: &mut Reader<'_>) -> Option<DeviceMove> {
        let Some(text) = read.text(at, "pci-id", By::Kernel) else {
            if at.node.property("pci-id").is_none() {
                let advice = "add pci-id, such as 0000:09:00.0";
                let finding = Finding::new(Rule::PciIncomplete, at.path(), "no pci-id", advice);
                read.push(finding.of("pci-id"));
            }
            return None;
        };
        let text_of = |name| {
            at.node
                .property(name)
                .and_then(|p| p.text().ok())
                .map(str::to_owned)
        };
        Some(DeviceMove {
            address: pci_address(at, text, read)?,
            driver: text_of("driver"),
            flags: loose_u32(at.node, "flags"),
            alias: text_of("alias"),
        })
    }
}

impl Create {
    fn read(at: &At<'_>, read: &mut Reader<'_>) -> Option<Create> {
        let name = instance_name(at, ByKerf::Read, read);
        let id = read.u32(at, "id", By::Kerf);
        check::check_id(id, &at.path(), read.report);
        let host_kcore = at
            .child("options")
            .is_some_and(|o| o.node.property("enable-host-kcore").is_some());
        let mut instance = Instance {
            id,
            host_kcore,
            ..Instance::default()
        };
        match at.child("resources") {
            Some(resources) => read_resources(&mut instance, &resources, read),
            None => {
                let finding = Finding::new(
                    Rule::InstanceResources,
                    at.path(),
                    "no node resources",
                    "add it",
                );
                read.push(finding);
            }
        }
        let host_tree = at
            .child("chosen")
            .and_then(|chosen| host_tree(&chosen, read));
        instance.name = name?;
        rest::check_twins(at, read);
        let rest = rest::of_create(at.node, &instance);
        Some(Create {
            instance,
            host_tree,
            rest,
        })
    }
}

fn read_resources(instance: &mut Instance, at: &At<'_>, read: &mut Reader<'_>) {
    instance.read_cpus(at, read);
    instance.read_bytes(at, read);
    if at.node.property("memory-bytes").is_none() {
        let problem = "no memory: it can exist, but not boot";
        let finding = Finding::new(
            Rule::InstanceMemoryMissing,
            at.path(),
            problem,
            "give it memory",
        );
        read.push(finding.of("memory-bytes"));
    }
    read.u64(at, "memory-base", By::Kerf);
    let (rule, problem, advice) = match at.node.property("memory-base") {
        Some(_) => (
            Rule::BaseIgnored,
            "the kernel picks the address itself",
            "take it out",
        ),
        None => (
            Rule::KerfCannotRead,
            "kerf 0.4.0 cannot read an overlay without memory-base, not even its own",
            "nothing is wrong with it",
        ),
    };
    read.push(Finding::new(rule, at.path(), problem, advice).of("memory-base"));
    if let Some(names) = at.node.property("device-names") {
        let kerf = match names.text() {
            Ok(_) => Stance::Takes,
            Err(_) => Stance::Refuses,
        };
        let advice = "give devices with device-add to /instances/NAME, in a later fragment";
        let problem = "the kernel accepts no devices by name here";
        let finding = Finding::new(Rule::DeviceNamesCreate, at.path(), problem, advice);
        read.push(finding.of("device-names").judged(Stance::Refuses, kerf));
    }
    embedded_devices(at, read);
    instance.read_preferences(at, read);
}

/// Reads devices with a full description, as in the tree that the kernel serves for an instance.
fn embedded_devices(at: &At<'_>, read: &mut Reader<'_>) {
    let Some(devices) = at.child("devices") else {
        return;
    };
    for node in devices.node.children() {
        let at = devices.enter(node);
        let has = |name| node.property(name).is_some();
        match node.property("device-type").and_then(|p| p.text().ok()) {
            Some("pci") => {
                for name in ["pci-id", "vendor-id", "device-id"] {
                    if !has(name) {
                        let problem = "a PCI device needs pci-id, vendor-id and device-id";
                        let finding = Finding::new(
                            Rule::PciIncomplete,
                            at.path(),
                            problem,
                            format!("add {name}"),
                        );
                        read.push(finding.of(name));
                    }
                }
            }
            Some("platform") if !has("device-name") && !has("acpi-hid") => {
                let problem = "a platform device needs device-name or acpi-hid";
                read.push(Finding::new(
                    Rule::DeviceNameless,
                    at.path(),
                    problem,
                    "add one",
                ));
            }
            _ => {}
        }
    }
}

pub(super) const HOST_TREE: &str = "multikernel,host-tree";

fn host_tree(at: &At<'_>, read: &mut Reader<'_>) -> Option<Node> {
    let others = at
        .node
        .children()
        .iter()
        .filter(|child| child.name() != HOST_TREE);
    let others: Vec<&str> = others.map(|child| child.name()).collect();
    let properties: Vec<&str> = at.node.properties().iter().map(|p| p.name()).collect();
    let surplus = [others, properties].concat();
    if !surplus.is_empty() {
        let problem = format!("the kernel takes no {} here", surplus.join(", "));
        let advice = format!("leave {HOST_TREE} alone in chosen");
        read.push(Finding::new(
            Rule::ChosenContent,
            at.path(),
            problem,
            advice,
        ));
    }
    at.node.child(HOST_TREE).cloned()
}
