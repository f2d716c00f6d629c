//! The effect of an overlay in the kernel.

use super::{CpuMove, Create, DeviceMove, Fragment, MemoryMove, Operation, Overlay, State, Target};
use crate::check::{Finding, Report, Rule, SLACK_BYTES, Stance};
use crate::model::{Device, DeviceKind, MemoryRequest};
use crate::tree::NodePath;

/// The place to report the findings of an operation.
struct Spot<'r> {
    path: NodePath,
    report: &'r mut Report,
}

impl Spot<'_> {
    fn refuse(&mut self, rule: Rule, problem: impl Into<String>, advice: impl Into<String>) {
        self.report
            .push(Finding::new(rule, self.path.clone(), problem, advice));
    }
}

impl State {
    pub(crate) fn run(&mut self, overlay: &Overlay, report: &mut Report) {
        for (number, fragment) in overlay.fragments.iter().enumerate() {
            let path = NodePath::root()
                .child(&format!("fragment@{number:x}"))
                .child("__overlay__");
            self.run_fragment(fragment, &path, report);
        }
    }

    fn run_fragment(&mut self, fragment: &Fragment, path: &NodePath, report: &mut Report) {
        if let Target::Instance(name) = &fragment.target
            && self.system.instance(name).is_none()
        {
            let mut spot = Spot {
                path: path.clone(),
                report,
            };
            let problem = format!("there is no instance {name:?}");
            spot.refuse(
                Rule::TargetUnknown,
                problem,
                "create it in an earlier fragment",
            );
            return;
        }
        for name in Operation::order(&fragment.target) {
            let named = fragment.operations.iter().filter(|o| o.name() == name);
            for operation in named {
                let mut spot = Spot {
                    path: path.child(name),
                    report,
                };
                match (&fragment.target, operation) {
                    (Target::Instances, Operation::Create(create)) => {
                        self.create(create, &mut spot)
                    }
                    (Target::Instances, Operation::Remove(name)) => self.remove(name, &mut spot),
                    (Target::Pool, operation) => self.change_pool(operation, &mut spot),
                    (Target::Instance(name), operation) => {
                        self.change_instance(name, operation, &mut spot);
                    }
                    // The reader has reported it as misplaced.
                    (Target::Instances, _) => {}
                }
            }
        }
    }

    fn create(&mut self, create: &Create, spot: &mut Spot<'_>) {
        let mut instance = create.instance.clone();
        let name = instance.name.clone();
        if self.system.instance(&name).is_some() {
            let problem = format!("there is an instance {name:?} already");
            spot.refuse(Rule::InstanceTaken, problem, "choose another name");
            return;
        }
        if let Some(id) = instance.id
            && let Some(other) = self.system.instances.iter().find(|i| i.id == Some(id))
        {
            let problem = format!("{} has id {id}", other.name);
            spot.refuse(
                Rule::IdTaken,
                problem,
                "choose another id, or leave it to the kernel",
            );
        }
        for cpu in &instance.cpus {
            self.check_free_cpu(*cpu, spot);
        }
        let node = instance.numa_nodes.first().copied();
        self.check_free_memory(u128::from(instance.memory_bytes), node, spot);
        // The location of the memory is unknown until the kernel has placed it.
        instance.memory_base = None;
        instance.regions.clear();
        self.system.instances.push(instance);
    }

    fn remove(&mut self, name: &str, spot: &mut Spot<'_>) {
        let Some(at) = self.system.instances.iter().position(|i| i.name == name) else {
            let problem = format!("there is no instance {name:?}");
            spot.refuse(Rule::TargetUnknown, problem, "take the operation out");
            return;
        };
        let status = self.status_of(name);
        if status.has_kernel() {
            let problem = format!("{name} is {}", status.as_str());
            spot.refuse(
                Rule::InstanceRunning,
                problem,
                "halt it, and unload its kernel, first",
            );
            return;
        }
        let removed = self.system.instances.remove(at);
        self.status.remove(name);
        self.free(&removed.cpus);
        for device in &removed.devices {
            if let Some(address) = self.address_of(device) {
                self.add_to_pool(address, None);
            }
        }
    }

    fn check_free_cpu(&self, cpu: u64, spot: &mut Spot<'_>) {
        if let Some(holder) = self.holder_of_cpu(cpu) {
            let problem = format!("CPU {cpu} belongs to {holder}");
            let mut free: Vec<u64> = self.free_cpus().into_iter().collect();
            free.sort_unstable();
            let advice = format!("free are {}", crate::model::list(&free));
            spot.refuse(Rule::CpuNotFree, problem, advice);
        } else if !self.free_cpus().contains(&cpu) {
            let problem = format!("CPU {cpu} is not free in the pool");
            let advice = format!(
                "the pool has {}",
                crate::model::list(&self.system.resources.cpus)
            );
            spot.refuse(Rule::CpuNotFree, problem, advice);
        }
    }

