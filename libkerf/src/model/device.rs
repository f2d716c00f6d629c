use super::pci::{self, PciAddress};
use super::{At, By, Reader};
use crate::check::{Finding, Rule, Stance};
use serde::{Deserialize, Serialize};

/// A device that the pool has or requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Device {
    /// The node's name, to which instances refer.
    pub name: String,
    /// Kind of the device.
    pub kind: DeviceKind,
    /// A name from `/aliases`, which stays the same wherever the device is.
    pub alias: Option<String>,
    /// Virtual functions for instances.
    pub functions: Option<Vec<u32>>,
    /// NVMe namespaces for instances.
    pub namespaces: Option<Vec<u32>>,
}

/// The kind of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum DeviceKind {
    /// A PCI device.
    Pci(PciAddress),
    /// A platform device: its name, or the node's name.
    Platform(String),
    /// Another kind, or unreadable: the kernel skips the device.
    #[default]
    Other,
}

impl Device {
    /// Returns the PCI address.
    #[must_use]
    pub fn pci(&self) -> Option<PciAddress> {
        match self.kind {
            DeviceKind::Pci(address) => Some(address),
            _ => None,
        }
    }

    /// Returns whether an instance's `reference` means this device: its node's name, its alias or its address.
    #[must_use]
    pub fn is_called(&self, reference: &str) -> bool {
        self.name == reference
            || self.alias.as_deref() == Some(reference)
            || (self.pci().is_some() && PciAddress::parse(reference) == self.pci())
    }

    /// Reads the devices in `resources/devices`.
    pub(super) fn read_all(resources: &At<'_>, read: &mut Reader<'_>) -> Vec<Device> {
        let Some(devices) = resources.child("devices") else {
            return Vec::new();
        };
        devices
            .node
            .children()
            .iter()
            .map(|node| Device::read(&devices.enter(node), read))
            .collect()
    }

    fn read(at: &At<'_>, read: &mut Reader<'_>) -> Device {
        let kind = match read.text(at, "device-type", By::Kerf) {
            Some("pci") => Device::read_pci(at, read),
            Some("platform") => {
                let name = read.text(at, "device-name", By::Kerf);
                DeviceKind::Platform(name.unwrap_or(at.node.name()).to_owned())
            }
            other => {
                let problem = match other {
                    Some(other) => {
                        format!("the kernel skips it: it knows no device-type {other:?}")
                    }
                    None => "the kernel skips it: it has no device-type".to_owned(),
                };
                let advice = "set device-type to \"pci\" or \"platform\"";
                let finding = Finding::new(Rule::DeviceType, at.path(), problem, advice);
                read.push(finding.of("device-type"));
                // kerf still identifies it by its address.
                let address = read
                    .text(at, "pci-id", By::Kerf)
                    .and_then(PciAddress::parse);
                address.map_or(DeviceKind::Other, DeviceKind::Pci)
            }
        };
        check_forms(at, read);
        Device {
            name: at.node.name().to_owned(),
            kind,
            alias: None,
            functions: read.u32_list(at, "available-vfs", By::Kerf),
            namespaces: read.u32_list(at, "available-ns", By::Kerf),
        }
    }

    fn read_pci(at: &At<'_>, read: &mut Reader<'_>) -> DeviceKind {
        for name in ["pci-id", "vendor-id", "device-id"] {
            if at.node.property(name).is_none() {
                let problem = "a PCI device needs pci-id, vendor-id and device-id";
                let advice = format!("add {name}; lspci -nn -D shows it");
                let finding = Finding::new(Rule::PciIncomplete, at.path(), problem, advice);
                read.push(finding.of(name));
            }
        }
        let Some(text) = read.text(at, "pci-id", By::Kerf) else {
            return DeviceKind::Other;
        };
        match pci_address(at, text, read) {
            Some(address) => DeviceKind::Pci(address),
            None => DeviceKind::Other,
        }
    }

    /// Reads the devices on the PCI buses that the kernel describes at the root.
    pub(super) fn read_buses(root: &At<'_>, read: &mut Reader<'_>) -> Vec<Device> {
        let mut devices = Vec::new();
        for node in root.node.children() {
            let at = root.enter(node);
            if read.text(&at, "compatible", By::Kerf) == Some("multikernel,pci-host-bridge") {
                let domain = read.u32(&at, "linux,pci-domain", By::Kerf).unwrap_or(0);
                let domain = u16::try_from(domain).unwrap_or(u16::MAX);
                Device::read_bus(&at, domain, read, &mut devices);
            }
        }
        devices
    }

    fn read_bus(bus: &At<'_>, domain: u16, read: &mut Reader<'_>, devices: &mut Vec<Device>) {
        for node in bus.node.children() {
            let at = bus.enter(node);
            let Some(reg) = read.u32_list(&at, "reg", By::Kerf) else {
                continue;
            };
            let Some(cell) = reg.first() else { continue };
            if node.property("vendor-id").is_none() {
                Device::read_bus(&at, domain, read, devices);
                continue;
            }
            let address = PciAddress::from_cell(domain, *cell);
            devices.push(Device {
                name: address.node_name(),
                kind: DeviceKind::Pci(address),
                ..Device::default()
            });
            check_forms(&at, read);
            for name in ["device-type", "pci-id"] {
                read.text(&at, name, By::Kerf);
            }
            for name in ["available-vfs", "available-ns"] {
                read.u32_list(&at, name, By::Kerf);
            }
        }
    }
}

/// Reads the properties that kerf reads of each device, only to check their format.
fn check_forms(at: &At<'_>, read: &mut Reader<'_>) {
    for name in ["compatible", "device-name"] {
        read.text(at, name, By::Kerf);
    }
    for name in ["vendor-id", "device-id"] {
        read.u32(at, name, By::Both);
    }
    for name in [
        "sriov-vfs",
        "host-reserved-vf",
        "namespaces",
        "host-reserved-ns",
    ] {
        read.u32(at, name, By::Kerf);
    }
}

/// Returns the PCI address in a property; reports an invalid one.
pub(crate) fn pci_address(at: &At<'_>, text: &str, read: &mut Reader<'_>) -> Option<PciAddress> {
    let address = PciAddress::parse(text);
    if address.is_none() {
        let kernel = match pci::is_taken_by_kernel(text) {
            true => Stance::Takes,
            false => Stance::Refuses,
        };
        let problem = format!("{text:?} is not a PCI address");
        let advice = "write domain:bus:slot.function in hexadecimal, such as 0000:09:00.0";
        let finding = Finding::new(Rule::PciFormat, at.path(), problem, advice);
        read.push(finding.of("pci-id").judged(kernel, Stance::Takes));
    }
    address
}
