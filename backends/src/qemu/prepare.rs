//! What is made before the processes of a guest are started: its image, its run directory.

use std::path::{Path, PathBuf};

use kmorph_launch::{AgentConfig, Listen, Role};
use kmp_transport::link::KMP_PORT;

use super::command::Accelerator;
use super::guest_image::{self, GuestImage, ImageError, Recipe};
use super::{MEMORY_MIN_MIB, QemuBackend, VHOST_VSOCK, blocking, run_dir, system};
use crate::contract::{BackendKind, Endpoint, Placement, SpawnError, SpawnSpec};

/// A guest that is about to be started.
pub(super) struct Prepared {
    pub(super) placement: Placement,
    pub(super) kernel: PathBuf,
    pub(super) cmdline: String,
    pub(super) cid: u32,
    pub(super) accelerator: Accelerator,
}

impl QemuBackend {
    /// Where the modules of a kernel are.
    fn modules_of(&self, spec: &SpawnSpec) -> Option<PathBuf> {
        let beside = spec.kernel.path().parent().map(|p| p.join("lib/modules"));
        let places = [
            self.config.modules.clone(),
            beside,
            Some("/lib/modules".into()),
        ];
        let mut places = places.into_iter().flatten();
        places
            .find_map(|place| Some(place.join(spec.kernel.release())).filter(|root| root.is_dir()))
    }

    /// Refuses what cannot be started, before anything is made.
    pub(super) fn check(spec: &SpawnSpec) -> Result<(), SpawnError> {
        run_dir::check(&spec.run_dir)?;
        let mib = spec.memory_bytes >> 20;
        if mib < MEMORY_MIN_MIB {
            return Err(SpawnError::Refused(format!(
                "{mib} MiB are too few for a kernel; give at least {MEMORY_MIN_MIB}"
            )));
        }
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

    /// The image that the guest boots, without its configuration.
    async fn image(&self, spec: &SpawnSpec) -> Result<GuestImage, SpawnError> {
        if let Some(own) = &spec.initramfs {
            return Ok(GuestImage {
                path: own.clone(),
                modules: Vec::new(),
            });
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
            modules: self.modules_of(spec),
            agent: self.config.agent.clone(),
            kerf,
            programs: workload.into_iter().collect(),
        };
        let cache = self.config.cache.clone();
        let built = blocking(move || recipe.image(&cache)).await?;
        built.map_err(|error| match error {
            ImageError::File { what, path, source } => SpawnError::System {
                what: format!("building the guest image: {what} {path:?}"),
                source,
            },
            other => SpawnError::Unavailable(format!("building the guest image: {other}")),
        })
    }

    /// Makes the run directory with everything in it that the processes need.
    pub(super) async fn prepare(&self, spec: &SpawnSpec) -> Result<Prepared, SpawnError> {
        let accelerator = self.accelerator(spec.kernel.path()).await?;
        self.version()
            .await?
            .check(accelerator, spec.kernel.release())?;
        let image = self.image(spec).await?;
        let placement = self.placement(spec);
        let fail = system(spec);
        let config = agent_config(spec, image.modules)
            .to_json()
            .map_err(|e| fail("writing the agent's configuration")(e.into()))?;
        run_dir::create(spec).map_err(fail("making the run directory"))?;
        let boot = spec.run_dir.join(run_dir::INITRAMFS);
        let base = image.path;
        blocking(move || guest_image::with_configuration(&base, &config, &boot))
            .await?
            .map_err(fail("writing the guest image"))?;
        let record =
            serde_json::to_vec(&placement).map_err(|e| fail("writing the placement")(e.into()))?;
        std::fs::write(spec.run_dir.join(run_dir::PLACEMENT), record)
            .map_err(fail("writing the placement"))?;
        Ok(Prepared {
            placement,
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
        }
    }
}

fn agent_config(spec: &SpawnSpec, modules: Vec<PathBuf>) -> AgentConfig {
    let role = match spec.initramfs {
        None => Role::Init,
        Some(_) => Role::Service,
    };
    AgentConfig {
        instance: spec.name.clone(),
        generation: spec.generation,
        role,
        listen: Listen::Vsock { port: KMP_PORT },
        kernel_release: None,
        cpus: Vec::new(),
        memory_bytes: 0,
        workload: spec.workload.clone(),
        ports: spec.ports.clone(),
        start: spec.start,
        handover: None,
        predecessor: None,
        modules,
        vsock_option: None,
    }
}
