//! Checks the requirements of this backend, and reports all that are missing at once, each with a remedy.

use std::path::Path;

use kmp_transport::link::vsock;
use libkerf::kernel::KernelError;
use libkerf::model::System;
use rustix::fs::{Access, access};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::slots::Slots;
use super::{MultikernelConfig, Vsock};

/// `CAP_SYS_BOOT` (capabilities(7)).
const CAP_SYS_BOOT: u32 = 22;
const KEXEC_DISABLED: &str = "/proc/sys/kernel/kexec_load_disabled";
/// Advice if the kernel has no vsock between its kernels: some versions of it do not compile.
const WITHOUT_VSOCK: &str = "Without it kmorph reaches no agent: it could neither watch nor morph an instance, and \
                             starts none. What works: kerf create, load, start and console; libkerf and its Python \
                             package; kmorphctl vmcore analyze; kmorphd with another backend";
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// Checks the machine. Returns the findings in one line, or everything that is missing.
pub(super) fn look(config: &MultikernelConfig, slots: &Slots) -> Result<String, Vec<String>> {
    let mut missing = Vec::new();
    if !config.agent.is_file() {
        missing.push(format!(
            "the agent {:?} does not exist; name it with paths.agent",
            config.agent
        ));
    }
    missing.extend(rights());
    missing.extend(reachable(&config.vsock).err());
    let pool = match files(&config.root) {
        Ok(()) => pool(slots),
        Err(lacks) => Err(lacks),
    };
    match pool {
        Ok(found) if missing.is_empty() => Ok(format!(
            "multikernel ({}): {found}; vsock: {}",
            config.root.display(),
            config.vsock
        )),
        Ok(_) => Err(missing),
        Err(lacks) => {
            missing.push(lacks);
            Err(missing)
        }
    }
}

/// Checks the kernel's files, which must be of a known generation.
fn files(root: &Path) -> Result<(), String> {
    if !root.is_dir() {
        return Err(format!(
            "{} does not exist: boot a kernel with CONFIG_MULTIKERNEL",
            root.display()
        ));
    }
    if !root.join("device_tree").exists() {
        return Err(format!(
            "{0} is empty: mount -t multikernel none {0}",
            root.display()
        ));
    }
    if root.join("device_tree_source").exists() {
        let text = "this multikernel kernel is of generation A, whose overlay format is not supported; boot a newer one";
        return Err(text.to_owned());
    }
    let new = root.join("overlays/new");
    if !new.exists() {
        return Err(format!(
            "{} does not exist: this multikernel kernel is of an unknown generation",
            new.display()
        ));
    }
    access(&new, Access::WRITE_OK).map_err(|errno| {
        format!(
            "{} cannot be written: {errno}; run kmorphd as root",
            new.display()
        )
    })
}

