use std::collections::{HashMap, HashSet};

use super::Overlay;
use crate::check::{self, Report};
use crate::machine::{DEFAULT_MEMORY_BLOCK, Machine};
use crate::model::{Instance, PciAddress, System};
use serde::{Deserialize, Serialize};

/// The state of an instance, as in the kernel's status file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub enum Status {
    /// Created without resources. The kernel never shows this status.
    Empty,
    /// The instance has its resources.
    #[default]
    Ready,
    /// A kernel image is loaded.
    Loaded,
    /// Its kernel was started. It does not necessarily run.
    Active,
    /// Something failed.
    Failed,
}

impl Status {
    /// Parses a status without its line end.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text.trim_end_matches('\n') {
            "empty" => Status::Empty,
            "ready" => Status::Ready,
            "loaded" => Status::Loaded,
            "active" => Status::Active,
            "failed" => Status::Failed,
            _ => return None,
        })
    }

    /// Returns the kernel's name for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Empty => "empty",
            Status::Ready => "ready",
            Status::Loaded => "loaded",
            Status::Active => "active",
            Status::Failed => "failed",
        }
    }

    /// Returns whether the kernel refuses to remove an instance with this status.
    #[must_use]
    pub fn has_kernel(self) -> bool {
        matches!(self, Status::Loaded | Status::Active)
    }
}

/// A pool, its instances and their status, to which an overlay is applied.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct State {
    /// Pool and instances. A CPU is free if no instance has it.
    pub system: System,
    /// The status of each instance; an instance that is missing here is ready.
    pub status: HashMap<String, Status>,
    /// The unit in which a running kernel takes and gives memory, bytes.
    pub block: u64,
    /// The host's hardware, to check the resources that it gives.
    pub machine: Option<Machine>,
}

impl State {
    /// Creates a pool and its instances, all without a kernel.
    #[must_use]
    pub fn new(system: System) -> Self {
        Self {
            block: system.resources.granule.unwrap_or(DEFAULT_MEMORY_BLOCK),
            system,
            ..Self::default()
        }
    }

    /// Returns this state on this machine, whose `/proc/iomem` gives the location of the instances' memory.
    #[must_use]
    pub fn on(mut self, machine: &Machine) -> Self {
        if self.system.resources.granule.is_none() {
            self.block = machine.memory_block();
        }
        if let Some(iomem) = machine.iomem() {
            for instance in &mut self.system.instances {
                let regions = instance.id.map(|id| iomem.instance(id, &instance.name));
                instance.regions = regions.unwrap_or_default();
            }
        }
        self.machine = Some(machine.clone());
        self
    }

    /// Returns this state with the status of an instance.
    #[must_use]
    pub fn with_status(mut self, name: &str, status: Status) -> Self {
        self.status.insert(name.to_owned(), status);
        self
    }

    /// Returns the status of an instance.
    #[must_use]
    pub fn status_of(&self, name: &str) -> Status {
        self.status.get(name).copied().unwrap_or_default()
    }

    /// Returns the effect of an overlay on this state.
    ///
    /// # Errors
    ///
    /// Everything that the kernel would refuse. The kernel itself would stop at the first error and leave the earlier
    /// operations in place.
    pub fn apply(&self, overlay: &Overlay) -> Result<State, Report> {
        let mut report = Report::default();
        let mut state = self.clone();
        state.run(overlay, &mut report);
        if report.is_valid() {
            Ok(state)
        } else {
            Err(report)
        }
    }

    /// Returns all errors in this state itself.
    #[must_use]
    pub fn check(&self) -> Report {
        check::assembled(&self.system)
    }

    pub(super) fn instance_mut(&mut self, name: &str) -> Option<&mut Instance> {
        let mut instances = self.system.instances.iter_mut();
        instances.find(|instance| instance.name == name)
    }