    fn check_free_memory(&self, bytes: u128, node: Option<u32>, spot: &mut Spot<'_>) {
        let free = self.free_bytes(node);
        let all_free = self.free_bytes(None);
        if bytes > free.min(all_free) {
            let of_node = node.map_or_else(String::new, |node| format!(" on NUMA node {node}"));
            let problem = format!("{bytes} bytes; {free} are free{of_node}");
            spot.refuse(
                Rule::MemoryNotFree,
                problem,
                "ask for less, or give the pool more",
            );
        } else if bytes > 0 && bytes == all_free {
            let problem = format!("{bytes} bytes are all that the pool has left");
            let advice = format!("leave {SLACK_BYTES} bytes for each instance");
            spot.refuse(Rule::MemoryFillsPool, problem, advice);
        }
    }

    fn change_pool(&mut self, operation: &Operation, spot: &mut Spot<'_>) {
        match operation {
            Operation::CpuRemove(items) => {
                for item in items {
                    self.take_pool_cpu(item.id, spot);
                }
            }
            Operation::CpuAdd(items) => {
                for item in items {
                    self.give_pool_cpu(item.id, spot);
                }
            }
            Operation::MemoryRemove(items) => {
                for item in items {
                    self.take_chunk(*item, spot);
                }
            }
            Operation::MemoryAdd(items) => {
                let requests = items.iter().map(|item| MemoryRequest {
                    size: item.size,
                    node: item.node,
                });
                self.system.resources.requests.extend(requests);
            }
            Operation::DeviceRemove(items) => {
                for item in items {
                    self.take_pool_device(item, spot);
                }
            }
            Operation::DeviceAdd(items) => {
                for item in items {
                    self.give_pool_device(item, spot);
                }
            }
            // The reader has reported it as misplaced.
            Operation::Create(_) | Operation::Remove(_) => {}
        }
    }

    fn take_pool_cpu(&mut self, cpu: u64, spot: &mut Spot<'_>) {
        if let Some(holder) = self.holder_of_cpu(cpu) {
            let problem = format!("CPU {cpu} belongs to {holder}");
            spot.refuse(Rule::CpuNotFree, problem, "take it from the instance first");
        } else if !self.system.resources.cpus.contains(&cpu) {
            let problem = format!("CPU {cpu} is not in the pool");
            spot.refuse(Rule::CpuNotHeld, problem, "take it out of the overlay");
        }
        let resources = &mut self.system.resources;
        resources.cpus.retain(|there| *there != cpu);
        if let Some(free) = &mut resources.free_cpus {
            free.retain(|there| *there != cpu);
        }
    }

    fn give_pool_cpu(&mut self, cpu: u64, spot: &mut Spot<'_>) {
        if self.system.resources.cpus.contains(&cpu) {
            let problem = format!("CPU {cpu} is the pool's already");
            spot.refuse(Rule::CpuNotFree, problem, "take it out of the overlay");
            return;
        }
        if let Some(machine) = &self.machine {
            match machine.cpu(cpu) {
                None => {
                    let problem = format!("the host has no CPU {cpu}");
                    let advice =
                        "name CPUs by their physical ids, which /proc/cpuinfo calls apicid";
                    spot.refuse(Rule::CpuAbsent, problem, advice);
                }
                Some(there) if there.logical == Some(0) => {
                    let problem = format!("CPU {cpu} is the host's logical CPU 0");
                    spot.refuse(Rule::CpuHost, problem, "leave it with the host");
                }
                Some(_) => {}
            }
        }
        self.system.resources.cpus.push(cpu);
        if let Some(free) = &mut self.system.resources.free_cpus {
            free.push(cpu);
        }
    }

    fn take_chunk(&mut self, item: MemoryMove, spot: &mut Spot<'_>) {
        let base = item.base.unwrap_or_default();
        let resources = &self.system.resources;
        let is_it = |c: &crate::model::Chunk| c.base == base && c.size == item.size;
        let Some(at) = resources.chunks.iter().position(is_it) else {
            let problem = format!(
                "{base:#x} with {:#x} bytes is no chunk of the pool",
                item.size
            );
            spot.refuse(
                Rule::MemoryNotHeld,
                problem,
                "name a whole chunk, as the pool's tree shows it",
            );
            return;
        };
        let end = resources.chunks[at].end();
        let inside = |start: u64| base <= start && u128::from(start) < end;
        let mut instances = self.system.instances.iter();
        let user = instances.find(|i| {
            i.memory_base.is_some_and(inside) || i.regions.iter().any(|(start, _)| inside(*start))
        });
        if let Some(user) = user {
            let problem = format!("{} has memory in the chunk at {base:#x}", user.name);
            spot.refuse(
                Rule::MemoryNotFree,
                problem,
                "take the memory from the instance first",
            );
        }
        self.system.resources.chunks.remove(at);
    }

