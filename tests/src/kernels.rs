//! Real kernels for the qemu backend, from `scripts/fetch-kernels`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use kmorph_control_api::paths::DefaultPaths;
use serde_json::{Value, json};

/// Option that makes a kernel panic on a non-maskable interrupt.
pub const PANICS_ON_NMI: &str = "unknown_nmi_panic=1";

/// Transport of vsock to a guest: `qemu.transport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// virtio-vsock.
    Virtio,
    /// kerf-vsock.
    Kerf,
}

impl Transport {
    /// Returns the transport's name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Virtio => "virtio",
            Self::Kerf => "kerf",
        }
    }
}

/// Returns the directory in which the scripts store kernels and tools, and the daemon stores guest images.
pub fn cache() -> PathBuf {
    let uid = nix::unistd::Uid::effective().as_raw();
    let default = || DefaultPaths::of(uid, |name| std::env::var_os(name)).cache_dir;
    let set = std::env::var_os("KMORPH_CACHE_DIR").filter(|dir| !dir.is_empty());
    set.map_or_else(default, Into::into)
}

/// Returns the series of the newest kernel: `7.3`, or the value of `KMORPH_NEWEST_SERIES`, which `make new-kernel`
/// sets.
pub fn newest() -> String {
    let set = std::env::var("KMORPH_NEWEST_SERIES").ok();
    set.filter(|series| !series.is_empty())
        .unwrap_or_else(|| "7.3".to_owned())
}

/// Returns the image of Debian's kernel of this series: `6.1`, `6.12`, or [`newest`].
pub fn debian(series: &str) -> PathBuf {
    let kernels = cache().join("kernels");
    let release = std::fs::read_to_string(kernels.join(series)).unwrap_or_else(|error| {
        panic!("no kernel {series} in {kernels:?} ({error}): run scripts/setup-tests")
    });
    kernels.join(release.trim()).join("vmlinuz")
}

/// Returns the directory of the modules that `scripts/build-kmod` has built for the kernel image `vmlinuz`.
pub fn built_modules(vmlinuz: &Path) -> PathBuf {
    let home = vmlinuz.parent().expect("an image lies in a directory");
    let release = home.file_name().expect("it is named after its release");
    cache().join("kmod").join(release)
}

/// Returns true if `scripts/build-kmod` has built this module for the kernel image `vmlinuz`.
pub fn has_module(vmlinuz: &Path, module: &str) -> bool {
    built_modules(vmlinuz).join(module).is_file()
}

/// Sends a command to the QEMU process of the generation in `run_dir`.
pub fn qmp(run_dir: &Path, command: &str) {
    execute(run_dir, &json!({ "execute": command }));
}

/// Returns the state of the guest according to the QEMU of the generation in `run_dir`: `running`, `paused`, …
pub fn guest_status(run_dir: &Path) -> String {
    let answer = execute(run_dir, &json!({ "execute": "query-status" }));
    let status = answer["return"]["status"].as_str();
    status.expect("QEMU knows its guest's status").to_owned()
}

/// Returns true if the guest in `run_dir` has borrowed memory of another guest.
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
