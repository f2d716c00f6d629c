//! Loads files, and records them.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;

use super::{BootError, Calls, Kernel};
use crate::image::{self, UnpackError};
use crate::record::{Image, Initrd, Record, RecordError, Records, read_image};

/// The files to load into an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// The kernel image: a `vmlinux`, or a bzImage, which is unpacked first.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Why files were not loaded or not recorded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// A file cannot be read. Nothing was done.
    #[error("{0}; nothing was loaded")]
    File(RecordError),
    /// A bzImage cannot be unpacked. Nothing was done.
    #[error("{}: {source}; nothing was loaded", path.display())]
    Packed {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: UnpackError,
    },
    /// Not enough memory for the unpacked kernel. Nothing was done.
    #[error("making a file in memory for the unpacked kernel: {0}; nothing was loaded")]
    Memory(io::Error),
    /// The kernel refused the load.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The kernel is loaded, but not recorded: kerf shows the instance without its image.
    #[error("the kernel is loaded, but that is not recorded: {0}")]
    Unrecorded(RecordError),
    /// The kernel is unloaded, but the record still exists.
    #[error("the kernel is unloaded, but its record is still there: {0}")]
    StillRecorded(RecordError),
}

impl Kernel {
    /// Loads a kernel from files and records its origin, as `kerf load` does: path, size, SHA-256 and
    /// version of the loaded files, and the time. Keeps other contents of an earlier record, except the
    /// root file system, which belonged to the earlier kernel.
    ///
    /// # Errors
    ///
    /// Why the kernel was not loaded, or not recorded.
    pub fn load_files(
        &self,
        calls: &(impl Calls + ?Sized),
        name: &str,
        files: &Files,
        records: &Records,
    ) -> Result<Record, LoadError> {
        // The same bytes are recorded and loaded: the record describes the running kernel.
        let mut kernel = open(&files.kernel)?;
        let bytes = read_image(&files.kernel, &mut kernel).map_err(LoadError::File)?;
        let unpacked = image::unpack(&bytes).map_err(|source| LoadError::Packed {
            path: files.kernel.clone(),
            source,
        })?;
        if let Cow::Owned(unpacked) = &unpacked {
            kernel = in_memory(unpacked).map_err(LoadError::Memory)?;
        }
        let mut record = records
            .load(name)
            .map_err(LoadError::File)?
            .unwrap_or_default();
        record.kernel = Some(Image::of_kernel_bytes(&files.kernel, &bytes));
        record.rootfs = None;
        record.initrd = None;
        let mut initrd = None;
        if let Some(path) = &files.initrd {
            let mut file = open(path)?;
            let image = Image::of_open_initrd(path, &mut file).map_err(LoadError::File)?;
            record.initrd = Some(Initrd::Image(image));
            initrd = Some(file);
        }
        let initrd = initrd.as_ref().map(|file| file.as_fd());
        self.load(calls, name, kernel.as_fd(), initrd, &files.cmdline)?;
        record.loaded_now();
        records.save(name, &record).map_err(LoadError::Unrecorded)?;
        Ok(record)
    }

    /// Unloads an instance's kernel and removes its record, as `kerf unload` does.
    ///
    /// # Errors
    ///
    /// Why the kernel was not unloaded, or why its record still exists.
    pub fn unload_recorded(
        &self,
        calls: &(impl Calls + ?Sized),
        name: &str,
        records: &Records,
    ) -> Result<(), LoadError> {
        self.unload(calls, name)?;
        records.remove(name).map_err(LoadError::StillRecorded)
    }
}

/// Returns a file that exists only in memory, until it is closed.
fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"kernel", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

fn open(path: &Path) -> Result<File, LoadError> {
    File::open(path).map_err(|source| {
        LoadError::File(RecordError::Io {
            action: "reading",
            path: path.to_owned(),
            source,
        })
    })
}
