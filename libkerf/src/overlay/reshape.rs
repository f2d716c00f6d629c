//! Computes the overlay that changes a live pool to match a baseline.

use std::collections::{BTreeMap, HashSet};

use super::{DeviceMove, MemoryMove, NoChange, Operation, Overlay, State, Target};
use crate::model::{Chunk, PciAddress, Resources};

impl State {
    /// Returns the overlay that makes the pool match `wanted`: its CPUs, its devices, and the requested memory of each
    /// NUMA node. Empty if the pool already matches.
    ///
    /// Memory returns to the host in whole chunks, the largest first, and at least the requested memory stays. A chunk
    /// that is in use stays, and all chunks stay while the location of an instance's memory is unknown. A request
    /// without a NUMA node applies to the memory of all nodes that no other request names. A device that an instance
    /// has stays.
    ///
    /// # Errors
    ///
    /// If the kernel would refuse the overlay, for example because an instance has the CPU, or if it cannot be split.
    pub fn reshape(&self, wanted: &Resources) -> Result<Overlay, NoChange> {
        let mut pool = self.pool_cpus(wanted);
        let (takes, gives) = self.pool_memory(wanted);
        if !gives.is_empty() {
            let chunks = gives.iter().map(|chunk| MemoryMove {
                base: Some(chunk.base),
                size: chunk.size,
                ..MemoryMove::default()
            });
            pool.push(Operation::MemoryRemove(chunks.collect()));
        }
        if !takes.is_empty() {
            pool.push(Operation::MemoryAdd(takes));
        }
        pool.extend(self.pool_devices(wanted));
        let fragments = [(Target::Pool, pool)];
        let fragments = fragments.into_iter().filter(|(_, all)| !all.is_empty());
        let overlay = Overlay::new(fragments);
        self.apply(&overlay).map_err(NoChange::Refused)?;
        overlay.split()?;
        Ok(overlay)
    }

    fn pool_cpus(&self, wanted: &Resources) -> Vec<Operation> {
        let there: HashSet<u64> = self.system.resources.cpus.iter().copied().collect();
        let wants: HashSet<u64> = wanted.cpus.iter().copied().collect();
        let gone = self.system.resources.cpus.iter().copied();
        let gone = gone.filter(|cpu| !wants.contains(cpu)).map(Into::into);
        let new = wanted.cpus.iter().copied();
        let new = new.filter(|cpu| !there.contains(cpu)).map(Into::into);
        let mut operations = vec![
            Operation::CpuRemove(gone.collect()),
            Operation::CpuAdd(new.collect()),
        ];
        operations.retain(|operation| match operation {
            Operation::CpuRemove(cpus) | Operation::CpuAdd(cpus) => !cpus.is_empty(),
            _ => true,
        });
        operations
    }

    fn pool_devices(&self, wanted: &Resources) -> Vec<Operation> {
        let addresses = |of: &Resources| -> HashSet<PciAddress> {
            of.devices
                .iter()
                .filter_map(|device| device.pci())
                .collect()
        };
        let (there, wants) = (addresses(&self.system.resources), addresses(wanted));
        let is_lent = |address: &PciAddress| self.holder_of_device(*address).is_some();
        let devices = self.system.resources.devices.iter();
        let gone = devices.filter_map(|device| device.pci());
        let gone = gone.filter(|address| !wants.contains(address) && !is_lent(address));
        let gone: Vec<DeviceMove> = gone.map(Into::into).collect();
        let new = wanted.devices.iter().filter_map(|device| {
            let address = device.pci()?;
            let is_new = !there.contains(&address) && !is_lent(&address);
            is_new.then(|| DeviceMove {
                alias: device.alias.clone(),
                ..DeviceMove::from(address)
            })
        });
        let new: Vec<DeviceMove> = new.collect();
        let mut operations = Vec::new();
        if !gone.is_empty() {
            operations.push(Operation::DeviceRemove(gone));
        }
        if !new.is_empty() {
            operations.push(Operation::DeviceAdd(new));
        }
        operations
    }

    /// Returns the memory to add to the pool, and the chunks to return.
    fn pool_memory(&self, wanted: &Resources) -> (Vec<MemoryMove>, Vec<Chunk>) {
        let mut requests: BTreeMap<Option<u32>, u64> = BTreeMap::new();
        for request in &wanted.requests {
            let all = requests.entry(request.node).or_default();
            *all = all.saturating_add(request.size);
        }
        // The memory of unnamed nodes counts towards the request without a node.
        requests.entry(None).or_default();
        let named: HashSet<u32> = requests.keys().filter_map(|node| *node).collect();
        let of_request = |node: Option<u32>| node.filter(|node| named.contains(node));
        let free = self.free_chunks();
        let (mut takes, mut gives) = (Vec::new(), Vec::new());
        for (node, size) in requests {
            // Requested memory of the pool counts as present.
            let resources = &self.system.resources;
            let chunks = resources.chunks.iter().map(|c| (c.node, c.size));
            let all = chunks.chain(resources.requests.iter().map(|r| (r.node, r.size)));
            let own = all.filter(|(of, _)| of_request(*of) == node);
            let has = own.map(|(_, size)| size).fold(0, u64::saturating_add);
            if size > has {
                takes.push(MemoryMove {
                    size: size - has,
                    node,
                    ..MemoryMove::default()
                });
            }
            let mut surplus = has.saturating_sub(size);
            for chunk in free.iter().filter(|chunk| of_request(chunk.node) == node) {
                if chunk.size <= surplus {
                    surplus -= chunk.size;
                    gives.push(*chunk);
                }
            }
        }
        (takes, gives)
    }

    /// Returns the unused chunks, the largest first.
    fn free_chunks(&self) -> Vec<Chunk> {
        let mut used: Vec<u64> = self.other_uses().map(|(base, _)| base).collect();
        for instance in &self.system.instances {
            match (instance.regions.as_slice(), instance.memory_base) {
                ([], Some(base)) => used.push(base),
                ([], None) if instance.memory_bytes > 0 => return Vec::new(),
                (regions, _) => used.extend(regions.iter().map(|(base, _)| *base)),
            }
            // The location of the rest is unknown.
            if !instance.regions.is_empty() && instance.unplaced_bytes() > 0 {
                return Vec::new();
            }
        }
        used.sort_unstable();
        let is_free = |chunk: &&Chunk| {
            let next = used.partition_point(|base| *base < chunk.base);
            used.get(next)
                .is_none_or(|base| u128::from(*base) >= chunk.end())
        };
        let chunks = self.system.resources.chunks.iter().filter(is_free);
        let mut chunks: Vec<Chunk> = chunks.copied().collect();
        chunks.sort_by_key(|chunk| std::cmp::Reverse(chunk.size));
        chunks
    }
}
