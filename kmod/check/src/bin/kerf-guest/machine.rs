//! The guest itself: mounts, modules, power.

use std::ffi::CString;
use std::fs::{File, create_dir_all, read_to_string, write};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};
use nix::mount::{MsFlags, mount};

/// The module's own unbinding of its device.
const UNBIND: &str = "/sys/bus/pci/drivers/kerf-vsock/unbind";
const BIND: &str = "/sys/bus/pci/drivers/kerf-vsock/bind";
const PEERS: &str = "/sys/kernel/debug/kerf-vsock/peers";

pub(crate) fn prepare() {
    for (what, to) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("debugfs", "/sys/kernel/debug"),
    ] {
        let _ = create_dir_all(to);
        if let Err(error) = mount(Some(what), to, Some(what), MsFlags::empty(), None::<&str>) {
            println!("KERF failed mounting {what}: {error}");
        }
    }
}

pub(crate) fn power_off() {
    nix::unistd::sync();
    let error = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    println!("KERF failed powering off: {error:?}");
}

pub(crate) fn load(module: &str, parameters: &str) -> Result<(), Errno> {
    let file = File::open(format!("/modules/{module}.ko")).unwrap();
    let parameters = CString::new(parameters).unwrap();
    finit_module(file, &parameters, ModuleInitFlags::empty())
}

pub(crate) fn unload(module: &str) -> Result<(), Errno> {
    let name = CString::new(module.replace('-', "_")).unwrap();
    delete_module(&name, DeleteModuleFlags::O_NONBLOCK)
}

/// Unloads when the last socket has let go of it.
pub(crate) fn unload_soon(module: &str) {
    wait_for("the module to be free", || unload(module).is_ok());
}

/// Tries until it is true. Another guest may have to boot for it, on a busy machine.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    const PATIENCE: Duration = Duration::from_secs(170);
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The name of the device on the PCI bus.
pub(crate) fn device() -> String {
    let entries = std::fs::read_dir("/sys/bus/pci/devices").unwrap();
    let found = entries
        .map(|e| e.unwrap().path())
        .find(|path| read_to_string(path.join("device")).is_ok_and(|id| id.trim() == "0x1110"));
    let path = found.expect("an ivshmem device");
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

pub(crate) fn unbind() {
    write(UNBIND, device()).unwrap();
}

pub(crate) fn bind() {
    write(BIND, device()).unwrap();
}

/// The CID that this kernel has, as the vsock core sees it.
pub(crate) fn own_cid() -> u32 {
    const GET_LOCAL_CID: nix::libc::c_ulong = 0x7b9;
    use std::os::fd::AsRawFd;
    let file = File::open("/dev/vsock").unwrap();
    let mut cid = 0u32;
    // SAFETY: it writes one u32.
    let result = unsafe { nix::libc::ioctl(file.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) };
    assert_eq!(result, 0);
    cid
}

pub(crate) fn peers() -> String {
    read_to_string(PEERS).unwrap()
}

/// A field of a peer's line.
pub(crate) fn field(peer: u32, name: &str) -> Option<String> {
    let text = peers();
    let start = format!("peer {peer} ");
    let line = text.lines().find(|line| line.starts_with(&start))?;
    let mut words = line.split(' ');
    words.find(|word| *word == name)?;
    words.next().map(str::to_owned)
}

pub(crate) fn wait_for_link(peer: u32, state: &str) {
    wait_for("the link", || field(peer, "link").as_deref() == Some(state));
}

/// Whether the kernel has complained.
pub(crate) fn complaints() -> Vec<String> {
    let log = read_kmsg();
    let bad = [
        "BUG:",
        "WARNING:",
        "Oops",
        "refcount",
        "use-after-free",
        "blocked for more than",
        "soft lockup",
        "rcu_sched",
        "general protection",
        "possible recursive locking",
    ];
    log.lines()
        .filter(|line| is_warning(line))
        .filter(|line| bad.iter().any(|b| line.contains(b)))
        .map(str::to_owned)
        .collect()
}

/// Whether a record of /dev/kmsg, `priority,sequence,…;text`, is a warning or worse. What a kernel says of its options at
/// boot may name what they look for.
fn is_warning(record: &str) -> bool {
    const WARNING: u32 = 4;
    let priority = record
        .split_once(',')
        .and_then(|(first, _)| first.parse().ok());
    priority.is_none_or(|priority: u32| priority & 7 <= WARNING)
}

/// What the module has said of PCI devices.
pub(crate) fn said_of_devices() -> Vec<String> {
    let log = read_kmsg();
    let of_device = |line: &&str| line.contains("kerf-vsock 0000:");
    log.lines().filter(of_device).map(str::to_owned).collect()
}

fn read_kmsg() -> String {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = File::options()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .unwrap();
    let mut text = String::new();
    let mut record = [0; 8192];
    while let Ok(len) = file.read(&mut record) {
        if len == 0 {
            break;
        }
        text.push_str(&String::from_utf8_lossy(&record[..len]));
    }
    text
}

/// Suspends to memory. The harness wakes the guest once QEMU has reported the sleep, so that no clock decides.
pub(crate) fn suspend() {
    write("/sys/power/mem_sleep", "deep").unwrap();
    write("/sys/power/state", "mem").unwrap();
}

pub(crate) fn crash() {
    write("/proc/sys/kernel/sysrq", "1").unwrap();
    write("/proc/sysrq-trigger", "c").unwrap();
}
