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

/// The most bytes of an overlay that the kernel takes in one write. Its limit for an overlay is 1 MiB,
/// but its file system hands on a page at a time, and the rest is cut. [`Overlay::split`] makes such of a
/// larger one.
pub const MAX_OVERLAY_BYTES: usize = 4096;

/// A change, of one or more fragments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Overlay {
    /// Description of the transaction for people, shown in its directory.
    pub note: Option<String>,
    /// In the order in which the kernel runs them.
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
    /// The pool: what is added comes from the host.
    Pool,
    /// The set of instances.
    Instances,
    /// One instance: its new resources come from the pool.
    Instance(String),
}

impl Target {
    /// The target's path.
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
    /// Makes an instance out of what the pool has free.
    Create(Box<Create>),
    /// Removes an instance; its resources return to the pool.
    Remove(String),
    /// Gives memory.
    MemoryAdd(Vec<MemoryMove>),
    /// Takes memory: whole regions of an instance, whole chunks of the pool.
    MemoryRemove(Vec<MemoryMove>),
    /// Gives CPUs.
    CpuAdd(Vec<CpuMove>),
    /// Takes CPUs.
    CpuRemove(Vec<CpuMove>),
    /// Gives devices.
    DeviceAdd(Vec<DeviceMove>),
    /// Takes devices.
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

/// Memory that is given or taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct MemoryMove {
    /// Physical address. None for memory that the pool gets: the kernel picks it.
    pub base: Option<u64>,
    /// Bytes.
    pub size: u64,
    /// NUMA node.
    pub node: Option<u32>,
    /// The kernel's `mem-type`; 0 is none.
    pub kind: u32,
}

/// A CPU that is given or taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct CpuMove {
    /// Physical id.
    pub id: u64,
    /// NUMA node.
    pub node: Option<u32>,
    /// The kernel's flags; 0 is none.
    pub flags: u32,
}

/// A device that is given or taken.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct DeviceMove {
    /// Address of the device.
    pub address: PciAddress,
    /// The driver to bind it to.
    pub driver: Option<String>,
    /// The kernel's flags; 0 is none.
    pub flags: u32,
    /// The name it is to have, when the pool gets it.
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
    /// The node's name.
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

    /// The order in which the kernel runs operations on this target.
    #[must_use]
    pub fn order(target: &Target) -> [&'static str; 8] {
        match target {
            // The pool gives its memory back last: its CPUs rest in it.
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
    /// An overlay of these operations, a fragment for each target, in this order.
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

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.fragments.iter().all(|f| f.operations.is_empty())
    }
}
