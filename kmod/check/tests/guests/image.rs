//! What guests boot: the kernels of the cache, and an initramfs for each.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

pub(crate) fn cache() -> PathBuf {
    match std::env::var_os("KMORPH_CACHE_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => dir.into(),
        // SAFETY: it has no preconditions.
        None if unsafe { nix::libc::geteuid() } == 0 => "/var/cache/kmorph".into(),
        None => PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/kmorph"),
    }
}

pub(crate) fn release(series: &str) -> String {
    let path = cache().join("kernels").join(series);
    let text = std::fs::read_to_string(&path);
    let text = text.unwrap_or_else(|error| panic!("{path:?}: {error}; run scripts/fetch-kernels"));
    text.trim().to_owned()
}

/// The module of this tree, below which there is a directory for each kernel.
pub(crate) fn built_modules() -> PathBuf {
    cache().join("kmod")
}

/// What drives a virtio network card, in the order in which it is loaded, below `kernel/`. A kernel may have some of it
/// built in.
const NETWORK_CARD: [&str; 8] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];

fn modules_of(release: &str) -> PathBuf {
    cache().join(format!("kernels/{release}/lib/modules/{release}/kernel"))
}

/// The commands that load what drives a network card in a kernel of `series`.
pub(crate) fn network_card(series: &str) -> Vec<String> {
    let all = modules_of(&release(series));
    let there = NETWORK_CARD
        .iter()
        .filter(|path| is_module(&all.join(path)));
    let names = there.map(|path| path.rsplit('/').next().unwrap());
    names.map(|name| format!("load={name}")).collect()
}

fn is_module(path: &Path) -> bool {
    path.with_extension("ko").is_file() || path.with_extension("ko.xz").is_file()
}

/// The initramfs for a kernel: the guest's init, the modules, ours from below `modules`, and `program` if it is given.
pub(crate) fn image(
    series: &str,
    release: &str,
    modules: &Path,
    program: Option<&Path>,
) -> PathBuf {
    type Of = (PathBuf, Option<PathBuf>);
    static BUILT: Mutex<Vec<(Of, PathBuf)>> = Mutex::new(Vec::new());
    let mut built = BUILT.lock().unwrap();
    let module = modules.join(release).join("kerf-vsock.ko");
    let of = (module.clone(), program.map(Path::to_owned));
    if let Some((_, path)) = built.iter().find(|(built, _)| *built == of) {
        return path.clone();
    }
    // Below the target directory, and made anew: a static directory would outlive the tests in /tmp.
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kerf-guests");
    let tree = place.join(format!("{series}-{}.tree", built.len()));
    let _ = std::fs::remove_dir_all(&tree);
    for directory in ["dev", "modules", "proc", "sys"] {
        std::fs::create_dir_all(tree.join(directory)).unwrap();
    }
    let init = std::env::var_os("KERF_GUEST").expect("KERF_GUEST names the guest's program");
    std::fs::copy(init, tree.join("init")).unwrap();
    let all = modules_of(release);
    for name in [
        "vsock",
        "vmw_vsock_virtio_transport_common",
        "vsock_loopback",
    ] {
        let to = tree.join(format!("modules/{name}.ko"));
        unpack(&all.join("net/vmw_vsock"), name, &to);
    }
    if let Some(program) = program {
        std::fs::copy(program, tree.join(program.file_name().unwrap())).unwrap();
        for path in NETWORK_CARD
            .iter()
            .filter(|path| is_module(&all.join(path)))
        {
            let (directory, name) = path.rsplit_once('/').unwrap();
            let to = tree.join(format!("modules/{name}.ko"));
            unpack(&all.join(directory), name, &to);
        }
    }
    std::fs::copy(&module, tree.join("modules/kerf-vsock.ko"))
        .unwrap_or_else(|error| panic!("{module:?}: {error}; run make kmod"));
    let path = place.join(format!("{series}-{}.cpio", built.len()));
    let script =
        "mknod -m 600 dev/console c 5 1 && find . | cpio -o -H newc -R 0:0 --quiet > \"$1\"";
    let packed = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(&path)
        .current_dir(&tree)
        .status();
    assert!(
        packed.unwrap().success(),
        "cpio, or mknod: the tests run as root"
    );
    built.push((of, path.clone()));
    path
}

fn unpack(directory: &Path, name: &str, to: &Path) {
    let plain = directory.join(format!("{name}.ko"));
    if plain.is_file() {
        std::fs::copy(plain, to).unwrap();
        return;
    }
    let packed = directory.join(format!("{name}.ko.xz"));
    let file = std::fs::File::create(to).unwrap();
    let xz = Command::new("xz")
        .arg("-dc")
        .arg(packed)
        .stdout(file)
        .status();
    assert!(xz.unwrap().success());
}
