//! Chooses resources: CPUs and memory for a new instance next to the existing ones, and the resources that change
//! hands after a morph.
//!
//! The chosen resources are free, have exactly the requested size, and are accepted by [`State::apply`]; otherwise a
//! [`Shortage`] gives the reason.

mod cpus;
mod exchange;
mod memory;

pub use exchange::{Exchange, Handover, NoExchange, plan};
pub use memory::{free_ranges, place};

use thiserror::Error;

use crate::check::SLACK_BYTES;
use crate::machine::Machine;
use crate::model::{Instance, PAGE_BYTES};
use crate::overlay::{Create, Operation, Overlay, State, Target};

/// Requested resources of a new instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Its name.
    pub name: String,
    /// Its id; the kernel picks one if absent.
    pub id: Option<u32>,
    /// Number of CPUs.
    pub cpus: usize,
    /// Memory in bytes, a multiple of 4096.
    pub memory: u64,
    /// The permitted NUMA nodes.
    pub nodes: Nodes,
    /// Whether a core may be shared with another instance.
    pub siblings: Siblings,
}

/// The NUMA nodes from which CPUs and memory may come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Nodes {
    /// One node if a node has enough of both; otherwise several nodes.
    #[default]
    PreferOne,
    /// Any single node that has enough of both.
    One,
    /// This node.
    This(u32),
}

/// The use of a CPU's SMT siblings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Siblings {
    /// No core is shared with another instance. A sibling that was not requested stays idle.
    #[default]
    Together,
    /// Siblings may go to other instances.
    Apart,
}

/// Why the resources cannot be chosen.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Shortage {
    /// An instance with this request is impossible.
    #[error("{0}")]
    Senseless(&'static str),
    /// The name is in use.
    #[error("there is an instance {0:?} already")]
    NameTaken(String),
    /// The id is in use.
    #[error("instance {holder:?} has id {id}")]
    IdTaken {
        /// The id.
        id: u32,
        /// The instance.
        holder: String,
    },
    /// The pool has too few free CPUs.
    #[error("{wanted} CPUs are wanted; the pool has {free} free")]
    Cpus {
        /// Requested CPUs.
        wanted: usize,
        /// Free CPUs in the pool.
        free: usize,
    },
    /// The pool has enough free CPUs, but some share their core with another instance.
    #[error(
        "{wanted} CPUs are wanted; {usable} of the {free} free ones share no core with another instance"
    )]
    Cores {
        /// Requested CPUs.
        wanted: usize,
        /// Free CPUs that share no core.
        usable: usize,
        /// Free CPUs.
        free: usize,
    },
    /// The pool has too little memory.
    #[error(
        "{wanted} bytes are wanted, and {slack} for the kernel's bookkeeping; the pool has {free} free"
    )]
    Memory {
        /// Requested bytes.
        wanted: u64,
        /// Bytes reserved for the kernel's bookkeeping.
        slack: u64,
        /// Free bytes in the pool, less the reserve of each existing instance.
        free: u128,
    },
    /// The pool has enough of both, but no NUMA node has.
    #[error("{cpus} CPUs and {memory} bytes are in the pool, but not on {}", match node {
        Some(node) => format!("NUMA node {node}"),
        None => "one NUMA node".to_owned(),
    })]
    Node {
        /// Requested CPUs.
        cpus: usize,
        /// Requested bytes.
        memory: u64,
        /// The requested node.
        node: Option<u32>,
    },
}

/// Chooses CPUs and memory for a new instance. Returns the overlay that creates it.
///
/// `machine` gives the location of CPUs. It must have been read before the CPUs left the host, which
/// does not know them afterwards. A CPU that is unknown to `machine` counts as a separate core on an
/// unknown NUMA node.
///
/// # Errors
///
/// Why the resources cannot be chosen.
pub fn instance(state: &State, machine: &Machine, request: &Request) -> Result<Overlay, Shortage> {
    check_request(state, request)?;
    let free = cpus::Free::of(state, machine);
    free.check(request)?;
    check_memory(state, request)?;
    let fits = |node: &u32| {
        // The reserve may be on other nodes.
        state.free_bytes(Some(*node)) >= u128::from(request.memory)
            && free.usable(request.siblings, Some(*node)) >= request.cpus
    };
    let node = match request.nodes {
        Nodes::This(node) => Some(node).filter(fits),
        // Choose the node with the fewest usable CPUs, so that larger nodes stay whole for larger requests.
        _ => free
            .nodes()
            .into_iter()
            .filter(fits)
            .min_by_key(|node| (free.usable(request.siblings, Some(*node)), *node)),
    };
    let memory_node = match (node, request.nodes) {
        (Some(node), _) => has_node(state, node).then_some(node),
        (None, Nodes::PreferOne) => None,
        (None, nodes) => {
            return Err(Shortage::Node {
                cpus: request.cpus,
                memory: request.memory,
                node: match nodes {
                    Nodes::This(node) => Some(node),
                    _ => None,
                },
            });
        }
    };
    let cpus = free.choose(request.cpus, request.siblings, node);
    let instance = Instance {
        name: request.name.clone(),
        id: request.id,
        cpus,
        memory_bytes: request.memory,
        numa_nodes: memory_node.into_iter().collect(),
        ..Instance::default()
    };
    let create = Create {
        instance,
        ..Create::default()
    };
    let operation = Operation::Create(Box::new(create));
    Ok(Overlay::new([(Target::Instances, vec![operation])]))
}

/// Checks whether the pool has the memory on any nodes: the kernel assembles it from pieces. No tree shows the
/// kernel's bookkeeping memory, so it is estimated per existing instance.
fn check_memory(state: &State, request: &Request) -> Result<(), Shortage> {
    let slack = u128::from(SLACK_BYTES);
    let kept = slack * state.system.instances.len() as u128;
    let free = state.free_bytes(None).saturating_sub(kept);
    if u128::from(request.memory) + slack > free {
        return Err(Shortage::Memory {
            wanted: request.memory,
            slack: SLACK_BYTES,
            free,
        });
    }
    Ok(())
}

fn check_request(state: &State, request: &Request) -> Result<(), Shortage> {
    if request.cpus == 0 {
        return Err(Shortage::Senseless("an instance needs at least one CPU"));
    }
    if request.memory == 0 || !request.memory.is_multiple_of(PAGE_BYTES) {
        let message = "an instance needs memory, in multiples of 4096 bytes";
        return Err(Shortage::Senseless(message));
    }
    if state.system.instance(&request.name).is_some() {
        return Err(Shortage::NameTaken(request.name.clone()));
    }
    let holder = state
        .system
        .instances
        .iter()
        .find(|i| i.id == request.id && i.id.is_some());
    match (holder, request.id) {
        (Some(holder), Some(id)) => Err(Shortage::IdTaken {
            id,
            holder: holder.name.clone(),
        }),
        _ => Ok(()),
    }
}

/// Returns whether the pool is known to have memory of a node. If the nodes of the pool's memory
/// are unknown, an instance is not bound to a node.
fn has_node(state: &State, node: u32) -> bool {
    let resources = &state.system.resources;
    let chunks = resources.chunks.iter().map(|chunk| chunk.node);
    let mut nodes = chunks.chain(resources.requests.iter().map(|request| request.node));
    nodes.any(|of| of == Some(node))
}
