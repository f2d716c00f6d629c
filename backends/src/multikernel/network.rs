//! The network devices of a guest when its next kernel runs in the other kernel instance.
//!
//! The host's kernel names the virtio devices of an instance after the kernel instance: the n-th netdev of `web` is
//! `mk-web-n`, that of `web+b` is `mk-web+b-n` (`mk_vnet_bind` in `drivers/net/mk_vnet.c` of multikernel Linux: the
//! first 9 characters). kerf routes a NIC to a netdev by XDP and pins the route below [`XDP_PINS`]. The kernel never
//! renames a device, and adds none to an instance after its creation. So a kernel instance can take over from the
//! other one only if it has the same devices and routes.

use std::fs;
use std::path::Path;

use libkerf::model::Virtio;

use super::slots::{SlotError, Slots, is_absent};
use crate::contract::SpawnError;

/// Directory in which kerf pins routes.
pub(super) const XDP_PINS: &str = "/sys/fs/bpf/mk";
/// Number of characters of a kernel instance's name in the name of a netdev.
const NAME_CHARACTERS: usize = 9;
/// Virtio's device type of a network card.
const NET: u32 = 1;

/// A kernel instance and its virtio devices.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) name: String,
    pub(super) devices: Vec<Virtio>,
}

impl Slots {
    /// Checks that the kernel instance `own`, which exists if `there` is true and is about to be created otherwise, has
    /// the virtio devices of the other kernel instance of its kmorph instance.
    pub(super) fn keeps_network(
        &self,
        own: &str,
        there: bool,
        other: &str,
        pins: &Path,
    ) -> Result<(), SpawnError> {
        let served = |name: &str| {
            self.served(name).map_err(|error| SpawnError::System {
                what: format!("reading the devices of kernel instance {name:?}"),
                source: std::io::Error::other(error.to_string()),
            })
        };
        let other = served(other)?;
        let own = match there {
            true => served(own)?,
            false => Served {
                name: own.to_owned(),
                devices: Vec::new(),
            },
        };
        takes_over(&own, &other, pins).map_err(SpawnError::Refused)
    }

    /// Returns a kernel instance with the virtio devices with which it was created; without devices if it does not
    /// exist.
    fn served(&self, name: &str) -> Result<Served, SlotError> {
        let devices = match self.kernel.status(name) {
            Err(error) if is_absent(&error) => Vec::new(),
            Err(error) => return Err(error.into()),
            Ok(_) => {
                // The kernel's tree of an instance may lack the devices; its creation has them.
                let shown = self.kernel.instance(name)?.virtio;
                match self.kernel.creation(name)? {
                    Some(creation) if shown.is_empty() => creation.virtio,
                    _ => shown,
                }
            }
        };
        let name = name.to_owned();
        Ok(Served { name, devices })
    }
}

/// Checks that a guest keeps all network devices of `other` in `own`; otherwise returns the reason and a remedy.
fn takes_over(own: &Served, other: &Served, pins: &Path) -> Result<(), String> {
    if other.devices.is_empty() {
        return Ok(());
    }
    let remedy = format!(
        "remove its remains, or create the other one with `kerf create {} --virtio=…` as {} was made",
        own.name, other.name
    );
    if own.devices != other.devices {
        let names: Vec<_> = other
            .devices
            .iter()
            .map(|device| device.name.as_str())
            .collect();
        return Err(format!(
            "kernel instance {:?} has the virtio devices {}, and its guest would lose them in {:?}, since the host's kernel \
             gives none after the creation; {remedy}",
            other.name,
            names.join(", "),
            own.name
        ));
    }
    for (index, device) in other.devices.iter().enumerate() {
        if device.device_id != NET {
            continue;
        }
        let (theirs, ours) = (netdev(&other.name, index), netdev(&own.name, index));
        if theirs == ours {
            return Err(format!(
                "the netdevs of the kernel instances {:?} and {:?} would both be {ours}: the host's kernel takes the first \
                 {NAME_CHARACTERS} characters, and leaves the second one without a network; give the instance a shorter \
                 name",
                other.name, own.name
            ));
        }
        let (route, needed) = (routed(pins, &ours), routed(pins, &theirs));
        if needed.is_some() && route != needed {
            let nic = needed.unwrap_or_default();
            return Err(format!(
                "the netdev {theirs} of the guest is routed to {nic} by XDP, and the one that it would have in {:?}, {ours}, \
                 is not; {remedy}, with net:{nic}",
                own.name
            ));
        }
    }
    Ok(())
}

/// Returns the name of the netdev for the device at this index in an instance's list.
fn netdev(kernel_instance: &str, index: usize) -> String {
    let name: String = kernel_instance.chars().take(NAME_CHARACTERS).collect();
    format!("mk-{name}-{index}")
}

/// Returns the NIC to which a netdev is routed: the only directory in the directory of its pins.
fn routed(pins: &Path, netdev: &str) -> Option<String> {
    let entries = fs::read_dir(pins.join("vnet").join(netdev)).ok()?;
    let mut nics = entries.flatten().filter(|entry| entry.path().is_dir());
    Some(nics.next()?.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(name: &str, kinds: &[u32]) -> Served {
        let device = |(index, kind): (usize, &u32)| Virtio {
            name: format!("device@{index}"),
            device_id: *kind,
            queues: 2,
            queue_size: None,
        };
        Served {
            name: name.to_owned(),
            devices: kinds.iter().enumerate().map(device).collect(),
        }
    }

    #[test]
    fn a_guest_keeps_its_devices_and_their_routes() {
        let pins = tempfile::tempdir().unwrap();
        let says = |own: &Served, other: &Served| takes_over(own, other, pins.path()).err();
        let (web, bare) = (served("web", &[2, 1]), served("web+b", &[]));
        assert_eq!(says(&bare, &served("web", &[])), None);
        assert_eq!(says(&web, &bare), None);
        let lost = says(&bare, &web).unwrap();
        assert!(lost.contains("device@0, device@1"), "{lost}");
        assert!(lost.contains("kerf create web+b --virtio=…"), "{lost}");
        let beside = served("web+b", &[2, 1]);
        assert_eq!(says(&beside, &web), None);
        assert!(says(&served("web+b", &[2, 2]), &web).is_some());

        let route = |netdev: &str, nic: &str| {
            fs::create_dir_all(pins.path().join("vnet").join(netdev).join(nic)).unwrap();
        };
        route("mk-web-1", "enp9s0");
        let cut_off = says(&beside, &web).unwrap();
        assert!(
            cut_off.contains("mk-web-1 of the guest is routed to enp9s0"),
            "{cut_off}"
        );
        assert!(cut_off.contains("mk-web+b-1, is not"), "{cut_off}");
        route("mk-web+b-1", "enp9s0");
        assert_eq!(says(&beside, &web), None);
        // In the other direction a route is added.
        route("mk-db+b-0", "enp9s0");
        assert_eq!(says(&served("db+b", &[1]), &served("db", &[1])), None);
    }

    #[test]
    fn names_that_the_kernel_would_cut_to_the_same_are_refused() {
        let none = Path::new("/nonexistent");
        let two = |name: &str| {
            let (one, other) = (served(name, &[1]), served(&format!("{name}+b"), &[1]));
            takes_over(&other, &one, none)
        };
        assert_eq!(two("eight-ch"), Ok(()));
        let refused = two("nine-char").unwrap_err();
        assert!(refused.contains("mk-nine-char-0"), "{refused}");
    }
}
