//! Real kernels for the qemu backend: those that `scripts/fetch-kernels` fetches.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use kmorph_control_api::paths::DefaultPaths;
use serde_json::{Value, json};

/// With this on its command line a kernel panics when it is sent a non-maskable interrupt.
pub const PANICS_ON_NMI: &str = "unknown_nmi_panic=1";

/// What carries vsock to a guest: `qemu.transport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// virtio-vsock.
    Virtio,
    /// kerf-vsock.
    Kerf,
}

impl Transport {
    /// Its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Virtio => "virtio",
            Self::Kerf => "kerf",
        }
    }
}

/// Where the scripts leave kernels and tools, and the daemon keeps guest images.
pub fn cache() -> PathBuf {
    let uid = nix::unistd::Uid::effective().as_raw();
    let default = || DefaultPaths::of(uid, |name| std::env::var_os(name)).cache_dir;
    let set = std::env::var_os("KMORPH_CACHE_DIR").filter(|dir| !dir.is_empty());
    set.map_or_else(default, Into::into)
}

/// The series of the newest kernel: `7.3`, or what `KMORPH_NEWEST_SERIES` names, as `make new-kernel` does.
pub fn newest() -> String {
    let set = std::env::var("KMORPH_NEWEST_SERIES").ok();
    set.filter(|series| !series.is_empty())
        .unwrap_or_else(|| "7.3".to_owned())
}

/// The image of Debian's kernel of this series: `6.1`, `6.12`, or [`newest`].
pub fn debian(series: &str) -> PathBuf {
    let kernels = cache().join("kernels");
    let release = std::fs::read_to_string(kernels.join(series)).unwrap_or_else(|error| {
        panic!("no kernel {series} in {kernels:?} ({error}): run scripts/setup-tests")
    });
    kernels.join(release.trim()).join("vmlinuz")
}

/// The directory of the modules that `scripts/build-kmod` has built for the kernel whose image is `vmlinuz`.
pub fn built_modules(vmlinuz: &Path) -> PathBuf {
    let home = vmlinuz.parent().expect("an image lies in a directory");
    let release = home.file_name().expect("it is named after its release");
    cache().join("kmod").join(release)
}

/// Whether `scripts/build-kmod` has built this module for the kernel whose image is `vmlinuz`.
pub fn has_module(vmlinuz: &Path, module: &str) -> bool {
    built_modules(vmlinuz).join(module).is_file()
}

/// Asks the QEMU of the generation in `run_dir` to do something.
pub fn qmp(run_dir: &Path, command: &str) {
    execute(run_dir, &json!({ "execute": command }));
}

/// What the QEMU of the generation in `run_dir` says that its guest does: `running`, `paused`, …
pub fn guest_status(run_dir: &Path) -> String {
    let answer = execute(run_dir, &json!({ "execute": "query-status" }));
    let status = answer["return"]["status"].as_str();
    status.expect("QEMU knows its guest's status").to_owned()
}

/// Whether the guest in `run_dir` has memory of another that it was lent.
pub fn has_borrowed(run_dir: &Path) -> bool {
    let arguments = json!({ "path": "/machine/peripheral" });
    let list = json!({ "execute": "qom-list", "arguments": arguments });
    let answer = execute(run_dir, &list);
    let devices = answer["return"].as_array().expect("QEMU lists its devices");
    devices.iter().any(|device| device["name"] == "lent")
}

/// Presses Ctrl-Alt-Del on the guest in `run_dir`.
pub fn press_ctrl_alt_del(run_dir: &Path) {
    let keys = ["ctrl", "alt", "delete"].map(|key| json!({ "type": "qcode", "data": key }));
    execute(
        run_dir,
        &json!({ "execute": "send-key", "arguments": { "keys": keys } }),
    );
}

fn execute(run_dir: &Path, command: &Value) -> Value {
    let socket = run_dir.join("qmp.sock");
    let mut qmp = UnixStream::connect(&socket).unwrap_or_else(|error| {
        panic!("{socket:?}: {error}: QEMU has ended, or the daemon has fenced it; its log says why")
    });
    let own = qmp.try_clone().expect("a descriptor is left");
    let mut said = BufReader::new(own).lines().map_while(Result::ok);
    let mut last = Value::Null;
    for command in [&json!({ "execute": "qmp_capabilities" }), command] {
        writeln!(qmp, "{command}").expect("QEMU takes commands");
        let answered =
            said.find(|line| line.starts_with("{\"return\"") || line.contains("\"error\""));
        let answer = answered.unwrap_or_default();
        assert!(!answer.contains("\"error\""), "{command}: {answer}");
        assert!(!answer.is_empty(), "{command}: QEMU hung up");
        last = serde_json::from_str(&answer).expect("QEMU speaks JSON");
    }
    last
}
