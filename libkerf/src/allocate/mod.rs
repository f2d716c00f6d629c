//! Chooses resources: CPUs and memory for a new instance next to the existing ones, and the resources that change
//! hands after a morph.
//!
//! The choice is free, has exactly the requested size, and is accepted by [`State::apply`]; otherwise a [`Shortage`]
//! explains why there is none.

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

/// What a new instance is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Its name.
    pub name: String,
    /// Its id; the kernel picks one otherwise.
    pub id: Option<u32>,
    /// How many CPUs.
    pub cpus: usize,
    /// Bytes of memory; a multiple of 4096.
    pub memory: u64,
    /// Where both are to be.
    pub nodes: Nodes,
    /// Whether a core may be shared with another instance.
    pub siblings: Siblings,
}

/// Which NUMA nodes CPUs and memory may be from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Nodes {
    /// One node if there is one that has enough of both; else several.
    #[default]
    PreferOne,
    /// One node, whichever has enough of both.
    One,
    /// This node.
    This(u32),
}

/// What becomes of the SMT siblings of a CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Siblings {
    /// No core is shared with another instance. A sibling that was not asked for stays idle.
    #[default]
    Together,
    /// Siblings may go to other instances.
    Apart,
}

/// Why there is no such choice.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Shortage {
    /// What is asked for makes no instance.
    #[error("{0}")]
    Senseless(&'static str),
    /// An instance has the name.
    #[error("there is an instance {0:?} already")]
    NameTaken(String),
    /// An instance has the id.
    #[error("instance {holder:?} has id {id}")]
    IdTaken {
        /// The id.
        id: u32,
        /// The instance.
        holder: String,
    },
    /// The pool has fewer free CPUs.
    #[error("{wanted} CPUs are wanted; the pool has {free} free")]
    Cpus {
        /// How many are wanted.
        wanted: usize,
        /// How many are free in the pool.
        free: usize,
    },
    /// The pool has enough free CPUs, but some share their core with another instance.
    #[error(
        "{wanted} CPUs are wanted; {usable} of the {free} free ones share no core with another instance"
    )]
    Cores {
        /// How many are wanted.
        wanted: usize,
        /// How many are free and share no core.
        usable: usize,
        /// How many are free.
        free: usize,
    },
    /// The pool has less memory.
    #[error(
        "{wanted} bytes are wanted, and {slack} for the kernel's bookkeeping; the pool has {free} free"
    )]
    Memory {
        /// Bytes that are wanted.
        wanted: u64,
        /// Bytes to be left.
        slack: u64,
        /// Bytes that are free in the pool, without as much for each instance that is there.
        free: u128,
    },
    /// The pool has enough of both, but no NUMA node has.
    #[error("{cpus} CPUs and {memory} bytes are in the pool, but not on {}", match node {
        Some(node) => format!("NUMA node {node}"),
        None => "one NUMA node".to_owned(),
    })]
    Node {
        /// CPUs that are wanted.
        cpus: usize,
        /// Bytes that are wanted.
        memory: u64,
        /// The node that was asked for.
        node: Option<u32>,
    },
}

/// Chooses CPUs and memory for a new instance, and gives the overlay that makes it.
///
/// Where CPUs are comes from `machine`, which must have been read before they left the host: later the
/// host does not know them any more. A CPU that it does not know counts as a core of its own, on no
/// known NUMA node.
///
/// # Errors
///
/// Why there is no such choice.
pub fn instance(state: &State, machine: &Machine, request: &Request) -> Result<Overlay, Shortage> {
    check_request(state, request)?;
    let free = cpus::Free::of(state, machine);
    free.check(request)?;
    check_memory(state, request)?;
    let fits = |node: &u32| {
        // All of the slack may be elsewhere.
        state.free_bytes(Some(*node)) >= u128::from(request.memory)
            && free.usable(request.siblings, Some(*node)) >= request.cpus
    };
    let node = match request.nodes {
        Nodes::This(node) => Some(node).filter(fits),
        // The node that has least besides: the larger ones stay whole for those who need them.
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

/// Whether the pool has the memory, wherever it is: the kernel makes it up of pieces. No tree shows what the kernel's
/// bookkeeping takes, so it is reckoned for each instance that is there.
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

/// Whether the pool says that it has memory of a node. Where it does not say of which its memory is,
/// an instance is not bound to one.
fn has_node(state: &State, node: u32) -> bool {
    let resources = &state.system.resources;
    let chunks = resources.chunks.iter().map(|chunk| chunk.node);
    let mut nodes = chunks.chain(resources.requests.iter().map(|request| request.node));
    nodes.any(|of| of == Some(node))
}
