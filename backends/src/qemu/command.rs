//! The command lines of QEMU and of the vhost-user device.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use kmp_transport::kerf::VECTORS;

use super::lending;
use crate::guest::AGENT_CONFIG;

/// The accelerator that executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor (KVM).
    Kvm,
    /// QEMU's software emulation (TCG).
    Tcg,
}

/// The guest's vsock device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum VsockDevice {
    /// The host kernel's vhost-vsock, with this context id.
    Kernel { cid: u32 },
    /// A vhost-user device behind this socket.
    VhostUser { socket: PathBuf },
    /// kerf-vsock: an ivshmem-doorbell device whose memory is served at this socket.
    Kerf { socket: PathBuf },
}

/// A machine to start.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) qemu: &'a Path,
    pub(super) name: String,
    pub(super) accelerator: Accelerator,
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    pub(super) cmdline: &'a str,
    pub(super) vcpus: usize,
    pub(super) memory_mib: u64,
    pub(super) vsock: VsockDevice,
    pub(super) console: PathBuf,
    pub(super) commands: PathBuf,
    pub(super) events: PathBuf,
}

/// Size of the guest memory at address 0; the rest is at [`HIGH_MEMORY_START`]. Fixed, so that the daemon knows the
/// location of guest memory.
pub(super) const LOW_MEMORY_BYTES: u64 = 2 << 30;
/// Address of the rest of the guest memory.
pub(super) const HIGH_MEMORY_START: u64 = 4 << 30;
/// Number of bytes that the vhost-user device accepts from the guest per connection before it must pass some of them
/// on. A guest sends at most this much in one packet. Linux since 6.12 scatters a packet above 32 KiB over several
/// descriptors, of which vhost-device-vsock 0.3 reads only two: the packet would be lost and its stream would stall. A
/// power of two, because the device counts with wrapping numbers.
const VHOST_BUFFER_BYTES: u32 = 16 * 1024;
/// Size of the cache for translated code in software emulation, MiB; QEMU's default is 1024 per guest.
const TRANSLATED_MIB: u32 = 128;

/// The kernel's own part of the command line. A panic of which QEMU was not informed (before the
/// guest's pvpanic driver is loaded) ends in a reset, which ends QEMU. An oops is a panic, because
/// a damaged kernel is worse than none. Debian's kernels measure pressure only with `psi=1`; other
/// kernels ignore it.
const KERNEL_CMDLINE: &str = "console=ttyS0 quiet panic=-1 oops=panic psi=1";

/// Returns the arguments that select the accelerator, with its options.
pub(super) fn accelerator(accelerator: Accelerator) -> Vec<OsString> {
    match accelerator {
        Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host"].map(Into::into).to_vec(),
        Accelerator::Tcg => {
            let accel = format!("tcg,tb-size={TRANSLATED_MIB}");
            ["-accel", &accel].map(Into::into).to_vec()
        }
    }
}

/// Returns a path as the value of an option: QEMU ends a value at `,` unless it is doubled.
fn quoted(prefix: &str, path: &Path, suffix: &str) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(path.to_string_lossy().replace(',', ",,"));
    text.push(suffix);
    text
}

