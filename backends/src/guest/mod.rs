//! What a kernel of an instance's own boots: an initramfs with the agent as its init. Shared by the backends that
//! boot kernels.

mod cpio;
mod image;
mod modules;

use std::path::{Path, PathBuf};

use kmorph_launch::{AgentConfig, Listen, Role, Secret};
use kmp_transport::link::KMP_PORT;

pub(crate) use image::{AGENT_CONFIG, GuestImage, ImageError, Recipe, with_configuration};

use crate::contract::{SpawnError, SpawnSpec};

/// Least memory of a kernel, MiB: Debian's do not boot with less.
pub const MEMORY_MIN_MIB: u64 = 128;

/// Where the modules of a kernel are: below `configured`, beside its image, or in the host's own place.
pub(crate) fn modules_of(spec: &SpawnSpec, configured: Option<&Path>) -> Option<PathBuf> {
    let beside = spec.kernel.path().parent().map(|p| p.join("lib/modules"));
    let places = [
        configured.map(Path::to_owned),
        beside,
        Some("/lib/modules".into()),
    ];
    let mut places = places.into_iter().flatten();
    places.find_map(|place| Some(place.join(spec.kernel.release())).filter(|root| root.is_dir()))
}

/// Refuses what no kernel can be booted with.
pub(crate) fn check(spec: &SpawnSpec) -> Result<(), SpawnError> {
    if spec.cmdline.split_whitespace().any(|word| word == "--") {
        let text = "the kernel command line must not contain a lone --: what follows it would be \
                    taken for the agent's arguments";
        return Err(SpawnError::Refused(text.to_owned()));
    }
    if let Some(own) = spec.initramfs.as_ref().filter(|own| !own.is_file()) {
        let text = format!("the initramfs {own:?} is no file; give the path of a cpio archive");
        return Err(SpawnError::Refused(text));
    }
    let in_image = spec.initramfs.is_none();
    match &spec.workload {
        Some(w) if in_image && !(w.program.is_absolute() && w.program.is_file()) => {
            Err(SpawnError::Refused(format!(
                "the workload {:?} is no absolute path of a program on this host; the guest \
                 image takes it from here",
                w.program
            )))
        }
        _ => Ok(()),
    }
}

/// Refuses memory that no kernel boots with.
pub(crate) fn check_memory(bytes: u64) -> Result<(), SpawnError> {
    let mib = bytes >> 20;
    if mib < MEMORY_MIN_MIB {
        return Err(SpawnError::Refused(format!(
            "{mib} MiB are too few for a kernel; give at least {MEMORY_MIN_MIB}"
        )));
    }
    Ok(())
}

/// Why an image was not built, as the reason of a spawn that failed.
pub(crate) fn image_failed(error: ImageError) -> SpawnError {
    match error {
        ImageError::File { what, path, source } => SpawnError::System {
            what: format!("building the guest image: {what} {path:?}"),
            source,
        },
        other => SpawnError::Unavailable(format!("building the guest image: {other}")),
    }
}

/// What the agent of a kernel is told; `modules` are loaded, and `vsock_option` chooses its vsock's transport.
pub(crate) fn agent_config(
    spec: &SpawnSpec,
    key: Secret,
    modules: Vec<PathBuf>,
    vsock_option: Option<i32>,
) -> AgentConfig {
    let role = match spec.initramfs {
        None => Role::Init,
        Some(_) => Role::Service,
    };
    AgentConfig {
        instance: spec.name.clone(),
        generation: spec.generation,
        key,
        role,
        listen: Listen::Vsock { port: KMP_PORT },
        kernel_release: None,
        cpus: Vec::new(),
        memory_bytes: 0,
        workload_cgroup: None,
        workload: spec.workload.clone(),
        ports: spec.ports.clone(),
        start: spec.start,
        handover: None,
        predecessor: None,
        modules,
        vsock_option,
    }
}
