//! Checks whether a kernel may run beside the host's: both write to the same memory, and neither checks how the other
//! interprets it.
//!
//! The check comes before anything is created. A morph to an incompatible kernel ends there, and its source keeps
//! running.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use libkerf::btf::{self, Disagreement, Host};
use libkerf::image::MAX_IMAGE_BYTES;
use rustix::system::uname;

use crate::contract::SpawnError;
use crate::kernel_image::KernelImage;

/// Maximum number of cached images. A dropped image is read again, which takes a second.
const REMEMBERED_MAX: usize = 64;

/// How kmorph ensures that a kernel image has the same layout of shared memory as the host's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The types of both kernels are compared.
    Compared {
        /// File with the types of the host's kernel.
        running: PathBuf,
    },
    /// The layout is assumed to be compatible, without a check.
    Assumed,
}

impl Layout {
    /// Compares with the types of the running kernel.
    #[must_use]
    pub fn compared() -> Self {
        let running = btf::RUNNING.into();
        Self::Compared { running }
    }
}

/// Cached answers. The host's kernel stays the same while this process runs.
#[derive(Debug, Default)]
pub(super) struct Agreements {
    own: OnceLock<Own>,
    /// By the SHA-256 of the image.
    images: Mutex<HashMap<String, Result<(), Disagreement>>>,
}

/// The host kernel's identity and types.
#[derive(Debug)]
struct Own {
    release: String,
    version: String,
    types: Option<Vec<u8>>,
}

impl Own {
    fn read(running: &PathBuf) -> Self {
        let names = uname();
        let mut types = Vec::new();
        let read = File::open(running)
            .and_then(|file| file.take(btf::MAX_BTF_BYTES).read_to_end(&mut types));
        Self {
            release: names.release().to_string_lossy().into_owned(),
            version: names.version().to_string_lossy().into_owned(),
            types: read.is_ok().then_some(types),
        }
    }
}

impl Agreements {
    /// Checks whether the kernel in `image` may run beside the host's. Blocking; unpacks a new image.
    pub(super) fn check(&self, layout: &Layout, image: &KernelImage) -> Result<(), SpawnError> {
        let Layout::Compared { running } = layout else {
            return Ok(());
        };
        let known = self.images().get(image.sha256()).cloned();
        let said = match known {
            Some(said) => said,
            None => {
                let said = self.compare(running, image)?;
                let mut images = self.images();
                if images.len() >= REMEMBERED_MAX {
                    images.clear();
                }
                images.insert(image.sha256().to_owned(), said.clone());
                said
            }
        };
        said.map_err(|disagreement| {
            SpawnError::Refused(format!(
                "the kernel {:?} would not understand the host's in the memory that both write to: {disagreement}; {}",
                image.path(),
                remedy(&disagreement)
            ))
        })
    }

    fn images(&self) -> std::sync::MutexGuard<'_, HashMap<String, Result<(), Disagreement>>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn compare(
        &self,
        running: &PathBuf,
        image: &KernelImage,
    ) -> Result<Result<(), Disagreement>, SpawnError> {
        let mut bytes = Vec::new();
        let read = File::open(image.path())
            .and_then(|file| file.take(MAX_IMAGE_BYTES).read_to_end(&mut bytes));
        read.map_err(|source| SpawnError::System {
            what: format!("reading the kernel image {:?}", image.path()),
            source,
        })?;
        let own = self.own.get_or_init(|| Own::read(running));
        let host = Host {
            release: &own.release,
            version: &own.version,
            types: own.types.as_deref(),
        };
        Ok(btf::agree(host, &bytes))
    }
}

fn remedy(disagreement: &Disagreement) -> &'static str {
    match disagreement {
        Disagreement::Differs(_) => {
            "build both from one source, or boot the host with a kernel that agrees first"
        }
        Disagreement::HostUntold(_) | Disagreement::ImageUntold(_) => {
            "build both with CONFIG_MULTIKERNEL and CONFIG_DEBUG_INFO_BTF; where both are known to come from one source, \
             multikernel.layout = \"assumed\" runs it unasked"
        }
    }
}