    fn take_pool_device(&mut self, item: &DeviceMove, spot: &mut Spot<'_>) {
        let unknown = (Rule::DeviceNotHeld, "take it out of the overlay");
        self.check_free_device(item, unknown, spot);
        let devices = &mut self.system.resources.devices;
        devices.retain(|device| device.pci() != Some(item.address));
    }

    /// Checks that the pool has the device and no instance does. `unknown` is the rule that is violated
    /// if the pool does not have it, with the suggested correction.
    fn check_free_device(&self, item: &DeviceMove, unknown: (Rule, &str), spot: &mut Spot<'_>) {
        let address = item.address;
        if let Some(holder) = self.holder_of_device(address) {
            let problem = format!("{address} belongs to {holder}");
            spot.refuse(
                Rule::DeviceNotFree,
                problem,
                "take it from the instance first",
            );
        } else if !self.is_pool_device(item) {
            let (rule, advice) = unknown;
            spot.refuse(rule, format!("{address} is not in the pool"), advice);
        }
    }

    fn is_pool_device(&self, item: &DeviceMove) -> bool {
        let mut devices = self.system.resources.devices.iter();
        devices.any(|device| device.pci() == Some(item.address))
    }

    fn give_pool_device(&mut self, item: &DeviceMove, spot: &mut Spot<'_>) {
        let address = item.address;
        if self.is_pool_device(item) || self.holder_of_device(address).is_some() {
            let problem = format!("{address} is the pool's already");
            spot.refuse(Rule::DeviceNotFree, problem, "take it out of the overlay");
            return;
        }
        if let Some(alias) = item.alias.as_ref().filter(|alias| alias.len() > 31) {
            let problem = format!("the kernel cuts the alias {alias:?} to 31 characters");
            let finding = Finding::new(
                Rule::AliasLong,
                spot.path.clone(),
                problem,
                "choose a shorter one",
            );
            spot.report
                .push(finding.judged(Stance::Takes, Stance::Takes));
        }
        self.add_to_pool(address, item.alias.clone());
    }

    fn add_to_pool(&mut self, address: crate::model::PciAddress, alias: Option<String>) {
        let devices = &mut self.system.resources.devices;
        if devices.iter().all(|device| device.pci() != Some(address)) {
            devices.push(Device {
                name: address.node_name(),
                kind: DeviceKind::Pci(address),
                alias,
                ..Device::default()
            });
        }
    }

    fn change_instance(&mut self, name: &str, operation: &Operation, spot: &mut Spot<'_>) {
        match operation {
            Operation::CpuRemove(items) => self.take_cpus(name, items, spot),
            Operation::CpuAdd(items) => {
                for item in items {
                    self.check_free_cpu(item.id, spot);
                    if let Some(instance) = self.instance_mut(name) {
                        instance.cpus.push(item.id);
                    }
                }
            }
            Operation::MemoryRemove(items) => {
                for item in items {
                    self.take_region(name, *item, spot);
                }
            }
            Operation::MemoryAdd(items) => {
                for item in items {
                    self.give_memory(name, *item, spot);
                }
            }
            Operation::DeviceRemove(items) => self.take_devices(name, items, spot),
            Operation::DeviceAdd(items) => self.give_devices(name, items, spot),
            // The reader has reported it as misplaced.
            Operation::Create(_) | Operation::Remove(_) => {}
        }
    }

    fn take_cpus(&mut self, name: &str, items: &[CpuMove], spot: &mut Spot<'_>) {
        let Some(instance) = self.instance_mut(name) else {
            return;
        };
        for item in items {
            let before = instance.cpus.len();
            instance.cpus.retain(|cpu| *cpu != item.id);
            if instance.cpus.len() == before {
                let problem = format!("{name} has no CPU {}", item.id);
                let advice = format!("it has {}", crate::model::list(&instance.cpus));
                spot.refuse(Rule::CpuNotHeld, problem, advice);
            }
        }
        let cpus: Vec<u64> = items.iter().map(|item| item.id).collect();
        self.free(&cpus);
    }

    /// Adds CPUs that become free: the pool's CPUs are those that the kernel lists as free.
    fn free(&mut self, cpus: &[u64]) {
        if let Some(free) = &mut self.system.resources.free_cpus {
            let returned = cpus.iter().filter(|cpu| !free.contains(cpu));
            let returned: Vec<u64> = returned.copied().collect();
            free.extend(returned);
        }
    }

