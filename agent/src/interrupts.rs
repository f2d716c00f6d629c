//! Which CPU of a guest handles the interrupts of vsock: the one on which the agent answers ([`crate::priority`]).
//!
//! Linux spreads the vectors of its devices over the CPUs (`irq_matrix_alloc`). If a CPU hangs that takes those of vsock, no
//! heartbeat comes through, whatever the agent does. On the agent's own CPU they add no second one to depend on.
//! A program of the guest that moves interrupts, such as irqbalance, may move these again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Directories of the drivers that carry vsock, below `/sys/bus`.
const DRIVERS: [&str; 2] = [
    "virtio/drivers/vmw_vsock_virtio_transport",
    "pci/drivers/kerf-vsock",
];
/// Interrupts of one device that are directed; those of a device with more stay where they are.
const INTERRUPTS_MAX: usize = 2048;

/// Directs the interrupts of vsock's devices to `cpu`. `sysfs` and `procfs` are where `/sys` and `/proc` are.
/// Returns how many were directed.
///
/// # Errors
/// The last that the system refused; the others are directed nevertheless. A device that has no vectors of its own, such as
/// one without MSI, is no error.
pub fn direct_vsock_to(cpu: usize, sysfs: &Path, procfs: &Path) -> io::Result<usize> {
    let mut directed = 0;
    let mut refused = Ok(());
    let devices = DRIVERS.iter().flat_map(|driver| {
        let driver = sysfs.join("bus").join(driver);
        entries(&driver).filter_map(|entry| pci_function(&entry))
    });
    for device in devices {
        for interrupt in entries(&device.join("msi_irqs")).take(INTERRUPTS_MAX) {
            let Some(number) = interrupt.file_name() else {
                continue;
            };
            let affinity = procfs.join("irq").join(number).join("smp_affinity_list");
            match fs::write(&affinity, cpu.to_string()) {
                Ok(()) => directed += 1,
                Err(error) => refused = Err(error),
            }
        }
    }
    refused.map(|()| directed)
}

/// The PCI function of a device that a driver has bound: the device, or for one of virtio's the parent.
fn pci_function(bound: &Path) -> Option<PathBuf> {
    let device = fs::canonicalize(bound).ok()?;
    let own = device.join("msi_irqs");
    if own.is_dir() {
        return Some(device);
    }
    device.parent().map(Path::to_owned)
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let read = fs::read_dir(dir).into_iter().flatten().flatten();
    read.map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// The interrupts of a guest with a device of each driver, and of one disk.
    fn guest() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let make = |path: &str| fs::create_dir_all(at(path)).unwrap();
        for driver in DRIVERS {
            make(&format!("sys/bus/{driver}"));
        }
        make("sys/devices/0000:00:02.0/virtio0");
        make("sys/devices/0000:00:03.0/virtio1");
        for (device, numbers) in [("02.0", [25, 26]), ("03.0", [27, 28]), ("04.0", [29, 30])] {
            let vectors = format!("sys/devices/0000:00:{device}/msi_irqs");
            make(&vectors);
            for number in numbers {
                fs::write(at(&vectors).join(number.to_string()), "msix").unwrap();
                make(&format!("proc/irq/{number}"));
                fs::write(at(&format!("proc/irq/{number}/smp_affinity_list")), "0-3").unwrap();
            }
        }
        let bound = [(DRIVERS[0], "02.0/virtio0"), (DRIVERS[1], "04.0")];
        for (driver, device) in bound {
            let link = at(&format!("sys/bus/{driver}/device"));
            symlink(at(&format!("sys/devices/0000:00:{device}")), link).unwrap();
        }
        root
    }

    fn affinity(root: &Path, number: u32) -> String {
        fs::read_to_string(root.join(format!("proc/irq/{number}/smp_affinity_list"))).unwrap()
    }

    #[test]
    fn the_interrupts_of_vsock_and_no_others_are_directed() {
        let root = guest();
        let (sysfs, procfs) = (root.path().join("sys"), root.path().join("proc"));
        assert_eq!(direct_vsock_to(1, &sysfs, &procfs).unwrap(), 4);
        for (number, cpus) in [
            (25, "1"),
            (26, "1"),
            (27, "0-3"),
            (28, "0-3"),
            (29, "1"),
            (30, "1"),
        ] {
            assert_eq!(affinity(root.path(), number), cpus, "{number}");
        }
    }

    #[test]
    fn one_that_the_kernel_refuses_keeps_no_other_from_it() {
        let root = guest();
        fs::remove_dir_all(root.path().join("proc/irq/25")).unwrap();
        let (sysfs, procfs) = (root.path().join("sys"), root.path().join("proc"));
        direct_vsock_to(1, &sysfs, &procfs).unwrap_err();
        assert_eq!(affinity(root.path(), 26), "1");
    }

    #[test]
    fn without_a_device_there_is_nothing_to_direct() {
        let none = tempfile::tempdir().unwrap();
        assert_eq!(direct_vsock_to(0, none.path(), none.path()).unwrap(), 0);
    }
}