    /// Returns the instance that has a CPU.
    pub(super) fn holder_of_cpu(&self, cpu: u64) -> Option<&str> {
        let mut instances = self.system.instances.iter();
        let holder = instances.find(|instance| instance.cpus.contains(&cpu))?;
        Some(&holder.name)
    }

    /// Returns the instance that has a device.
    pub(super) fn holder_of_device(&self, address: PciAddress) -> Option<&str> {
        let has = |instance: &&Instance| self.holds_device(instance, address);
        self.system
            .instances
            .iter()
            .find(has)
            .map(|i| i.name.as_str())
    }

    pub(super) fn holds_device(&self, instance: &Instance, address: PciAddress) -> bool {
        instance
            .devices
            .iter()
            .any(|name| self.address_of(name) == Some(address))
    }

    /// Returns the PCI address of the device to which an instance refers by this name.
    #[must_use]
    pub fn address_of(&self, name: &str) -> Option<PciAddress> {
        let known = self
            .system
            .resources
            .device(name)
            .and_then(|device| device.pci());
        known.or_else(|| PciAddress::parse(name))
    }

    /// Returns the size of the pool's memory that no instance has, on one NUMA node or on all, in bytes.
    #[must_use]
    pub fn free_bytes(&self, node: Option<u32>) -> u128 {
        let resources = &self.system.resources;
        let is_of = |of: Option<u32>| node.is_none() || of.is_none() || of == node;
        let chunks = resources
            .chunks
            .iter()
            .filter(|c| is_of(c.node))
            .map(|c| c.size);
        let requests = resources
            .requests
            .iter()
            .filter(|r| is_of(r.node))
            .map(|r| r.size);
        let pool: u128 = chunks.chain(requests).map(u128::from).sum();
        let instances = self.system.instances.iter();
        let used: u128 = instances.map(|i| self.used_of(i, node)).sum();
        let others = self
            .other_uses()
            .filter(|(base, _)| node.is_none_or(|n| self.is_of_node(*base, n)));
        let others: u128 = others.map(|(_, bytes)| u128::from(bytes)).sum();
        pool.saturating_sub(used).saturating_sub(others)
    }

    /// Returns the memory of the pool that is used but belongs to no instance, from `/proc/iomem`:
    /// the kernel's rings, file systems.
    pub(crate) fn other_uses(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let iomem = self.machine.as_ref().and_then(Machine::iomem);
        let used = iomem.into_iter().flat_map(|iomem| &iomem.used);
        used.filter(|(.., name)| !name.starts_with("mk-instance-"))
            .map(|(base, bytes, _)| (*base, *bytes))
    }

    fn is_of_node(&self, base: u64, node: u32) -> bool {
        let mut chunks = self.system.resources.chunks.iter();
        let within = |c: &&crate::model::Chunk| c.base <= base && u128::from(base) < c.end();
        chunks
            .find(within)
            .and_then(|c| c.node)
            .is_none_or(|there| there == node)
    }

    /// Returns the size of an instance's memory on a NUMA node. If its memory is not placed, all of
    /// it counts for its preferred node.
    fn used_of(&self, instance: &Instance, node: Option<u32>) -> u128 {
        let Some(node) = node else {
            return u128::from(instance.memory_bytes);
        };
        let of_node = |base: u64| self.is_of_node(base, node);
        if let ([], Some(base)) = (instance.regions.as_slice(), instance.memory_base) {
            return match of_node(base) {
                true => u128::from(instance.memory_bytes),
                false => 0,
            };
        }
        let here = instance.regions.iter().filter(|(base, _)| of_node(*base));
        let placed: u128 = here.map(|(_, bytes)| u128::from(*bytes)).sum();
        let asked = instance.numa_nodes.first();
        let unplaced = match asked.is_none_or(|asked| *asked == node) {
            true => instance.unplaced_bytes(),
            false => 0,
        };
        placed + u128::from(unplaced)
    }

    /// Returns the CPUs of the pool that no instance has.
    pub(super) fn free_cpus(&self) -> HashSet<u64> {
        self.system.free_cpus().into_iter().collect()
    }
}
