//! Machines, pools and instances for allocations.

use std::collections::{BTreeMap, BTreeSet};

use libkerf::allocate::{Request, Siblings};
use libkerf::machine::{Cpu, Iomem, Machine};
use libkerf::model::{Chunk, Instance, Resources, System};
use libkerf::overlay::State;
use proptest::prelude::*;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const BLOCK: u64 = 128 * MIB;
pub(crate) const RINGS: u64 = 65 * 4096;

/// A machine, a pool and instances. CPU IDs have gaps, like APIC IDs.
#[derive(Debug, Clone)]
pub(crate) struct Ground {
    pub(crate) machine: Machine,
    pub(crate) state: State,
}

/// Returns a strategy that assigns each CPU to the host (0), the pool (1, free) or an instance (2…).
pub(crate) fn ground() -> impl Strategy<Value = Ground> {
    let shape = (1_u32..4, 1_u32..5, 1_u32..4);
    shape.prop_flat_map(|(nodes, cores, threads)| {
        let count = (nodes * cores * threads) as usize;
        let owners = prop::collection::vec(
            prop_oneof![1 => Just(0), 4 => Just(1), 2 => 2..5_usize],
            count,
        );
        let memory = prop::collection::vec(0_u64..6, 3);
        let sizes = prop::collection::vec(1_u64..20, nodes as usize);
        (owners, memory, sizes).prop_map(move |(owners, memory, sizes)| {
            build(cores, threads, &owners, &memory, &sizes)
        })
    })
}

pub(crate) fn build(
    cores: u32,
    threads: u32,
    owners: &[usize],
    memory: &[u64],
    sizes: &[u64],
) -> Ground {
    let cpus: Vec<Cpu> = (0..u32::try_from(owners.len()).unwrap())
        .map(|n| Cpu {
            id: u64::from(n / threads) * 8 + u64::from(n % threads),
            logical: Some(n),
            node: n / (cores * threads),
            package: 0,
            core: n / threads,
        })
        .collect();
    let owned = |owner: usize| {
        let pairs = cpus.iter().zip(owners);
        pairs
            .filter(move |(_, o)| **o == owner)
            .map(|(cpu, _)| cpu.id)
            .collect::<Vec<u64>>()
    };
    let pool = cpus
        .iter()
        .zip(owners)
        .filter(|(_, owner)| **owner > 0)
        .map(|(cpu, _)| cpu.id);
    let chunks: Vec<Chunk> = sizes
        .iter()
        .zip(1_u64..)
        .map(|(size, n)| Chunk {
            base: n << 40,
            size: size * BLOCK,
            node: u32::try_from(n - 1).ok(),
        })
        .collect();
    let iomem = Iomem {
        chunks: chunks.iter().map(|c| (c.base, c.size)).collect(),
        // The kernel's rings, at the end of each chunk.
        used: chunks
            .iter()
            .map(|c| (c.base + c.size - RINGS, RINGS, "mk-rings".to_owned()))
            .collect(),
    };
    // Memory of instances fills the chunks from below, block by block, except the last block.
    let mut blocks = chunks
        .iter()
        .flat_map(|c| (0..c.size / BLOCK - 1).map(move |n| c.base + n * BLOCK));
    let instances: Vec<Instance> = (2..5_usize)
        .map(|owner| {
            let wanted = usize::try_from(memory[owner - 2]).unwrap();
            let regions: Vec<(u64, u64)> = blocks
                .by_ref()
                .take(wanted)
                .map(|base| (base, BLOCK))
                .collect();
            Instance {
                name: format!("i{owner}"),
                id: u32::try_from(owner).ok(),
                cpus: owned(owner),
                memory_base: regions.first().map(|(base, _)| *base),
                memory_bytes: regions.len() as u64 * BLOCK,
                regions,
                ..Instance::default()
            }
        })
        .collect();
    let system = System {
        resources: Resources {
            cpus: pool.collect(),
            chunks,
            ..Resources::default()
        },
        instances,
        ..System::default()
    };
    let machine = Machine::new(cpus).with_iomem(iomem);
    let mut state = State::new(system);
    state.block = BLOCK;
    state.machine = Some(machine.clone());
    Ground { machine, state }
}

pub(crate) fn plain_ground() -> Ground {
    // Two NUMA nodes, each with two cores of two threads; the first instance has half a core.
    build(2, 2, &[2, 1, 1, 1, 1, 1, 1, 1], &[1, 0, 0], &[8, 8])
}

/// The available resources, counted from the test's own assignment and not as the allocator counts.
pub(crate) struct Count {
    pub(crate) free: usize,
    /// By NUMA node: the free CPUs on cores without any CPU of an instance, and all free CPUs.
    pub(crate) by_node: BTreeMap<u32, (usize, usize)>,
    pub(crate) free_memory: u64,
    pub(crate) memory_by_node: BTreeMap<u32, u64>,
}

pub(crate) fn count(ground: &Ground) -> Count {
    let system = &ground.state.system;
    let held: BTreeSet<u64> = system
        .instances
        .iter()
        .flat_map(|i| i.cpus.iter().copied())
        .collect();
    let mut count = Count {
        free: 0,
        by_node: BTreeMap::new(),
        free_memory: 0,
        memory_by_node: BTreeMap::new(),
    };
    for cpu in &system.resources.cpus {
        if held.contains(cpu) {
            continue;
        }
        let place = ground.machine.cpu(*cpu).unwrap();
        let shared = ground
            .machine
            .cpus()
            .any(|c| c.core == place.core && held.contains(&c.id));
        let node = count.by_node.entry(place.node).or_default();
        node.0 += usize::from(!shared);
        node.1 += 1;
        count.free += 1;
    }
    for chunk in &system.resources.chunks {
        let regions = system.instances.iter().flat_map(|i| &i.regions);
        let used: u64 = regions
            .filter(|(base, _)| base >> 40 == chunk.base >> 40)
            .map(|(_, size)| size)
            .sum();
        count
            .memory_by_node
            .insert(chunk.node.unwrap(), chunk.size - used - RINGS);
        count.free_memory += chunk.size - used - RINGS;
    }
    count
}

impl Count {
    pub(crate) fn usable(&self, siblings: Siblings, node: Option<u32>) -> usize {
        let nodes = self
            .by_node
            .iter()
            .filter(|(n, _)| node.is_none_or(|node| node == **n));
        nodes
            .map(|(_, (unshared, all))| match siblings {
                Siblings::Together => *unshared,
                Siblings::Apart => *all,
            })
            .sum()
    }

    pub(crate) fn node_has(&self, request: &Request, node: u32) -> bool {
        let memory = self.memory_by_node.get(&node).copied().unwrap_or(0);
        self.usable(request.siblings, Some(node)) >= request.cpus && memory >= request.memory
    }

    pub(crate) fn some_node_has(&self, request: &Request) -> bool {
        self.by_node
            .keys()
            .any(|node| self.node_has(request, *node))
    }
}
