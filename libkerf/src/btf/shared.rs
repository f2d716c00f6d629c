//! Checks whether a kernel image agrees with the host's kernel.

use std::fmt;

use thiserror::Error;

use super::{BtfError, Member, Types};
use crate::image;

/// The structures in memory that a host's kernel and the kernels beside it share, by their names in
/// `include/linux/multikernel.h`, `arch/x86/include/asm/multikernel.h` and `include/uapi/linux/multikernel_virtio.h` of
/// multikernel Linux. Not every kernel has all of them; a structure that only one of two kernels has is not compared.
pub const SHARED: [&str; 14] = [
    "mk_shared_data",
    "mk_ipi_ring",
    "mk_ipi_data",
    "mk_spawn_context",
    "mk_message",
    "mk_io_irq_payload",
    "mk_cpu_resource_payload",
    "mk_mem_resource_payload",
    "mk_device_resource_payload",
    "mk_resource_ack",
    "mk_shutdown_payload",
    "mk_virtio_table",
    "mk_virtio_entry",
    "mk_virtio_queue",
];
/// A kernel without this structure is not a multikernel kernel, or its types are incomplete.
const NEEDED: &str = "mk_shared_data";

/// The host kernel's identity and types.
#[derive(Clone, Copy, Debug)]
pub struct Host<'h> {
    /// Its release, as in uname(2).
    pub release: &'h str,
    /// Its version, as in uname(2): number and time of the build.
    pub version: &'h str,
    /// Its types, [`super::RUNNING`]; `None` if it shows none.
    pub types: Option<&'h [u8]>,
}

/// A structure on which two kernels do not agree, with the first difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its name.
    pub structure: &'static str,
    /// The member in the host's kernel; `None` after the last one.
    pub host: Option<Member>,
    /// The member in the image; `None` after the last one.
    pub image: Option<Member>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = |member: &Option<Member>| match member {
            Some(member) => member.to_string(),
            None => "nothing".to_owned(),
        };
        write!(
            f,
            "in struct {} the host's kernel has {}, the image {}",
            self.structure,
            said(&self.host),
            said(&self.image)
        )
    }
}

/// Why a kernel must not run beside the host's kernel.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Disagreement {
    /// The kernels have different layouts of shared memory.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Differs(Vec<Difference>),
    /// The host's kernel does not describe its layout of shared memory.
    #[error("the host's kernel does not describe the layout of the memory that kernels share: {0}")]
    HostUntold(String),
    /// The image does not describe its layout.
    #[error("the image does not describe the layout of the memory that kernels share: {0}")]
    ImageUntold(String),
}

/// Checks that the kernel in `image` has the same layout of shared memory as the host's kernel: the image is the same
/// build, or the types of both agree.
///
/// # Errors
///
/// The disagreement, or the side without type information.
pub fn agree(host: Host<'_>, image: &[u8]) -> Result<(), Disagreement> {
    if is_build(host, image) {
        return Ok(());
    }
    let untold = |error: BtfError| error.to_string();
    let shown = host.types.ok_or_else(|| "it shows no types".to_owned());
    let own = shown.and_then(|types| Types::read(types).map_err(untold));
    let own = own.and_then(has_needed).map_err(Disagreement::HostUntold)?;
    let unpacked = image::unpack(image);
    let unpacked = unpacked.map_err(|error| Disagreement::ImageUntold(error.to_string()))?;
    let other = Types::of_kernel(&unpacked).map_err(untold);
    let other = other
        .and_then(has_needed)
        .map_err(Disagreement::ImageUntold)?;
    let differences: Vec<_> = SHARED
        .into_iter()
        .filter_map(|structure| difference(&own, &other, structure))
        .collect();
    match differences.is_empty() {
        true => Ok(()),
        false => Err(Disagreement::Differs(differences)),
    }
}

fn has_needed(types: Types<'_>) -> Result<Types<'_>, String> {
    match types.layout(NEEDED) {
        Some(_) => Ok(types),
        None => Err(format!(
            "its types have no struct {NEEDED}: it is built without CONFIG_MULTIKERNEL, or of another generation"
        )),
    }
}

/// Returns whether the image is the running build: a bzImage's header contains release, builder and version.
fn is_build(host: Host<'_>, image: &[u8]) -> bool {
    let Some(said) = image::version(image) else {
        return false;
    };
    let rest = said.strip_prefix(host.release);
    let rest = rest.and_then(|rest| rest.strip_prefix(' '));
    !host.version.is_empty() && rest.is_some_and(|rest| rest.ends_with(host.version))
}

fn difference(own: &Types<'_>, other: &Types<'_>, structure: &'static str) -> Option<Difference> {
    // A kernel that does not have the structure does not write it either.
    let (host, image) = (own.layout(structure)?, other.layout(structure)?);
    let length = host.len().max(image.len());
    let at = (0..length).find(|at| host.get(*at) != image.get(*at))?;
    Some(Difference {
        structure,
        host: host.get(at).cloned(),
        image: image.get(at).cloned(),
    })
}
