//! Reads and checks the kernel image of a generation, and compares it with the recorded one.

use std::path::Path;

use kmorph_backends::contract::BackendKind;
use kmorph_backends::kernel_image::{BadImage, KernelImage};

use crate::model::rows::KernelChoice;
use crate::model::{Failure, FailureKind};
use crate::platform::ambient;

/// Reads and checks a kernel image off this thread.
///
/// # Errors
/// When the image is not usable, or differs from the recorded one.
pub(super) async fn read_kernel(
    path: &Path,
    recorded: Option<&str>,
) -> Result<KernelImage, Failure> {
    let owned = path.to_owned();
    let read = ambient::blocking(move || KernelImage::read(&owned)).await;
    let image = read
        .map_err(|e| Failure::new(FailureKind::Internal, format!("reading {path:?}: {e}")))?
        .map_err(|e| image_refused(&e))?;
    if recorded.is_some_and(|sha256| sha256 != image.sha256()) {
        let text = format!("the kernel image {path:?} has changed since it was recorded");
        return Err(Failure::new(FailureKind::KernelChanged, text)
            .hint("morph the instance to the new image instead of replacing the file"));
    }
    Ok(image)
}

/// Returns the kind of failure: caused by the file, by the caller, or by the machine.
fn image_refused(error: &BadImage) -> Failure {
    use std::io::ErrorKind;
    let (code, hint) = match error {
        BadImage::NotAKernel { .. } => (FailureKind::BadKernelImage, None),
        BadImage::Unreadable { source, .. } => match source.kind() {
            ErrorKind::NotFound
            | ErrorKind::NotADirectory
            | ErrorKind::InvalidFilename
            | ErrorKind::PermissionDenied => {
                let hint = "the daemon opens it itself: name a file that its user can read";
                (FailureKind::KernelUnreadable, Some(hint))
            }
            // No descriptors, no memory, or a disk error.
            _ => (
                FailureKind::Unavailable,
                Some("the image was not judged; try again"),
            ),
        },
    };
    let refusal = Failure::new(code, error.to_string());
    match hint {
        Some(hint) => refusal.hint(hint),
        None => refusal,
    }
}

/// Refuses boot parameters if the backend does not boot a kernel.
///
/// # Errors
/// When the backend `kind` boots no kernel, and a command line or an initramfs is given.
pub(crate) fn check_boot(
    kind: BackendKind,
    cmdline: Option<&str>,
    initramfs: Option<&Path>,
) -> Result<(), Failure> {
    let what = match (cmdline, initramfs) {
        _ if kind.boots_kernels() => return Ok(()),
        (Some(cmdline), _) if !cmdline.is_empty() => "a kernel command line",
        (_, Some(_)) => "an initramfs",
        _ => return Ok(()),
    };
    let kind = kind.as_str();
    let text = format!("{what} has no effect in the backend {kind}: it boots no kernel");
    Err(Failure::new(FailureKind::WrongState, text).hint(
        "leave it out, or set `backend = \"qemu\"` in the daemon's configuration to boot kernels",
    ))
}

/// Returns the record of the kernel that a generation will run. Reads and checks the image.
///
/// # Errors
/// When the path is not absolute, or the image is not usable.
pub(crate) async fn choose_kernel(
    path: &Path,
    cmdline: String,
    initramfs: Option<&Path>,
) -> Result<KernelChoice, Failure> {
    if !path.is_absolute() {
        let text = format!("the kernel path {path:?} is not absolute");
        return Err(Failure::new(FailureKind::InvalidRequest, text));
    }
    let image = read_kernel(path, None).await?;
    Ok(KernelChoice {
        path: path.to_owned(),
        release: image.release().to_owned(),
        sha256: image.sha256().to_owned(),
        cmdline,
        initramfs: initramfs.map(Into::into),
    })
}