impl Machine<'_> {
    /// Returns the command line, beginning with the program.
    pub(super) fn command_line(&self) -> Vec<OsString> {
        let mib = self.memory_mib;
        let machine = "q35,memory-backend=ram,max-ram-below-4g=2G,usb=off,vmport=off,sata=off,\
                       smbus=off,smm=off,hpet=off";
        let mut line: Vec<OsString> = vec![self.qemu.into()];
        let mut put = |words: &[&str]| line.extend(words.iter().map(OsString::from));
        put(&["-name", &self.name, "-nodefaults", "-no-user-config"]);
        put(&["-display", "none", "-machine", machine]);
        put(&["-m", &format!("{mib}M"), "-smp", &self.vcpus.to_string()]);
        put(&["-object"]);
        put(&[&format!("memory-backend-memfd,id=ram,size={mib}M,share=on")]);
        put(&["-action", "reboot=shutdown,shutdown=poweroff,panic=pause"]);
        put(&["-device", "pvpanic-pci"]);
        // The guest's kernel writes its memory layout here, for dumps.
        put(&["-device", "vmcoreinfo"]);
        // The port for a loan of a dead guest's memory.
        put(&["-device", &lending::port()]);
        put(&[
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny",
        ]);
        line.extend(accelerator(self.accelerator));
        line.extend(["-kernel".into(), self.kernel.into()]);
        line.extend(["-initrd".into(), self.initramfs.into()]);
        line.extend(["-append".into(), self.kernel_cmdline().into()]);
        let serial = quoted("file,id=console,path=", &self.console, ",append=on");
        line.extend(["-chardev".into(), serial]);
        line.extend(["-serial".into(), "chardev:console".into()]);
        for (id, path) in [("commands", &self.commands), ("events", &self.events)] {
            let socket = quoted(
                &format!("socket,id={id},path="),
                path,
                ",server=on,wait=off",
            );
            line.extend(["-chardev".into(), socket]);
            line.extend(["-mon".into(), format!("chardev={id},mode=control").into()]);
        }
        match &self.vsock {
            VsockDevice::Kernel { cid } => {
                let device = format!("vhost-vsock-pci,guest-cid={cid}");
                line.extend(["-device".into(), device.into()]);
            }
            VsockDevice::VhostUser { socket } => {
                let chardev = quoted("socket,id=vsock,path=", socket, "");
                line.extend(["-chardev".into(), chardev]);
                let device = "vhost-user-vsock-pci,chardev=vsock";
                line.extend(["-device".into(), device.into()]);
            }
            VsockDevice::Kerf { socket } => {
                let chardev = quoted("socket,id=vsock,path=", socket, "");
                line.extend(["-chardev".into(), chardev]);
                let device = format!("ivshmem-doorbell,vectors={VECTORS},chardev=vsock");
                line.extend(["-device".into(), device.into()]);
            }
        }
        line
    }

    /// Returns the kernel's command line. The kernel passes the words after `--` to init: the agent's arguments.
    fn kernel_cmdline(&self) -> String {
        let own = self.cmdline.trim();
        format!("{KERNEL_CMDLINE} {own} -- --config {AGENT_CONFIG}")
    }
}

/// Returns the command line of the vhost-user device: QEMU connects to `listen`, the daemon to `host`.
pub(super) fn vhost_vsock(program: &Path, cid: u32, listen: &Path, host: &Path) -> Vec<OsString> {
    vec![
        program.into(),
        "--guest-cid".into(),
        cid.to_string().into(),
        "--socket".into(),
        listen.into(),
        "--uds-path".into(),
        host.into(),
        "--tx-buffer-size".into(),
        VHOST_BUFFER_BYTES.to_string().into(),
    ]
}

/// Returns the command line of kerf-vsock's host side: `listen` and `host` as above.
pub(super) fn kerf_host(program: &Path, listen: &Path, host: &Path) -> Vec<OsString> {
    vec![
        program.into(),
        "--socket".into(),
        listen.into(),
        "--uds-path".into(),
        host.into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(vsock: VsockDevice) -> String {
        let machine = Machine {
            qemu: Path::new("qemu-system-x86_64"),
            name: "web".into(),
            accelerator: Accelerator::Tcg,
            kernel: Path::new("/k/vmlinuz"),
            initramfs: Path::new("/r/initramfs.img"),
            cmdline: " mitigations=off ",
            vcpus: 2,
            memory_mib: 256,
            vsock,
            console: "/r,1/console.log".into(),
            commands: "/r/qmp.sock".into(),
            events: "/r/events.sock".into(),
        };
        let line = machine.command_line();
        let words: Vec<_> = line.iter().map(|w| w.to_string_lossy()).collect();
        words.join(" ")
    }

    #[test]
    fn a_comma_in_a_path_cannot_become_an_option() {
        let line = machine(VsockDevice::Kernel { cid: 9 });
        assert!(line.contains("path=/r,,1/console.log,append=on"), "{line}");
        assert!(line.contains("vhost-vsock-pci,guest-cid=9"), "{line}");
    }

    #[test]
    fn the_users_words_come_before_the_agents_arguments() {
        let socket = "/r/vhost.sock".into();
        let line = machine(VsockDevice::VhostUser { socket });
        let append = "oops=panic psi=1 mitigations=off -- --config /etc/kmorph/agent.json";
        assert!(line.contains(append), "{line}");
        assert!(line.contains("memory-backend-memfd,id=ram,size=256M,share=on"));
        assert!(line.contains("-device vmcoreinfo"), "{line}");
        let port =
            "pcie-root-port,id=lending,bus=pcie.0,addr=1e.0,chassis=1,pref64-reserve=34359738368";
        assert!(line.contains(port), "{line}");
        assert!(line.contains("vhost-user-vsock-pci,chardev=vsock"));
    }

    #[test]
    fn kerf_takes_the_place_of_the_virtio_device() {
        let socket = "/r,2/vsock-device.sock".into();
        let line = machine(VsockDevice::Kerf { socket });
        assert!(line.contains("socket,id=vsock,path=/r,,2/vsock-device.sock"));
        assert!(line.contains("ivshmem-doorbell,vectors=2,chardev=vsock"));
        assert!(!line.contains("vhost"));
    }
}
