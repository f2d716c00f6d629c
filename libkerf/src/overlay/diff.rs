//! Computes the overlay that turns one system into another.

use std::collections::{HashMap, HashSet};

use thiserror::Error;

use super::{
    CpuMove, Create, DeviceMove, MemoryMove, Operation, Overlay, State, Status, Target,
    Unsplittable,
};
use crate::allocate::{free_ranges, place};
use crate::check::Report;
use crate::model::{Instance, PAGE_BYTES, PciAddress, Resources, System};

/// Why no overlay can make a change.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum NoChange {
    /// No overlay can change this.
    #[error("no overlay changes the {what} of {name:?}: remove it and create it anew")]
    Fixed {
        /// The instance.
        name: String,
        /// The part that would change.
        what: &'static str,
    },
    /// The device belongs neither to the pool nor to an instance.
    #[error("{0:?} is no device of the pool")]
    Device(String),
    /// Memory leaves an instance in whole regions, the newest first.
    #[error("{name:?} cannot give {bytes} bytes: its newest regions do not add up to it")]
    Regions {
        /// The instance.
        name: String,
        /// Bytes to give.
        bytes: u64,
    },
    /// The location of the instances' memory is unknown.
    #[error("the location of the instances' memory is unknown: read /proc/iomem as root")]
    Unplaced,
    /// The memory is not available, or not in whole blocks.
    #[error("{bytes} bytes are not free in blocks of {block} bytes")]
    Memory {
        /// Requested bytes.
        bytes: u64,
        /// Size of a memory block, bytes.
        block: u64,
    },
    /// The kernel would truncate the overlay, and it cannot be split.
    #[error(transparent)]
    Unsplittable(#[from] Unsplittable),
    /// The kernel would refuse the overlay.
    #[error("the kernel would refuse it:\n{0}")]
    Refused(Report),
}

/// The resources that an instance gives and gets.
#[derive(Default)]
struct Sides {
    gives: Vec<Operation>,
    gets: Vec<Operation>,
}

impl State {
    /// Returns the overlay that turns this system into `after`, and takes the given resources first. Empty if
    /// nothing changes. The order of an instance's CPUs is not a change, because no overlay can affect it.
    ///
    /// # Errors
    ///
    /// Why no overlay can make the change.
    pub fn overlay_to(&self, after: &System) -> Result<Overlay, NoChange> {
        let before: HashMap<&str, &Instance> = by_name(&self.system);
        let wanted: HashMap<&str, &Instance> = by_name(after);
        let mut fragments = Vec::new();
        let gone = self
            .system
            .instances
            .iter()
            .filter(|i| !wanted.contains_key(i.name.as_str()));
        for instance in gone {
            fragments.push((
                Target::Instances,
                vec![Operation::Remove(instance.name.clone())],
            ));
        }
        let (mut giving, mut getting) = (Vec::new(), Vec::new());
        for instance in &after.instances {
            let target = Target::Instance(instance.name.clone());
            match before.get(instance.name.as_str()) {
                Some(there) if *there == instance => {}
                Some(there) => {
                    let sides = self.change_of(there, instance)?;
                    giving.push((target.clone(), sides.gives));
                    getting.push((target, sides.gets));
                }
                None => {
                    let create = Create {
                        instance: instance.clone(),
                        ..Create::default()
                    };
                    getting.push((Target::Instances, vec![Operation::Create(Box::new(create))]));
                    let devices = self.addresses(&instance.devices)?;
                    getting.push((target, device_moves(devices, Operation::DeviceAdd)));
                }
            }
        }
        let pool = pool_change(&self.system.resources, &after.resources);
        fragments.extend(giving);
        fragments.push((Target::Pool, pool));
        fragments.extend(getting);
        fragments.retain(|(_, operations)| !operations.is_empty());
        let overlay = Overlay::new(fragments);
        self.apply(&overlay).map_err(NoChange::Refused)?;
        overlay.split()?;
        Ok(overlay)
    }

    fn change_of(&self, before: &Instance, after: &Instance) -> Result<Sides, NoChange> {
        let fixed = |what| {
            Err(NoChange::Fixed {
                name: after.name.clone(),
                what,
            })
        };
        if after.id.is_some() && after.id != before.id {
            return fixed("id");
        }
        if after.llc_ways != before.llc_ways {
            return fixed("cache ways");
        }
        if after.virtio != before.virtio {
            return fixed("virtio devices");
        }
        let mut sides = Sides::default();
        self.change_memory(before, after, &mut sides)?;
        let (had, has): (HashSet<u64>, HashSet<u64>) = (
            before.cpus.iter().copied().collect(),
            after.cpus.iter().copied().collect(),
        );
        let gone = before.cpus.iter().copied().filter(|cpu| !has.contains(cpu));
        let new = after.cpus.iter().copied().filter(|cpu| !had.contains(cpu));
        sides.gives.extend(cpu_moves(gone, Operation::CpuRemove));
        sides.gets.extend(cpu_moves(new, Operation::CpuAdd));
        let (had, has) = (
            self.addresses(&before.devices)?,
            self.addresses(&after.devices)?,
        );
        let gone = had
            .iter()
            .copied()
            .filter(|device| !has.contains(device))
            .collect();
        let new = has
            .iter()
            .copied()
            .filter(|device| !had.contains(device))
            .collect();
        sides
            .gives
            .extend(device_moves(gone, Operation::DeviceRemove));
        sides.gets.extend(device_moves(new, Operation::DeviceAdd));
        Ok(sides)
    }

