use std::collections::{BTreeMap, HashMap};

use super::{Request, Shortage, Siblings};
use crate::machine::Machine;
use crate::overlay::State;

/// A core of the machine; a CPU that is unknown to the machine counts as a separate core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum CoreId {
    Known { node: u32, package: u32, core: u32 },
    Unknown(u64),
}

#[derive(Debug, Default)]
struct Core {
    free: Vec<u64>,
    /// Number of siblings that belong to instances.
    held: usize,
    /// Number of siblings that belong to the host.
    host: usize,
}

/// The free CPUs of a pool, by core.
pub(super) struct Free {
    cores: BTreeMap<CoreId, Core>,
}

impl Free {
    pub(super) fn of(state: &State, machine: &Machine) -> Self {
        let id_of = |cpu: u64| match machine.cpu(cpu) {
            Some(place) => CoreId::Known {
                node: place.node,
                package: place.package,
                core: place.core,
            },
            None => CoreId::Unknown(cpu),
        };
        let mut cores: BTreeMap<CoreId, Core> = BTreeMap::new();
        let mut in_pool: HashMap<u64, ()> = HashMap::new();
        for cpu in state.system.free_cpus() {
            if in_pool.insert(cpu, ()).is_none() {
                cores.entry(id_of(cpu)).or_default().free.push(cpu);
            }
        }
        for instance in &state.system.instances {
            for cpu in &instance.cpus {
                if in_pool.insert(*cpu, ()).is_none() {
                    cores.entry(id_of(*cpu)).or_default().held += 1;
                }
            }
        }
        let pool = &state.system.resources.cpus;
        for cpu in machine.cpus().filter(|cpu| !pool.contains(&cpu.id)) {
            if let Some(core) = cores.get_mut(&id_of(cpu.id)) {
                core.host += 1;
            }
        }
        for core in cores.values_mut() {
            core.free.sort_unstable();
        }
        Self { cores }
    }

    /// Checks whether the pool has enough free CPUs on any node.
    pub(super) fn check(&self, request: &Request) -> Result<(), Shortage> {
        let free: usize = self.cores.values().map(|core| core.free.len()).sum();
        if request.cpus > free {
            return Err(Shortage::Cpus {
                wanted: request.cpus,
                free,
            });
        }
        let usable = self.usable(request.siblings, None);
        if request.cpus > usable {
            return Err(Shortage::Cores {
                wanted: request.cpus,
                usable,
                free,
            });
        }
        Ok(())
    }

    /// Returns the number of CPUs that may be chosen, on one NUMA node or on all.
    pub(super) fn usable(&self, siblings: Siblings, node: Option<u32>) -> usize {
        let cores = self.of_node(siblings, node);
        cores.map(|(_, core)| core.free.len()).sum()
    }

    /// Returns the NUMA nodes that have free CPUs.
    pub(super) fn nodes(&self) -> Vec<u32> {
        let mut nodes: Vec<u32> = self
            .cores
            .keys()
            .filter_map(|id| match id {
                CoreId::Known { node, .. } => Some(*node),
                CoreId::Unknown(_) => None,
            })
            .collect();
        nodes.dedup();
        nodes
    }

    fn of_node(
        &self,
        siblings: Siblings,
        node: Option<u32>,
    ) -> impl Iterator<Item = (&CoreId, &Core)> {
        self.cores.iter().filter(move |(id, core)| {
            let is_of_node = match (node, id) {
                (None, _) => true,
                (Some(wanted), CoreId::Known { node, .. }) => *node == wanted,
                (Some(_), CoreId::Unknown(_)) => false,
            };
            let may_be_used = siblings == Siblings::Apart || core.held == 0;
            is_of_node && may_be_used && !core.free.is_empty()
        })
    }

    /// Chooses CPUs: whole cores first, cores without CPUs of the host first, neighbours together. The
    /// caller has checked that there are enough.
    pub(super) fn choose(&self, wanted: usize, siblings: Siblings, node: Option<u32>) -> Vec<u64> {
        let mut cores: Vec<(&CoreId, &Core)> = self.of_node(siblings, node).collect();
        // A core that is shared with another instance or the host comes last.
        cores.sort_by_key(|(id, core)| (core.held + core.host > 0, **id));
        let mut chosen = Vec::with_capacity(wanted);
        let mut left = Vec::new();
        for (_, core) in cores {
            if chosen.len() + core.free.len() <= wanted {
                chosen.extend_from_slice(&core.free);
            } else {
                left.push(core);
            }
        }
        // The remaining number fills none of these cores: split the smallest one first.
        left.sort_by_key(|core| core.free.len());
        for core in left {
            let missing = wanted - chosen.len();
            chosen.extend(core.free.iter().take(missing));
        }
        chosen.sort_unstable();
        chosen
    }
}
