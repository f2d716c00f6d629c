//! A user's initramfs for `--initramfs`: a guest with an init of its own (busybox) and the agent as a service. The
//! backend adds the agent's configuration to the initramfs. On Ctrl-Alt-Del, the init runs only the command that the
//! test has chosen.

use std::path::{Path, PathBuf};

use crate::crashed_guest::unpack;
use crate::initramfs::Initramfs;
use crate::kernels::{Transport, built_modules};
use crate::program;

/// The guest's init: mounts, loads modules, starts the agent in the background, and stays PID 1.
const INIT: &str = "#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do
    case $module in
        *kerf-vsock.ko) insmod $module instance=web generation=1 ;;
        *) insmod $module ;;
    esac
done
trap 'ON_CTRL_ALT_DEL' INT
echo 0 >/proc/sys/kernel/ctrl-alt-del
/usr/bin/kmorph-agent --config /etc/kmorph/agent.json &
agent=$!
while true; do sleep 3600 & wait $!; done
";
/// Modules of virtio-vsock, relative to `kernel/`, in the order of loading.
const VIRTIO: [&str; 8] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko",
];
/// Dependencies of `kerf-vsock.ko`, in the order of loading.
const KERF: [&str; 2] = [
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
];
/// Command that stops the agent.
pub const STOPS_ITS_AGENT: &str = "kill -STOP $agent";
/// Command that makes CPU 1 spin with interrupts off, on the first Ctrl-Alt-Del; later ones have no effect.
pub const HANGS_CPU_1: &str = "[ -e /tmp/hung ] || { : >/tmp/hung; insmod /failing.ko how=cpu1; }";
/// Path of the key-value server in the guest.
pub const KV_IN_GUEST: &str = "/usr/bin/kmorph-kv";

/// Builds the initramfs in `dir` for the Debian kernel `vmlinuz`. On Ctrl-Alt-Del, its shell runs the line `then`.
pub fn build(dir: &Path, vmlinuz: &Path, transport: Transport, then: &str) -> PathBuf {
    let tree = Initramfs::new(
        dir.join("larger-guest"),
        &["sh", "mount", "insmod", "sleep"],
    );
    for name in ["kmorph-agent", "kmorph-kv"] {
        tree.add_program(&program(name));
    }
    for (order, module) in modules(vmlinuz, transport).iter().enumerate() {
        let name = module.file_name().expect("a file").to_string_lossy();
        // A missing module is built into the kernel.
        if module.exists() || module.with_extension("ko.xz").exists() {
            let plain = dir.join(format!("{order}-{name}"));
            unpack(module, &plain);
            tree.add(&plain, format!("modules/{order}-{name}"));
        }
    }
    if then == HANGS_CPU_1 {
        let failing = built_modules(vmlinuz).join("failing.ko");
        tree.add(&failing, "failing.ko");
    }
    tree.set_init(&INIT.replace("ON_CTRL_ALT_DEL", then));
    let image = dir.join("larger-guest.cpio");
    tree.pack(&image);
    image
}

/// Returns the modules for this transport, in the order of loading.
fn modules(vmlinuz: &Path, transport: Transport) -> Vec<PathBuf> {
    let kernel = vmlinuz.parent().expect("an image lies in a directory");
    let release = kernel.file_name().expect("it is named after its release");
    let kernels_own = kernel.join("lib/modules").join(release).join("kernel");
    let in_tree = |names: &[&str]| names.iter().map(|name| kernels_own.join(name)).collect();
    match transport {
        Transport::Virtio => in_tree(&VIRTIO),
        Transport::Kerf => {
            let mut all: Vec<PathBuf> = in_tree(&KERF);
            all.push(built_modules(vmlinuz).join("kerf-vsock.ko"));
            all
        }
    }
}