    fn change_memory(
        &self,
        before: &Instance,
        after: &Instance,
        sides: &mut Sides,
    ) -> Result<(), NoChange> {
        let name = &before.name;
        if let Some(bytes) = before
            .memory_bytes
            .checked_sub(after.memory_bytes)
            .filter(|b| *b > 0)
        {
            let mut left = bytes;
            let mut taken = Vec::new();
            for (base, size) in before.regions.iter().rev() {
                if left == 0 {
                    break;
                }
                let Some(rest) = left.checked_sub(*size) else {
                    break;
                };
                left = rest;
                taken.push((*base, *size));
            }
            if left > 0 {
                let name = name.clone();
                return Err(NoChange::Regions { name, bytes });
            }
            sides
                .gives
                .push(Operation::MemoryRemove(memory_moves(taken)));
        }
        if let Some(bytes) = after
            .memory_bytes
            .checked_sub(before.memory_bytes)
            .filter(|b| *b > 0)
        {
            let is_active = self.status_of(name) == Status::Active;
            let block = if is_active { self.block } else { PAGE_BYTES };
            let placed = match free_ranges(self) {
                Some(free) => place(&free, bytes, block),
                None if is_active => return Err(NoChange::Unplaced),
                // For an instance that does not run, the kernel uses the size and picks the address.
                None => bytes.is_multiple_of(block).then(|| vec![(0, bytes)]),
            };
            let placed = placed.ok_or(NoChange::Memory { bytes, block })?;
            sides.gets.push(Operation::MemoryAdd(memory_moves(placed)));
        }
        Ok(())
    }

    fn addresses(&self, devices: &[String]) -> Result<Vec<PciAddress>, NoChange> {
        let address = |name: &String| {
            self.address_of(name)
                .ok_or_else(|| NoChange::Device(name.clone()))
        };
        devices.iter().map(address).collect()
    }
}

fn by_name(system: &System) -> HashMap<&str, &Instance> {
    system
        .instances
        .iter()
        .map(|i| (i.name.as_str(), i))
        .collect()
}

fn cpu_moves(
    cpus: impl Iterator<Item = u64>,
    operation: fn(Vec<CpuMove>) -> Operation,
) -> Option<Operation> {
    let moves: Vec<CpuMove> = cpus.map(CpuMove::from).collect();
    (!moves.is_empty()).then(|| operation(moves))
}

fn device_moves(
    devices: Vec<PciAddress>,
    operation: fn(Vec<DeviceMove>) -> Operation,
) -> Vec<Operation> {
    let moves: Vec<DeviceMove> = devices.into_iter().map(DeviceMove::from).collect();
    if moves.is_empty() {
        Vec::new()
    } else {
        vec![operation(moves)]
    }
}

fn memory_moves(ranges: Vec<(u64, u64)>) -> Vec<MemoryMove> {
    let to_move = |(base, size)| MemoryMove {
        base: Some(base),
        size,
        ..MemoryMove::default()
    };
    ranges.into_iter().map(to_move).collect()
}

fn pool_change(before: &Resources, after: &Resources) -> Vec<Operation> {
    let (had, has): (HashSet<u64>, HashSet<u64>) = (
        before.cpus.iter().copied().collect(),
        after.cpus.iter().copied().collect(),
    );
    let gone = before.cpus.iter().copied().filter(|cpu| !has.contains(cpu));
    let new = after.cpus.iter().copied().filter(|cpu| !had.contains(cpu));
    let mut operations: Vec<Operation> = [
        cpu_moves(gone, Operation::CpuRemove),
        cpu_moves(new, Operation::CpuAdd),
    ]
    .into_iter()
    .flatten()
    .collect();
    let chunks = before
        .chunks
        .iter()
        .filter(|chunk| !after.chunks.contains(chunk));
    let chunks: Vec<(u64, u64)> = chunks.map(|chunk| (chunk.base, chunk.size)).collect();
    if !chunks.is_empty() {
        operations.push(Operation::MemoryRemove(memory_moves(chunks)));
    }
    let requests = after
        .requests
        .iter()
        .filter(|request| !before.requests.contains(request));
    let requests: Vec<MemoryMove> = requests
        .map(|request| MemoryMove {
            size: request.size,
            node: request.node,
            ..MemoryMove::default()
        })
        .collect();
    if !requests.is_empty() {
        operations.push(Operation::MemoryAdd(requests));
    }
    let devices =
        |of: &Resources| -> Vec<PciAddress> { of.devices.iter().filter_map(|d| d.pci()).collect() };
    let (had, has) = (devices(before), devices(after));
    let gone = had
        .iter()
        .copied()
        .filter(|device| !has.contains(device))
        .collect();
    operations.extend(device_moves(gone, Operation::DeviceRemove));
    let new: Vec<DeviceMove> = after
        .devices
        .iter()
        .filter_map(|device| Some((device.pci()?, device.alias.clone())))
        .filter(|(address, _)| !had.contains(address))
        .map(|(address, alias)| DeviceMove {
            alias,
            ..DeviceMove::from(address)
        })
        .collect();
    if !new.is_empty() {
        operations.push(Operation::DeviceAdd(new));
    }
    operations
}
