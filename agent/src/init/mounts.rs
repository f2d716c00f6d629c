//! Mounts the file systems that programs expect.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::{InitError, failed};

/// A mount, in this order.
struct Mount {
    kind: &'static str,
    at: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const fn kernel(kind: &'static str, at: &'static str) -> Mount {
    let flags = MsFlags::MS_NOSUID
        .union(MsFlags::MS_NODEV)
        .union(MsFlags::MS_NOEXEC);
    Mount {
        kind,
        at,
        flags,
        data: "",
    }
}

/// Not `/tmp` and `/run`: the root is memory already, and a workload's program may lie there.
const MOUNTS: [Mount; 6] = [
    kernel("proc", "/proc"),
    kernel("sysfs", "/sys"),
    Mount {
        kind: "devtmpfs",
        at: "/dev",
        flags: MsFlags::MS_NOSUID,
        data: "mode=0755",
    },
    Mount {
        kind: "devpts",
        at: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,ptmxmode=0666",
    },
    Mount {
        kind: "tmpfs",
        at: "/dev/shm",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=1777",
    },
    kernel("cgroup2", "/sys/fs/cgroup"),
];

/// Everybody's directory for temporary files: mode 1777.
const TMP: &str = "/tmp";

/// Mounts all of them.
pub(super) fn all() -> Result<(), InitError> {
    for one in &MOUNTS {
        let what = || failed(format!("mounting {} at {}", one.kind, one.at));
        // Mount points inside other mounts (/sys/fs/cgroup) are the kernel's to make.
        if !Path::new(one.at).exists() {
            let mode = nix::sys::stat::Mode::from_bits_truncate(0o755);
            nix::unistd::mkdir(one.at, mode).map_err(what())?;
        }
        match mount(
            Some(one.kind),
            one.at,
            Some(one.kind),
            one.flags,
            Some(one.data),
        ) {
            // Mounted by the kernel itself (CONFIG_DEVTMPFS_MOUNT).
            Ok(()) | Err(Errno::EBUSY) => {}
            // A kernel built without it: nothing that kmorph needs is there.
            Err(Errno::ENODEV) if one.kind == "cgroup2" => {}
            Err(errno) => return Err(what()(errno)),
        }
    }
    let everybody = Permissions::from_mode(0o1777);
    std::fs::set_permissions(TMP, everybody).map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
        failed(format!("opening {TMP} to everybody"))(errno)
    })
}
