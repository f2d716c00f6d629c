//! An initramfs of the user's own, for `--initramfs`: a guest with an init of its own (busybox) in
//! which the agent is a service. The backend adds the agent's configuration to it. On Ctrl-Alt-Del its
//! init does what the test has chosen, and nothing else.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::crashed_guest::unpack;
use crate::kernels::{Transport, built_modules};
use crate::program;

/// What the guest's init does: mounts, modules, the agent in the background. It stays PID 1.
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
/// What a guest needs to have virtio-vsock, in the order of loading, below `kernel/`.
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
/// What `kerf-vsock.ko` needs, in the order of loading.
const KERF: [&str; 2] = [
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
];
/// On Ctrl-Alt-Del the guest stops its agent.
pub const STOPS_ITS_AGENT: &str = "kill -STOP $agent";
/// On its first Ctrl-Alt-Del CPU 1 of the guest spins with interrupts off; on others nothing happens.
pub const HANGS_CPU_1: &str = "[ -e /tmp/hung ] || { : >/tmp/hung; insmod /failing.ko how=cpu1; }";
/// Where the guest has the key-value server.
pub const KV_IN_GUEST: &str = "/usr/bin/kmorph-kv";

/// Builds it in `dir` for the Debian kernel `vmlinuz`. On Ctrl-Alt-Del it does `then`, a line of its shell.
pub fn build(dir: &Path, vmlinuz: &Path, transport: Transport, then: &str) -> PathBuf {
    let root = dir.join("larger-guest");
    for name in [
        "bin", "dev", "etc", "modules", "proc", "sys", "tmp", "usr/bin",
    ] {
        fs::create_dir_all(root.join(name)).expect("a directory can be made");
    }
    add(&root, Path::new("/bin/busybox"), "bin/busybox");
    for applet in ["sh", "mount", "insmod", "sleep"] {
        symlink("busybox", root.join("bin").join(applet)).expect("a link can be made");
    }
    for name in ["kmorph-agent", "kmorph-kv"] {
        let path = program(name);
        for library in libraries(&path) {
            add(
                &root,
                &library,
                library
                    .strip_prefix("/")
                    .expect("ldd prints absolute paths"),
            );
        }
        add(&root, &path, Path::new("usr/bin").join(name));
    }
    for (order, module) in modules(vmlinuz, transport).iter().enumerate() {
        let name = module.file_name().expect("a file").to_string_lossy();
        // What is not there is built in.
        if module.exists() || module.with_extension("ko.xz").exists() {
            unpack(module, &root.join(format!("modules/{order}-{name}")));
        }
    }
    if then == HANGS_CPU_1 {
        add(
            &root,
            &built_modules(vmlinuz).join("failing.ko"),
            "failing.ko",
        );
    }
    let init = INIT.replace("ON_CTRL_ALT_DEL", then);
    fs::write(root.join("init"), init).expect("a file can be written");
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(root.join("init"), executable).expect("it is ours");
    pack(&root, dir)
}

/// The modules that this transport takes, in the order of loading.
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

fn add(root: &Path, from: &Path, to: impl AsRef<Path>) {
    let to = root.join(to);
    fs::create_dir_all(to.parent().expect("it is below the root")).expect("it can be made");
    fs::copy(from, &to).unwrap_or_else(|error| panic!("copying {from:?}: {error}"));
}

fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd runs");
    let text = String::from_utf8(output.stdout).expect("paths are text");
    let words = text.split_whitespace();
    words
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

fn pack(root: &Path, dir: &Path) -> PathBuf {
    let image = dir.join("larger-guest.cpio");
    let packed = Command::new("sh")
        .args(["-c", "find . | cpio --create --format=newc --quiet"])
        .current_dir(root)
        .stdout(Stdio::from(
            fs::File::create(&image).expect("a file can be made"),
        ))
        .status();
    assert!(packed.expect("cpio runs").success());
    image
}
