//! The meaning of trees: resources, devices, instances. Reading is lenient, so that all errors can be reported at
//! once: unreadable parts are reported and left out.

mod device;
mod instance;
mod pci;
mod reader;
mod request;
mod resources;
mod system;
mod virtio;
mod write;

pub use device::{Device, DeviceKind};
pub use instance::{Instance, Uring};
pub use pci::PciAddress;
pub use request::NoRequest;
pub use resources::{Chunk, MemoryRequest, NumaNode, Resources};
pub use system::{DeviceReference, Kind, System};
pub use virtio::{MAX_VIRTIO_DEVICES, MAX_VIRTIO_QUEUES, Virtio};

pub(crate) use device::pci_address;
pub(crate) use reader::{At, By, Reader, list};
pub(crate) use resources::{check_size, numa_node_id};

/// The unit of memory allocation of the kernel, in bytes. Multikernel Linux runs on 4 KiB pages.
pub const PAGE_BYTES: u64 = 4096;

/// Limit of NUMA node numbers in x86 kernels of distributions.
pub const MAX_NUMA_NODES: u32 = 1024;

/// No NUMA node: the kernel's `NUMA_NO_NODE` as a cell.
pub(crate) const NO_NODE: u32 = u32::MAX;
