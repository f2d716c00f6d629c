use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::{KERF_LOCK, Lock, LockError, ROOT};
use crate::check::{self, Context, Report};
use crate::dtb::{self, DtbError, MAX_BLOB_BYTES};
use crate::machine::Machine;
use crate::model::{Instance, Kind, System};
use crate::overlay::{State, Status};
use crate::tree::DeviceTree;

/// Polling interval for a status: the kernel does not notify anyone of changes.
const POLL: Duration = Duration::from_millis(20);

/// Default time that a change waits for others in progress.
const PATIENCE: Duration = Duration::from_secs(10);

/// Maximum number of instances: the number of ids.
const MAX_INSTANCES: usize = 2047;

/// The kernel's files.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub(super) root: PathBuf,
    pub(super) lock: PathBuf,
    pub(super) patience: Duration,
}

impl Default for Kernel {
    fn default() -> Self {
        Self::at(ROOT, KERF_LOCK)
    }
}

/// Why a request to the kernel failed.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A file does not exist, or cannot be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// The attempted action.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file does not contain a device tree.
    #[error("{}: {source}", path.display())]
    Tree {
        /// The file.
        path: PathBuf,
        /// The error in it.
        source: DtbError,
    },
    /// The pool does not exist yet.
    #[error("{} shows no pool: write a baseline to it first, with kerf init", path.display())]
    NoPool {
        /// The root tree.
        path: PathBuf,
    },
    /// A file has unknown contents.
    #[error("{} says {text:?}", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Its contents.
        text: String,
    },
    /// A status was not reached in time.
    #[error("instance {name:?} is {is} after {} ms, not {wanted}", waited.as_millis())]
    Late {
        /// The instance.
        name: String,
        /// The actual status.
        is: &'static str,
        /// The expected status.
        wanted: &'static str,
        /// Time waited.
        waited: Duration,
    },
    /// A tree violates rules.
    #[error("the tree breaks rules:\n{0}")]
    Invalid(Report),
}

