//! The initramfs that an instance's kernel boots, with the agent as its init. Shared by the backends that boot
//! kernels.

mod cpio;
mod image;
mod modules;

use std::path::{Path, PathBuf};

use kmorph_launch::{AgentConfig, Listen, Role, Secret};
use kmp_transport::link::KMP_PORT;

pub(crate) use image::{AGENT_CONFIG, GuestImage, ImageError, Recipe, with_configuration};

use crate::contract::{SpawnError, SpawnSpec};

/// Minimum memory of a kernel, MiB: Debian's kernels do not boot with less.
pub const MEMORY_MIN_MIB: u64 = 128;

/// Returns the module directory of a kernel: below `configured`, the image's own directory, `lib/modules` next to
/// the image, or the host's own.
pub(crate) fn modules_of(spec: &SpawnSpec, configured: Option<&Path>) -> Option<PathBuf> {
    modules_near(spec.kernel.path(), spec.kernel.release(), configured)
}

fn modules_near(image: &Path, release: &str, configured: Option<&Path>) -> Option<PathBuf> {
    let beside = image.parent().map(|p| p.join("lib/modules"));
    let host = Some(Path::new("/lib/modules"));
    let below = |place: &Path| Some(place.join(release)).filter(|root| root.is_dir());
    configured
        .and_then(below)
        .or_else(|| with_modules(image, release))
        .or_else(|| beside.as_deref().and_then(below))
        .or_else(|| host.and_then(below))
}

/// Returns the directory of `image`, if it is `modules/<release>`: newer packages install the image among its
/// modules. A link to the image counts as the image.
fn with_modules(image: &Path, release: &str) -> Option<PathBuf> {
    let image = image.canonicalize().ok()?;
    let own = image.parent().filter(|own| own.ends_with(release))?;
    own.join("modules.order").is_file().then(|| own.to_owned())
}

/// Refuses a spawn that no kernel could boot.
pub(crate) fn check(spec: &SpawnSpec) -> Result<(), SpawnError> {
    if spec.cmdline.split_whitespace().any(|word| word == "--") {
        let text = "the kernel command line must not contain a lone --: what follows it would be \
                    taken for the agent's arguments";
        return Err(SpawnError::Refused(text.to_owned()));
    }
    if let Some(own) = spec.initramfs.as_ref().filter(|own| !own.is_file()) {
        let text = format!("the initramfs {own:?} is not a file; give the path of a cpio archive");
        return Err(SpawnError::Refused(text));
    }
    let in_image = spec.initramfs.is_none();
    match &spec.workload {
        Some(w) if in_image && !(w.program.is_absolute() && w.program.is_file()) => {
            Err(SpawnError::Refused(format!(
                "the workload {:?} is not the absolute path of a program on this host; the guest \
                 image contains a copy of it",
                w.program
            )))
        }
        _ => Ok(()),
    }
}

/// Refuses memory that is too small for a kernel.
pub(crate) fn check_memory(bytes: u64) -> Result<(), SpawnError> {
    let mib = bytes >> 20;
    if mib < MEMORY_MIN_MIB {
        return Err(SpawnError::Refused(format!(
            "{mib} MiB are not enough for a kernel; give at least {MEMORY_MIN_MIB}"
        )));
    }
    Ok(())
}

/// Returns the spawn error for an image that was not built.
pub(crate) fn image_failed(error: ImageError) -> SpawnError {
    match error {
        ImageError::File { what, path, source } => SpawnError::System {
            what: format!("building the guest image: {what} {path:?}"),
            source,
        },
        other => SpawnError::Unavailable(format!("building the guest image: {other}")),
    }
}

/// Returns the agent's configuration in a guest kernel; `modules` are loaded, and `vsock_option` selects the
/// transport of its vsock.
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

#[cfg(test)]
mod tests {
    use super::*;

    const RELEASE: &str = "7.3.4-test";

    /// Creates a directory of modules at `path`, below `root`.
    fn tree(root: &Path, path: &str) -> PathBuf {
        let tree = root.join(path).join(RELEASE);
        std::fs::create_dir_all(&tree).unwrap();
        std::fs::write(tree.join("modules.order"), "").unwrap();
        tree
    }

    fn image(directory: &Path) -> PathBuf {
        let image = directory.join("vmlinuz");
        std::fs::write(&image, "").unwrap();
        image
    }

    #[test]
    fn an_image_among_its_modules_leads_to_them_and_so_does_a_link_to_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let own = tree(&root, "usr/lib/modules");
        let installed = image(&own);
        let link = root.join("vmlinuz");
        std::os::unix::fs::symlink(&installed, &link).unwrap();
        for path in [&installed, &link] {
            assert_eq!(modules_near(path, RELEASE, None).as_deref(), Some(&*own));
        }
        let configured = tree(&root, "configured");
        let found = modules_near(&installed, RELEASE, configured.parent());
        assert_eq!(found, Some(configured));
    }

    #[test]
    fn an_image_in_a_directory_of_its_release_that_has_no_modules_leads_to_those_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let home = root.path().join(RELEASE);
        let beside = tree(&home, "lib/modules");
        let image = image(&home);
        assert_eq!(modules_near(&image, RELEASE, None), Some(beside));
        assert_eq!(modules_near(&image, "7.3.5-test", None), None);
    }
}
