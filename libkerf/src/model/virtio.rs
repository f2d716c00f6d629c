//! Virtio devices of an instance, which the host's kernel serves.

use super::{At, By, Reader};
use crate::check::{Finding, Rule};
use crate::tree::{Node, Property};
use serde::{Deserialize, Serialize};

/// Maximum number of virtio devices per instance in the kernel.
pub const MAX_VIRTIO_DEVICES: usize = 16;

/// Maximum number of queues per virtio device in the kernel.
pub const MAX_VIRTIO_QUEUES: u32 = 8;

/// A virtio device that the host's kernel serves to an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Virtio {
    /// The node's name, such as `net@0`. The number of a network device is that of its netdev on the host.
    pub name: String,
    /// The device's type in the virtio specification: 1 is a network card, 2 a disk.
    pub device_id: u32,
    /// Number of queues, 1 to [`MAX_VIRTIO_QUEUES`].
    pub queues: u32,
    /// Number of entries of each queue (default: the kernel's, 256).
    pub queue_size: Option<u32>,
}

impl Virtio {
    /// Reads `resources/virtio`; `at` is the node `resources`. A device that violates a rule is reported and left out.
    pub(crate) fn read(at: &At<'_>, read: &mut Reader<'_>) -> Vec<Virtio> {
        let Some(devices) = at.child("virtio") else {
            return Vec::new();
        };
        let nodes = devices.node.children();
        if nodes.len() > MAX_VIRTIO_DEVICES {
            let problem = format!("{} virtio devices", nodes.len());
            let advice = format!("the kernel takes at most {MAX_VIRTIO_DEVICES}");
            read.push(Finding::new(Rule::Virtio, devices.path(), problem, advice));
        }
        let mut found: Vec<Virtio> = Vec::new();
        for node in nodes.iter().take(MAX_VIRTIO_DEVICES) {
            let at = devices.enter(node);
            let Some(device) = Virtio::read_one(&at, read) else {
                continue;
            };
            if found.iter().any(|there| there.name == device.name) {
                let problem = "another virtio device has this name";
                let advice = "number them, as in net@0, net@1";
                read.push(Finding::new(Rule::Virtio, at.path(), problem, advice));
                continue;
            }
            found.push(device);
        }
        found
    }

    fn read_one(at: &At<'_>, read: &mut Reader<'_>) -> Option<Virtio> {
        let device_id = read.u32(at, "device-id", By::Kernel);
        let queues = read.u32(at, "queues", By::Kernel);
        let queue_size = read.u32(at, "queue-size", By::Kernel);
        let (Some(device_id), Some(queues @ 1..=MAX_VIRTIO_QUEUES)) = (device_id, queues) else {
            let problem = "a virtio device needs device-id and queues";
            let advice = format!("add both, queues from 1 to {MAX_VIRTIO_QUEUES}");
            read.push(Finding::new(Rule::Virtio, at.path(), problem, advice));
            return None;
        };
        Some(Virtio {
            name: at.node.name().to_owned(),
            device_id,
            queues,
            queue_size,
        })
    }

    /// Replaces the devices in the node `resources` by these. Other contents of a device's node are kept.
    pub(crate) fn write(devices: &[Virtio], resources: &mut Node) {
        if devices.is_empty() {
            while resources.remove_child("virtio").is_some() {}
            return;
        }
        let node = resources.child_or_new("virtio");
        node.children_mut()
            .retain(|child| devices.iter().any(|device| device.name == child.name()));
        for device in devices {
            let known = node.children_mut();
            let at = known.iter().position(|child| child.name() == device.name);
            let at = at.unwrap_or_else(|| {
                known.push(Node::new(device.name.as_str()));
                known.len() - 1
            });
            let child = &mut known[at];
            child.set(Property::new("device-id", device.device_id.to_be_bytes()));
            child.set(Property::new("queues", device.queues.to_be_bytes()));
            match device.queue_size {
                Some(size) => child.set(Property::new("queue-size", size.to_be_bytes())),
                None => drop(child.remove_property("queue-size")),
            }
        }
    }
}
