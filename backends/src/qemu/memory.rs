//! The location of the guest's memory on the host: the memfd of QEMU's only memory backend, which holds the memory
//! below the hole first and the memory above it after that.
//!
//! A memfd disappears with the last process that has it open. The daemon keeps it open too, so that the memory of a
//! guest can be captured after its QEMU has exited; if it is to be captured, so does a helper process that survives the
//! daemon ([`keeping`]). The memory is freed when the generation is released, even if other processes still have it
//! mapped.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};

use super::{command, keeping};
use crate::contract::{MemoryRange, ProcessId};
use crate::process::Stat;

/// The memories kept open, by their QEMU.
#[derive(Debug, Default)]
pub(super) struct Held(Mutex<BTreeMap<ProcessId, File>>);

impl Held {
    fn all(&self) -> MutexGuard<'_, BTreeMap<ProcessId, File>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the memory of a guest open from now on. Returns false if its QEMU is gone and no helper process has kept
    /// the memory.
    pub(super) fn hold(&self, qemu: &ProcessId, run_dir: &Path) -> io::Result<bool> {
        let mut all = self.all();
        if all.contains_key(qemu) {
            return Ok(true);
        }
        let memory = match of_qemu(qemu)? {
            None => keeping::memory(run_dir)?,
            memory => memory,
        };
        let Some(memory) = memory else {
            return Ok(false);
        };
        all.insert(qemu.clone(), memory);
        Ok(true)
    }

    /// Makes the memory outlive this process too. Returns false if there is none.
    pub(super) fn keep(&self, qemu: &ProcessId, run_dir: &Path) -> io::Result<bool> {
        if !self.hold(qemu, run_dir)? {
            return Ok(false);
        }
        let held = self.all().get(qemu).map(File::try_clone).transpose()?;
        held.map_or(Ok(()), |memory| keeping::start(&memory, run_dir))?;
        Ok(true)
    }

    /// Stops keeping the memory of a guest open. Returns the memory, if it was kept; the caller gives it back to the
    /// host.
    pub(super) fn take(&self, qemu: &ProcessId) -> Option<File> {
        self.all().remove(qemu)
    }

    /// Returns the ranges of a guest of this size; none if its memory is gone.
    pub(super) fn ranges(
        &self,
        qemu: &ProcessId,
        run_dir: &Path,
        memory_bytes: u64,
    ) -> io::Result<Vec<MemoryRange>> {
        if !self.hold(qemu, run_dir)? {
            return Ok(Vec::new());
        }
        let descriptor = self.all().get(qemu).map(File::as_raw_fd);
        let own = std::process::id();
        let path = descriptor.map(|fd| PathBuf::from(format!("/proc/{own}/fd/{fd}")));
        Ok(path.map_or_else(Vec::new, |path| ranges(&path, memory_bytes)))
    }
}

/// Gives the memory in this file back to the host. Closing the file is not enough: the QEMU of a survivor with a
/// loan, or another reader, may have it mapped. They read zeros from now on; truncating the file would kill them,
/// and QEMU has sealed it against that.
pub(super) fn give_back(file: &File) -> io::Result<()> {
    let bytes = file.metadata()?.len();
    // The descriptor is open only for reading.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let writable = File::options().write(true).open(path)?;
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(writable, hole, 0, bytes)?)
}

fn ranges(host_path: &Path, memory_bytes: u64) -> Vec<MemoryRange> {
    let total = (memory_bytes >> 20) << 20;
    let low = total.min(command::LOW_MEMORY_BYTES);
    let range = |guest_address, host_offset, length| MemoryRange {
        guest_address,
        length,
        host_path: host_path.to_owned(),
        host_offset,
    };
    let mut ranges = vec![range(0, 0, low)];
    if total > low {
        ranges.push(range(command::HIGH_MEMORY_START, low, total - low));
    }
    ranges
}

/// Opens the memory of a running QEMU.
fn of_qemu(qemu: &ProcessId) -> io::Result<Option<File>> {
    let Some(path) = memfd(qemu.pid)? else {
        return Ok(None);
    };
    let opened = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    // Checked after the open: the file belongs to this QEMU, and not to another process that has reused its pid.
    let same = Stat::read(qemu.pid)?.is_some_and(|stat| stat.is(qemu));
    Ok(same.then_some(opened))
}

/// Returns the path of QEMU's descriptor of its memory.
fn memfd(pid: i32) -> io::Result<Option<PathBuf>> {
    let descriptors = match std::fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(descriptors) => descriptors,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for entry in descriptors {
        let path = entry?.path();
        if is_own_memory(&path) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Returns whether the descriptor is the guest's own memory. A loan is the memory of another guest and open
/// only for reading, which the permissions of its name in `/proc` show (proc_pid_fd(5)).
fn is_own_memory(descriptor: &Path) -> bool {
    let target = std::fs::read_link(descriptor).unwrap_or_default();
    let named = target.as_os_str().as_encoded_bytes();
    let can_write = |found: std::fs::Metadata| found.mode() & 0o200 != 0;
    named.starts_with(b"/memfd:memory-backend-memfd")
        && std::fs::symlink_metadata(descriptor).is_ok_and(can_write)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn in_proc(file: &impl AsRawFd) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }

    #[test]
    fn what_was_lent_is_not_taken_for_its_own() {
        let own = memfd_create("memory-backend-memfd", MemfdFlags::CLOEXEC).unwrap();
        let lent = File::open(in_proc(&own)).unwrap();
        let another = memfd_create("another", MemfdFlags::CLOEXEC).unwrap();
        assert!(is_own_memory(&in_proc(&own)));
        assert!(!is_own_memory(&in_proc(&lent)));
        assert!(!is_own_memory(&in_proc(&another)));
    }
}
