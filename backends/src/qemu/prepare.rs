//! Preparations before the processes of a guest start: its image and its run directory.

use std::path::{Path, PathBuf};

use super::command::Accelerator;
use super::{QemuBackend, VHOST_VSOCK, blocking, run_dir, start, system};
use crate::cgroup::Cgroup;
use crate::contract::{BackendKind, Containment, Endpoint, Placement, SpawnError, SpawnSpec};
use crate::finding;
use crate::guest::{self, GuestImage, Recipe};
use crate::key;

/// Modules without which the daemon cannot reach the guest.
const NEEDED: [&str; 2] = ["virtio_pci", "vmw_vsock_virtio_transport"];
/// Modules that kerf-vsock requires.
const NEEDED_BY_KERF: [&str; 1] = ["vmw_vsock_virtio_transport_common"];
/// Modules that are loaded first if the kernel has them: a panic is then reported at once, and QEMU's
/// dumps contain the kernel's memory layout (VMCOREINFO).
const WELCOME: [&str; 2] = ["pvpanic_pci", "qemu_fw_cfg"];

/// A guest that is about to be started.
pub(super) struct Prepared {
    pub(super) placement: Placement,
    pub(super) cgroup: Option<Cgroup>,
    pub(super) kernel: PathBuf,
    pub(super) cmdline: String,
    pub(super) cid: u32,
    pub(super) accelerator: Accelerator,
}

impl QemuBackend {
    /// Refuses an invalid spawn before anything is created.
    pub(super) fn check(spec: &SpawnSpec) -> Result<(), SpawnError> {
        run_dir::check(&spec.run_dir)?;
        guest::check_memory(spec.memory_bytes)?;
        guest::check(spec)
    }

    /// Returns the guest's image, without its configuration.
    async fn image(&self, spec: &SpawnSpec) -> Result<GuestImage, SpawnError> {
        if let Some(own) = &spec.initramfs {
            let own = own.clone();
            let opened = blocking(move || GuestImage::own(&own)).await?;
            return opened.map_err(guest::image_failed);
        }
        let workload = spec.workload.as_ref().map(|w| w.program.clone());
        let kerf = self.config.kerf.as_ref();
        let kerf = kerf.map(|kerf| kerf.module(spec.kernel.release()));
        if let Some(module) = kerf.as_ref().filter(|module| !module.is_file()) {
            return Err(SpawnError::Unavailable(format!(
                "{module:?} does not exist; build it with make kmod, or name the directory of modules with \
                 qemu.kerf_modules"
            )));
        }
        let recipe = Recipe {
            release: spec.kernel.release().to_owned(),
            modules: guest::modules_of(spec, self.config.modules.as_deref()),
            needed: match kerf {
                None => &NEEDED,
                Some(_) => &NEEDED_BY_KERF,
            },
            welcome: &WELCOME,
            agent: self.config.agent.clone(),
            kerf,
            programs: workload.into_iter().collect(),
        };
        let cache = self.config.cache.clone();
        let built = blocking(move || recipe.image(&cache)).await?;
        built.map_err(guest::image_failed)
    }

    /// Creates the run directory with all files that the processes need.
    pub(super) async fn prepare(&self, spec: &SpawnSpec) -> Result<Prepared, SpawnError> {
        let accelerator = self.accelerator(spec.kernel.path()).await?;
        self.version()
            .await?
            .check(accelerator, spec.kernel.release())?;
        let image = self.image(spec).await?;
        let mut placement = self.placement(spec);
        let fail = system(spec);
        let directory = run_dir::create(spec).map_err(fail("making the run directory"))?;
        let key = key::make().map_err(fail("making the agent's key"))?;
        key::keep(&directory, &key).map_err(fail("keeping the agent's key"))?;
        let config = guest::agent_config(spec, key, image.modules, None)
            .to_json()
            .map_err(|e| fail("writing the agent's configuration")(e.into()))?;
        let boot = directory
            .empty_file(run_dir::INITRAMFS)
            .map_err(|e| fail("writing the guest image")(e.into()))?;
        let mut base = image.archive;
        blocking(move || guest::with_configuration(&mut base, &config, boot))
            .await?
            .map_err(fail("writing the guest image"))?;
        let cgroups = self.config.cgroups.as_ref().as_ref().ok();
        let (cgroup, containment) = finding::contain(cgroups, &spec.name, spec.generation)
            .map_err(fail("making a cgroup"))?;
        placement.containment = containment;
        if let Err(error) = finding::announce(&placement, &start::ROLES) {
            let _ = finding::remove_cgroup(&placement.containment);
            return Err(fail("writing the placement")(error));
        }
        Ok(Prepared {
            placement,
            cgroup,
            kernel: spec.kernel.path().to_owned(),
            cmdline: spec.cmdline.clone(),
            cid: spec.cid,
            accelerator,
        })
    }

    fn placement(&self, spec: &SpawnSpec) -> Placement {
        let endpoint = if self.config.kerf.is_none() && Path::new(VHOST_VSOCK).exists() {
            Endpoint::Vsock { cid: spec.cid }
        } else {
            Endpoint::Unix {
                path: spec.run_dir.join(run_dir::VSOCK),
            }
        };
        Placement {
            backend: BackendKind::Qemu,
            name: spec.name.clone(),
            generation: spec.generation,
            processes: Vec::new(),
            endpoint,
            run_dir: spec.run_dir.clone(),
            cpus: spec.cpus.clone(),
            memory_bytes: spec.memory_bytes,
            kernel_release: spec.kernel.release().to_owned(),
            host_boot_id: self.host_boot_id.clone(),
            containment: Containment::default(),
            kernel_instance: None,
        }
    }
}