    fn take_region(&mut self, name: &str, item: MemoryMove, spot: &mut Spot<'_>) {
        let base = item.base.unwrap_or_default();
        let Some(instance) = self.instance_mut(name) else {
            return;
        };
        let is_it = |region: &(u64, u64)| *region == (base, item.size);
        let known = !instance.regions.is_empty();
        let at = instance.regions.iter().position(is_it);
        // Without known regions, the check is only that the item is not larger than the memory and starts at its base.
        let plausible = item.size <= instance.memory_bytes;
        match at {
            Some(at) => {
                instance.regions.remove(at);
                instance.memory_bytes = instance.memory_bytes.saturating_sub(item.size);
            }
            None if !known && plausible => instance.memory_bytes -= item.size,
            None => {
                let problem = format!(
                    "{base:#x} with {:#x} bytes is not a region of {name}",
                    item.size
                );
                let there: Vec<String> = instance
                    .regions
                    .iter()
                    .map(|(base, size)| format!("{base:#x}+{size:#x}"))
                    .collect();
                let advice = format!("its regions are {}", crate::model::list(&there));
                spot.refuse(Rule::MemoryNotHeld, problem, advice);
            }
        }
    }

    fn give_memory(&mut self, name: &str, item: MemoryMove, spot: &mut Spot<'_>) {
        let base = item.base.unwrap_or_default();
        let is_active = self.status_of(name) == super::Status::Active;
        let block = self.block.max(1);
        if is_active
            && (!base.is_multiple_of(block) || !item.size.is_multiple_of(block) || item.size == 0)
        {
            let problem = format!(
                "{base:#x} with {:#x} bytes is not in blocks of {block:#x}",
                item.size
            );
            let advice = "a running kernel takes whole, aligned memory blocks";
            spot.refuse(Rule::MemoryGranule, problem, advice);
        }
        self.check_free_memory(u128::from(item.size), item.node, spot);
        if is_active {
            self.check_free_range(base, item.size, spot);
        }
        if let Some(instance) = self.instance_mut(name) {
            // Its earlier memory stays in place, and is not necessarily contiguous with the new memory.
            if let ([], Some(start)) = (instance.regions.as_slice(), instance.memory_base) {
                instance.regions.push((start, instance.memory_bytes));
            }
            // For an instance that does not run, the kernel uses the size and picks the address.
            if is_active && !instance.regions.is_empty() {
                instance.regions.push((base, item.size));
            }
            instance.memory_bytes = instance.memory_bytes.saturating_add(item.size);
        }
    }

    /// Checks that a range is free: a running kernel takes exactly the given range.
    fn check_free_range(&self, base: u64, size: u64, spot: &mut Spot<'_>) {
        let end = u128::from(base) + u128::from(size);
        let mut chunks = self.system.resources.chunks.iter();
        if !chunks.any(|c| c.base <= base && end <= c.end()) {
            let problem = format!("{base:#x} with {size:#x} bytes lies in no chunk of the pool");
            spot.refuse(Rule::MemoryNotFree, problem, "name memory of one chunk");
        }
        let overlaps = |start: u64, bytes: u64| {
            u128::from(start) < end && u128::from(base) < u128::from(start) + u128::from(bytes)
        };
        let mut instances = self.system.instances.iter();
        let user = instances.find(|i| match (i.regions.as_slice(), i.memory_base) {
            ([], Some(start)) => overlaps(start, i.memory_bytes),
            (regions, _) => regions
                .iter()
                .any(|(start, bytes)| overlaps(*start, *bytes)),
        });
        if let Some(user) = user {
            let problem = format!("{} has memory in {base:#x} with {size:#x} bytes", user.name);
            spot.refuse(Rule::MemoryNotFree, problem, "name memory that is free");
        }
    }

    fn take_devices(&mut self, name: &str, items: &[DeviceMove], spot: &mut Spot<'_>) {
        for item in items {
            let address = item.address;
            let Some(instance) = self.system.instance(name) else {
                return;
            };
            let held = instance
                .devices
                .iter()
                .position(|d| self.address_of(d) == Some(address));
            match held {
                Some(at) => {
                    if let Some(instance) = self.instance_mut(name) {
                        instance.devices.remove(at);
                    }
                    self.add_to_pool(address, None);
                }
                None => {
                    let problem = format!("{name} has no device {address}");
                    spot.refuse(Rule::DeviceNotHeld, problem, "take it out of the overlay");
                }
            }
        }
    }

    fn give_devices(&mut self, name: &str, items: &[DeviceMove], spot: &mut Spot<'_>) {
        for item in items {
            let unknown = (Rule::DeviceNotFree, "give it to the pool first");
            self.check_free_device(item, unknown, spot);
            let node = item.address.node_name();
            if let Some(instance) = self.instance_mut(name) {
                instance.devices.push(node);
            }
        }
    }
}