fn pool(slots: &Slots) -> Result<String, String> {
    match slots.kernel.state(None) {
        Ok(state) => enough(&state.system),
        Err(KernelError::NoPool { .. }) => {
            Err("the kernel has no pool of CPUs and memory; create one with kerf init".to_owned())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Checks that the pool is not empty.
fn enough(system: &System) -> Result<String, String> {
    let resources = &system.resources;
    let mib = resources.memory_bytes() >> 20;
    if resources.cpus.is_empty() || mib == 0 {
        return Err(format!(
            "the kernel's pool has {} CPUs and {mib} MiB; enlarge it with kerf init",
            resources.cpus.len()
        ));
    }
    Ok(format!(
        "a pool of {} CPUs and {mib} MiB",
        resources.cpus.len()
    ))
}

/// Returns the missing rights to load and boot kernels.
fn rights() -> Vec<String> {
    let mut missing = Vec::new();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !has_capability(&status, CAP_SYS_BOOT) {
        missing.push("CAP_SYS_BOOT is missing; run kmorphd as root".to_owned());
    }
    if std::fs::read_to_string(KEXEC_DISABLED).is_ok_and(|text| text.trim() == "1") {
        missing.push(format!(
            "loading kernels is disabled until the host is rebooted ({KEXEC_DISABLED} is 1)"
        ));
    }
    if std::fs::read_to_string(LOCKDOWN).is_ok_and(|text| is_locked(&text)) {
        missing.push(format!(
            "the host's kernel is locked down ({LOCKDOWN}) and loads only signed images, but an unpacked image has \
             lost its signature; boot it without lockdown"
        ));
    }
    missing
}

/// Returns whether the text of `/proc/<pid>/status` contains the effective capability.
fn has_capability(status: &str, capability: u32) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> capability & 1 == 1)
}

/// Returns whether the selected one of `none [integrity] confidentiality` differs from none.
fn is_locked(text: &str) -> bool {
    !text.contains("[none]")
}

/// Checks whether instances can be reached from here; otherwise returns what is missing and what works without it.
pub(super) fn reachable(vsock: &Vsock) -> Result<(), String> {
    match vsock {
        Vsock::Sockets { directory } if directory.is_dir() => Ok(()),
        Vsock::Sockets { directory } => Err(format!(
            "multikernel.vsock_sockets: the directory {} does not exist",
            directory.display()
        )),
        Vsock::Kernel { option, .. } => {
            let kind = (SocketType::STREAM, SocketFlags::CLOEXEC);
            socket_with(AddressFamily::VSOCK, kind.0, kind.1, None).map_err(|errno| {
                format!(
                    "this host has no AF_VSOCK ({errno}); load the module vsock. {WITHOUT_VSOCK}"
                )
            })?;
            let Some(option) = option else { return Ok(()) };
            vsock::carries(*option).map_err(|error| {
                format!(
                    "{error}; load the module mk_transport, or build the kernel with CONFIG_MULTIKERNEL_VSOCKETS, or, \
                     where something else carries vsock, set multikernel.vsock_option to 0. {WITHOUT_VSOCK}"
                )
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_judged_by_the_files_of_a_generation() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("multikernel");
        let lacks = |root: &Path| files(root).err().unwrap_or_default();
        assert!(lacks(&root).contains("CONFIG_MULTIKERNEL"));
        std::fs::create_dir_all(root.join("overlays")).unwrap();
        assert!(lacks(&root).contains("mount -t multikernel"));
        std::fs::write(root.join("device_tree"), "").unwrap();
        assert!(lacks(&root).contains("unknown generation"));
        std::fs::write(root.join("overlays/new"), "").unwrap();
        assert_eq!(lacks(&root), "");
        std::fs::write(root.join("device_tree_source"), "").unwrap();
        assert!(lacks(&root).contains("generation A"));
    }

    #[test]
    fn an_empty_pool_is_none() {
        let mut system = System::default();
        system.resources.cpus = vec![8];
        assert!(enough(&system).unwrap_err().contains("1 CPUs and 0 MiB"));
    }

    #[test]
    fn rights_are_read_from_the_kernels_words() {
        assert!(has_capability(
            "Name:\tx\nCapEff:\t0000000000400000\n",
            CAP_SYS_BOOT
        ));
        assert!(!has_capability("CapEff:\t0000000000200000\n", CAP_SYS_BOOT));
        assert!(!has_capability("", CAP_SYS_BOOT));
        assert!(is_locked("none [integrity] confidentiality\n"));
        assert!(!is_locked("[none] integrity confidentiality\n"));
    }

    #[test]
    fn a_host_without_the_transport_is_told_what_to_load() {
        let nowhere = Vsock::Sockets {
            directory: "/nonexistent".into(),
        };
        assert!(reachable(&nowhere).unwrap_err().contains("/nonexistent"));
        let kernel = Vsock::Kernel {
            cid_offset: 0,
            option: Some(9),
        };
        // A stock kernel does not have this option; a multikernel does.
        if let Err(lacks) = reachable(&kernel) {
            assert!(lacks.contains("load the module"), "{lacks}");
            assert!(lacks.contains("What works: kerf create"), "{lacks}");
        }
    }
}
