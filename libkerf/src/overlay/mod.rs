//! Overlays: changes of a pool and of instances, which the kernel executes in one transaction.
//!
//! A fragment has a target and operations; the kernel executes fragments in the order of their unit addresses and the
//! operations of each in a fixed order, which [`Operation::order`] returns. [`State::apply`] computes the effect of
//! an overlay before it is written.

mod apply;
mod diff;
mod read;
mod reshape;
mod rest;
mod split;
mod state;
mod write;

pub use diff::NoChange;
pub use split::Unsplittable;
pub use state::{State, Status};

use crate::model::{Instance, PciAddress};
use crate::tree::Node;
use serde::{Deserialize, Serialize};

/// Maximum size of an overlay that the kernel accepts in one write, in bytes. Its own limit is 1 MiB, but
/// its file system passes on one page at a time and truncates the rest. [`Overlay::split`] splits a
/// larger overlay.
pub const MAX_OVERLAY_BYTES: usize = 4096;

/// A change, in one or more fragments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Overlay {
    /// Description of the transaction for people, shown in its directory.
    pub note: Option<String>,
    /// Fragments in the order of their execution in the kernel.
    pub fragments: Vec<Fragment>,
}

/// Operations on one target.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Fragment {
    /// The target of the operations.
    pub target: Target,
    /// The operations; the kernel runs them in its own order.
    pub operations: Vec<Operation>,
}

/// The target of a fragment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub enum Target {
    /// The pool: added resources come from the host.
    Pool,
    /// The set of instances.
    Instances,
    /// One instance: its new resources come from the pool.
    Instance(String),
}

impl Target {
    /// Returns the target's path.
    #[must_use]
    pub fn path(&self) -> String {
        match self {
            Target::Pool => "/resources".to_owned(),
            Target::Instances => "/instances".to_owned(),
            Target::Instance(name) => format!("/instances/{name}"),
        }
    }
}

/// One operation, named from the target's point of view.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Operation {
    /// Creates an instance from free resources of the pool.
    Create(Box<Create>),
    /// Removes an instance; its resources return to the pool.
    Remove(String),
    /// Adds memory.
    MemoryAdd(Vec<MemoryMove>),
    /// Removes memory: whole regions of an instance, whole chunks of the pool.
    MemoryRemove(Vec<MemoryMove>),
    /// Adds CPUs.
    CpuAdd(Vec<CpuMove>),
    /// Removes CPUs.
    CpuRemove(Vec<CpuMove>),
    /// Adds devices.
    DeviceAdd(Vec<DeviceMove>),
    /// Removes devices.
    DeviceRemove(Vec<DeviceMove>),
}

/// A new instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Create {
    /// Resources of the new instance. The kernel decides the location of its memory; devices are assigned separately.
    pub instance: Instance,
    /// Host tree for its `/chosen` node.
    pub host_tree: Option<Node>,
    /// Further contents of its node, written back as they were read.
    pub rest: Option<Node>,
}

/// Memory to add or remove.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct MemoryMove {
    /// Physical address; `None` for memory added to the pool, whose address the kernel picks.
    pub base: Option<u64>,
    /// Size in bytes.
    pub size: u64,
    /// NUMA node.
    pub node: Option<u32>,
    /// The kernel's `mem-type`; 0 for none.
    pub kind: u32,
}

/// A CPU to add or remove.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct CpuMove {
    /// Physical id.
    pub id: u64,
    /// NUMA node.
    pub node: Option<u32>,
    /// The kernel's flags; 0 for none.
    pub flags: u32,
}

/// A device to add or remove.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct DeviceMove {
    /// Address of the device.
    pub address: PciAddress,
    /// The driver to bind it to.
    pub driver: Option<String>,
    /// The kernel's flags; 0 for none.
    pub flags: u32,
    /// Its new alias, if it is added to the pool.
    pub alias: Option<String>,
}

impl From<u64> for CpuMove {
    fn from(id: u64) -> Self {
        Self {
            id,
            ..Self::default()
        }
    }
}

impl From<PciAddress> for DeviceMove {
    fn from(address: PciAddress) -> Self {
        Self {
            address,
            driver: None,
            flags: 0,
            alias: None,
        }
    }
}

impl Operation {
    /// Returns the node's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Operation::Create(_) => "instance-create",
            Operation::Remove(_) => "instance-remove",
            Operation::MemoryAdd(_) => "memory-add",
            Operation::MemoryRemove(_) => "memory-remove",
            Operation::CpuAdd(_) => "cpu-add",
            Operation::CpuRemove(_) => "cpu-remove",
            Operation::DeviceAdd(_) => "device-add",
            Operation::DeviceRemove(_) => "device-remove",
        }
    }

    /// Returns the order in which the kernel executes operations on this target.
    #[must_use]
    pub fn order(target: &Target) -> [&'static str; 8] {
        match target {
            // The pool gives back its memory last, because its CPUs are parked in it.
            Target::Pool => [
                "instance-create",
                "cpu-remove",
                "device-remove",
                "memory-remove",
                "memory-add",
                "cpu-add",
                "device-add",
                "instance-remove",
            ],
            _ => [
                "instance-create",
                "memory-remove",
                "memory-add",
                "cpu-remove",
                "cpu-add",
                "device-remove",
                "device-add",
                "instance-remove",
            ],
        }
    }
}

impl Overlay {
    /// Creates an overlay with these operations: one fragment for each target, in this order.
    #[must_use]
    pub fn new(fragments: impl IntoIterator<Item = (Target, Vec<Operation>)>) -> Self {
        let fragments = fragments.into_iter();
        Self {
            note: None,
            fragments: fragments
                .map(|(target, operations)| Fragment { target, operations })
                .collect(),
        }
    }

    /// Returns whether the overlay changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.fragments.iter().all(|f| f.operations.is_empty())
    }
}