impl Kernel {
    /// Uses the kernel's files in this directory, and this lock for changes.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>, lock: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            lock: lock.into(),
            patience: PATIENCE,
        }
    }

    /// Sets the maximum time that a change waits for others in progress.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Removes the lock that another process with this library has left behind ([`Lock::remove_left`]).
    ///
    /// # Errors
    ///
    /// If it cannot be examined.
    pub fn remove_left_lock(&self) -> Result<bool, LockError> {
        Lock::remove_left(&self.lock)
    }

    /// Returns the pool's current tree.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or shows no pool.
    pub fn pool(&self) -> Result<DeviceTree, KernelError> {
        let path = self.root.join("device_tree");
        let tree = read_tree(&path)?;
        match Kind::of(&tree) {
            Kind::Pool => Ok(tree),
            _ => Err(KernelError::NoPool { path }),
        }
    }

    /// Returns the names of all instances, sorted.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn instance_names(&self) -> Result<Vec<String>, KernelError> {
        let path = self.root.join("instances");
        let failed = |source| io_error("reading", &path, source);
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(failed)?.take(MAX_INSTANCES) {
            let entry = entry.map_err(failed)?;
            names.extend(entry.file_name().to_str().map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// Returns the tree that the kernel serves for one instance.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is not a device tree.
    pub fn instance_tree(&self, name: &str) -> Result<DeviceTree, KernelError> {
        read_tree(&self.instance_path(name).join("device_tree"))
    }

    /// Returns the resources of one instance.
    ///
    /// # Errors
    ///
    /// If its tree cannot be read, or is not that of an instance.
    pub fn instance(&self, name: &str) -> Result<Instance, KernelError> {
        match check::instance(&self.instance_tree(name)?) {
            (Some(instance), _) => Ok(instance),
            (None, report) => Err(KernelError::Invalid(report)),
        }
    }

    /// Returns the status of one instance.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn status(&self, name: &str) -> Result<Status, KernelError> {
        let path = self.instance_path(name).join("status");
        let text = read_text(&path)?;
        Status::parse(&text).ok_or(KernelError::Unknown { path, text })
    }

    /// Waits until an instance has this status.
    ///
    /// # Errors
    ///
    /// If the status cannot be read, or is not reached in time.
    pub fn wait_for(
        &self,
        name: &str,
        wanted: Status,
        patience: Duration,
    ) -> Result<(), KernelError> {
        let start = Instant::now();
        loop {
            let is = self.status(name)?;
            if is == wanted {
                return Ok(());
            }
            if start.elapsed() >= patience {
                return Err(KernelError::Late {
                    name: name.to_owned(),
                    is: is.as_str(),
                    wanted: wanted.as_str(),
                    waited: start.elapsed(),
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Returns pool, instances and their status. An instance that disappears in the meantime is left out.
    ///
    /// # Errors
    ///
    /// If something cannot be read, or is inconsistent.
    pub fn state(&self, machine: Option<&Machine>) -> Result<State, KernelError> {
        let (mut system, report) = check::system(&self.pool()?, Context { machine: None });
        if !report.is_valid() {
            return Err(KernelError::Invalid(report));
        }
        let mut status = Vec::new();
        for name in self.instance_names()? {
            match (self.instance(&name), self.status(&name)) {
                (Ok(instance), Ok(does)) => {
                    system.instances.push(instance);
                    status.push((name, does));
                }
                (Err(error), _) | (_, Err(error)) if !is_gone(&error) => return Err(error),
                _ => {}
            }
        }
        let mut state = State::new(system);
        state.status.extend(status);
        Ok(match machine {
            Some(machine) => state.on(machine),
            None => state,
        })
    }

    /// Writes a baseline, which creates the pool, once. Checks the baseline first, and reads the pool back.
    ///
    /// # Errors
    ///
    /// If the baseline violates rules, or the kernel refuses it.
    pub fn write_baseline(
        &self,
        baseline: &DeviceTree,
        context: Context<'_>,
    ) -> Result<System, KernelError> {
        let (_, report) = check::baseline(baseline, context);
        if !report.is_valid() {
            return Err(KernelError::Invalid(report));
        }
        let path = self.root.join("device_tree");
        let blob = dtb::write(baseline).map_err(|source| KernelError::Tree {
            path: path.clone(),
            source,
        })?;
        write_at_once(&path, &blob)
            .map_err(|source| io_error("writing a baseline to", &path, source))?;
        Ok(check::system(&self.pool()?, Context::default()).0)
    }

    fn instance_path(&self, name: &str) -> PathBuf {
        self.root.join("instances").join(name)
    }
}

fn is_gone(error: &KernelError) -> bool {
    matches!(error, KernelError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

pub(super) fn io_error(action: &'static str, path: &Path, source: io::Error) -> KernelError {
    KernelError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

fn read_tree(path: &Path) -> Result<DeviceTree, KernelError> {
    let bytes = read_bytes(path)?;
    dtb::read(&bytes).map_err(|source| KernelError::Tree {
        path: path.to_owned(),
        source,
    })
}

/// Reads a file, up to the maximum size of a tree.
pub(super) fn read_bytes(path: &Path) -> Result<Vec<u8>, KernelError> {
    let limit = MAX_BLOB_BYTES as u64 + 1;
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    read.map_err(|source| io_error("reading", path, source))?;
    Ok(bytes)
}

pub(super) fn read_text(path: &Path) -> Result<String, KernelError> {
    let bytes = read_bytes(path)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// Writes in one call: the kernel treats each call as a whole tree.
pub(super) fn write_at_once(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    let written = file.write(bytes)?;
    if written == bytes.len() {
        return Ok(());
    }
    let message = format!("the kernel accepted {written} of {} bytes", bytes.len());
    Err(io::Error::new(io::ErrorKind::WriteZero, message))
}
