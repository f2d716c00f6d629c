//! Memory of a dead kernel that was lent to this kernel: BAR 2 of an ivshmem device below a PCI port.
//!
//! ```text
//!  /sys/bus/pci/devices/0000:00:1e.0/0000:01:00.0/{vendor,device,enable,resource2_wc}
//!                       the port     the device
//! ```
//!
//! The device can be unplugged at any moment, and then SIGBUS kills any process that reads a mapping of it; for PID 1
//! that takes the whole kernel down. So the agent never reads a mapping. Instead the kernel copies the memory to a
//! memory file, and reports unreadable memory as an error of that call. A mapping lasts for one such copy only:
//! mapping everything would take 2 MiB of page tables per GiB.

mod device;
mod mapping;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};

pub use device::{APPEAR_TIMEOUT, PciAddress};

/// Bytes that are mapped and copied at a time.
const COPY_BYTES: u64 = 256 * 1024;

/// Why lent memory cannot be had, or not be read.
#[derive(Debug, thiserror::Error)]
pub enum LentError {
    /// The port's name is not a PCI address.
    #[error("{0:?} is not a PCI address, such as 0000:00:1e.0")]
    NotAnAddress(String),
    /// Nothing that can be read has appeared below the port.
    #[error("no lent memory appeared below the PCI port {port} within {APPEAR_TIMEOUT:?}: {last}")]
    NotThere {
        /// The port.
        port: PciAddress,
        /// The reason of the last attempt.
        last: String,
    },
    /// The device below the port is not lent memory.
    #[error("the device below the PCI port {port} is not lent memory: {found}")]
    Another {
        /// The port.
        port: PciAddress,
        /// The actual device.
        found: String,
    },
    /// A read from beyond the end of it.
    #[error("{length} bytes at {offset:#x} are outside the {bytes:#x} bytes of lent memory")]
    Beyond {
        /// The start of the range.
        offset: u64,
        /// Its length in bytes.
        length: usize,
        /// Bytes that there are.
        bytes: u64,
    },
    /// The system's reason. It may have been taken back.
    #[error("{what}: {source}")]
    System {
        /// The attempted action and its object.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// Memory that was lent to this kernel.
#[derive(Debug)]
pub struct Lent {
    file: File,
    path: PathBuf,
    bytes: u64,
    /// The file that the kernel copies to, [`COPY_BYTES`] at a time; one reader at a time.
    copied: Mutex<File>,
}

impl Lent {
    /// The lent memory below the PCI port `port`, such as `0000:00:1e.0`, which is untrusted input; `sysfs` is
    /// normally `/sys`. Waits up to [`APPEAR_TIMEOUT`] for the device, blocking this thread.
    ///
    /// # Errors
    /// If `port` is no PCI address, nothing has appeared below it in time, something else than lent memory hangs
    /// there, or the system refuses.
    pub fn below_port(sysfs: &Path, port: &str) -> Result<Self, LentError> {
        let port: PciAddress = port.parse()?;
        let (file, path) = device::appear(sysfs, &port, APPEAR_TIMEOUT)?;
        let failed = |source| LentError::System {
            what: format!("preparing to read {path:?}"),
            source,
        };
        let bytes = file.metadata().map_err(failed)?.len();
        if bytes == 0 {
            let found = format!("{path:?} is empty");
            return Err(LentError::Another { port, found });
        }
        let copied = memfd_create("lent", MFdFlags::MFD_CLOEXEC).map_err(|e| failed(e.into()))?;
        Ok(Self {
            file,
            path,
            bytes,
            copied: Mutex::new(copied.into()),
        })
    }

    /// How much there is, in bytes; never 0.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Fills `into` with what lies at `offset`. Never ends in a signal.
    ///
    /// # Errors
    /// If that is not all within what was lent, or cannot be read (any more). `into` may be filled in part then.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), LentError> {
        let length = into.len();
        let within = u64::try_from(length)
            .ok()
            .and_then(|length| offset.checked_add(length))
            .is_some_and(|end| end <= self.bytes);
        if !within {
            let bytes = self.bytes;
            return Err(LentError::Beyond {
                offset,
                length,
                bytes,
            });
        }
        let copied = self.copied.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut at, mut rest) = (offset, into);
        while !rest.is_empty() {
            let count = mapping::copy(&self.file, at, rest.len(), &copied)
                .and_then(|count| copied.read_exact_at(&mut rest[..count], 0).map(|()| count))
                .map_err(|source| LentError::System {
                    what: format!("reading {:?} at {at:#x}", self.path),
                    source,
                })?;
            at += count as u64;
            rest = &mut rest[count..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PORT: &str = "0000:00:1e.0";

    /// A directory that looks like sysfs with one device below the port, and the memory it lends.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn empty() -> Self {
            let sysfs = Self(tempfile::tempdir().unwrap());
            // Other entries below a port.
            std::fs::create_dir_all(sysfs.port().join("0000:00:1e.0:pcie001")).unwrap();
            std::fs::create_dir(sysfs.port().join("power")).unwrap();
            sysfs
        }

        fn with(memory: &[u8]) -> Self {
            let sysfs = Self::empty();
            sysfs.plug("0000:01:00.0", "0x1110", memory);
            sysfs
        }

        fn port(&self) -> PathBuf {
            self.0.path().join("bus/pci/devices").join(PORT)
        }

        fn memory(&self) -> PathBuf {
            self.port().join("0000:01:00.0/resource2")
        }

        fn plug(&self, address: &str, kind: &str, memory: &[u8]) {
            // Complete at once, so that a reader that waits for it does not see half of it.
            let made = self.0.path().join("made");
            std::fs::create_dir(&made).unwrap();
            std::fs::write(made.join("vendor"), "0x1af4\n").unwrap();
            std::fs::write(made.join("device"), format!("{kind}\n")).unwrap();
            std::fs::write(made.join("enable"), "0\n").unwrap();
            std::fs::write(made.join("resource2"), memory).unwrap();
            std::fs::rename(made, self.port().join(address)).unwrap();
        }

        fn lent(&self) -> Result<Lent, LentError> {
            Lent::below_port(self.0.path(), PORT)
        }
    }

    /// Bytes that differ from their neighbours and from those a page on.
    fn pattern(length: usize) -> Vec<u8> {
        let byte = |at: usize| ((at ^ (at >> 8) ^ (at >> 16)) % 256).try_into().unwrap();
        (0..length).map(byte).collect()
    }

    #[test]
    fn what_was_lent_is_read_wherever_a_read_begins() {
        let copy = usize::try_from(COPY_BYTES).unwrap();
        let memory = pattern(3 * copy);
        let sysfs = Sysfs::with(&memory);
        let lent = sysfs.lent().unwrap();
        assert_eq!(lent.len(), 3 * COPY_BYTES);
        let enabled = std::fs::read_to_string(sysfs.memory().with_file_name("enable"));
        assert_eq!(enabled.unwrap(), "1");
        for (offset, length) in [
            (0, 3 * copy),
            (1, 1),
            (4095, 2),
            (70_000, 2 * copy),
            (3 * copy - 1, 1),
            (3 * copy, 0),
        ] {
            let mut read = vec![0; length];
            lent.read(offset as u64, &mut read).unwrap();
            assert!(
                read == memory[offset..offset + length],
                "{length} at {offset}"
            );
        }
        for (offset, length) in [(3 * COPY_BYTES, 1), (1, 3 * copy), (u64::MAX, 2)] {
            let error = lent.read(offset, &mut vec![0; length]).unwrap_err();
            assert!(matches!(error, LentError::Beyond { .. }), "{error}");
        }
    }

    #[test]
    fn memory_that_goes_while_it_is_read_is_an_error_and_no_signal() {
        let memory = pattern(1 << 20);
        let sysfs = Sysfs::with(&memory);
        let lent = sysfs.lent().unwrap();
        let file = File::options().write(true).open(sysfs.memory()).unwrap();
        file.set_len(1 << 19).unwrap();
        let error = lent.read(1 << 19, &mut [0; 4096]).unwrap_err();
        assert!(error.to_string().contains("Bad address"), "{error}");
        // Also where only the end of what is read has gone; and the rest can still be read.
        assert!(lent.read(0, &mut vec![0; 1 << 20]).is_err());
        let mut read = vec![0; 1 << 19];
        lent.read(0, &mut read).unwrap();
        assert!(read == memory[..1 << 19]);
    }

    #[test]
    fn no_path_is_made_of_what_is_not_an_address() {
        let sysfs = Sysfs::with(&[7; 4096]);
        for port in [
            "",
            ".",
            "..",
            "0000:00:1e",
            "0000:00:1e.0/",
            "0000:00:1e.0\0",
            "0000:00:1e.8",
            "0000:00:1E.0",
            " 0000:00:1e.0",
            "../../00:1e.0",
            "/000:00:1e.0",
            "0000:00/1e.0",
            "0000:00:\u{e9}e.0",
            &"0000:00:1e.0".repeat(1000),
        ] {
            let error = Lent::below_port(sysfs.0.path(), port).unwrap_err();
            assert!(matches!(error, LentError::NotAnAddress(_)), "{error}");
            assert!(error.to_string().len() < 300, "{error}");
        }
    }

    #[test]
    fn only_one_ivshmem_device_with_memory_is_lent_memory() {
        let another = |sysfs: &Sysfs, expected: &str| {
            let error = sysfs.lent().unwrap_err();
            assert!(matches!(error, LentError::Another { .. }), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        let sysfs = Sysfs::empty();
        sysfs.plug("0000:01:00.0", "0x1041", &[7; 4096]);
        another(&sysfs, "0x1af4:0x1041");
        let enable = sysfs.memory().with_file_name("enable");
        assert_eq!(std::fs::read_to_string(enable).unwrap(), "0\n", "touched");

        let sysfs = Sysfs::with(&[7; 4096]);
        sysfs.plug("0000:01:00.1", "0x1110", &[7; 4096]);
        another(&sysfs, "also has");

        another(&Sysfs::with(&[]), "empty");
    }

    #[test]
    fn a_device_that_appears_a_moment_later_is_waited_for() {
        let sysfs = Sysfs::empty();
        let port = PORT.parse().unwrap();
        let error = device::appear(sysfs.0.path(), &port, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("has no device"), "{error}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| sysfs.lent());
            sysfs.plug("0000:01:00.0", "0x1110", &[7; 4096]);
            assert_eq!(waiting.join().unwrap().unwrap().len(), 4096);
        });
    }
}
