//! Memory of a dead kernel that was lent to this one: BAR 2 of an ivshmem device below a PCI port.
//!
//! ```text
//!  /sys/bus/pci/devices/0000:00:1e.0/0000:01:00.0/{vendor,device,enable,resource2_wc}
//!                       the port     the device
//! ```
//!
//! The device can be unplugged at any moment, and whoever reads a mapping of it then is ended by SIGBUS: as PID 1,
//! with the whole kernel. So nothing here reads a mapping. The kernel does, into a memory file, and what it cannot
//! read is an error of that call. A mapping lasts as long as one such copy: one of everything would take tables of
//! 2 MiB for each GiB.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Longest wait for the device: the daemon's word can be here before the hot-plug's event is handled. An idle kernel
/// takes milliseconds, in software emulation too.
pub const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two looks for it: sysfs tells of no changes.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// QEMU's ivshmem device: vendor and device id, as sysfs writes them.
const IVSHMEM: (&str, &str) = ("0x1af4", "0x1110");
/// Its memory, the way that is read fastest first: through a write-combining mapping, then through an uncached one.
const MEMORY: [&str; 2] = ["resource2_wc", "resource2"];
/// Bytes that are mapped and copied at a time.
const COPY_BYTES: u64 = 256 * 1024;
/// Mappings begin at a multiple of this, bytes: of any page size that Linux has.
const MAP_ALIGN: u64 = 64 * 1024;

/// Why lent memory cannot be had, or not be read.
#[derive(Debug, thiserror::Error)]
pub enum LentError {
    /// The port's name is not a PCI address.
    #[error("{0:?} is not a PCI address, such as 0000:00:1e.0")]
    NotAnAddress(String),
    /// Nothing that can be read has appeared below the port.
    #[error("nothing to read appeared below the PCI port {port} within {APPEAR_TIMEOUT:?}: {last}")]
    NotThere {
        /// The port.
        port: PciAddress,
        /// What was missing last.
        last: String,
    },
    /// What hangs below the port is not what is lent.
    #[error("what hangs below the PCI port {port} is no lent memory: {found}")]
    Another {
        /// The port.
        port: PciAddress,
        /// What it is instead.
        found: String,
    },
    /// A read from beyond the end of it.
    #[error("{length} bytes at {offset:#x} are not within the {bytes:#x} bytes that were lent")]
    Beyond {
        /// Where it began.
        offset: u64,
        /// Its length in bytes.
        length: usize,
        /// Bytes that there are.
        bytes: u64,
    },
    /// The system's reason. It may have been taken back.
    #[error("{what}: {source}")]
    System {
        /// What was tried, on what.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// Address of a PCI function, as sysfs writes it: `0000:00:1e.0`. Never a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress(String);

impl FromStr for PciAddress {
    type Err = LentError;

    fn from_str(text: &str) -> Result<Self, LentError> {
        // Domain, bus, device, function. Linux writes a longer domain where its bridge is virtual: no port of ours.
        let fits = text.len() == 12
            && text.bytes().enumerate().all(|(at, byte)| match at {
                4 | 7 => byte == b':',
                10 => byte == b'.',
                11 => matches!(byte, b'0'..=b'7'),
                _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
            });
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(LentError::NotAnAddress(text.chars().take(32).collect()))
        }
    }
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Memory that was lent to this kernel.
#[derive(Debug)]
pub struct Lent {
    file: File,
    path: PathBuf,
    bytes: u64,
    /// Where the kernel copies to, [`COPY_BYTES`] at a time; one reader at a time.
    copied: Mutex<File>,
}

impl Lent {
    /// What hangs below the PCI port `port`, such as `0000:00:1e.0`, which may come from anybody; `sysfs` is normally
    /// `/sys`. Waits up to [`APPEAR_TIMEOUT`] for it, blocking this thread.
    ///
    /// # Errors
    /// When `port` is no PCI address, nothing has appeared below it in time, something else than lent memory hangs
    /// there, or the system refuses.
    pub fn below_port(sysfs: &Path, port: &str) -> Result<Self, LentError> {
        let port: PciAddress = port.parse()?;
        let (file, path) = appear(sysfs, &port, APPEAR_TIMEOUT)?;
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
    /// When that is not all within what was lent, or cannot be read (any more). `into` may be filled in part then.
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

/// Why there is nothing to read yet.
enum Miss {
    /// It may come.
    NotYet(String),
    /// It will not.
    Never(LentError),
}

/// Waits for the device's memory.
fn appear(
    sysfs: &Path,
    port: &PciAddress,
    timeout: Duration,
) -> Result<(File, PathBuf), LentError> {
    let begun = Instant::now();
    loop {
        match find(sysfs, port) {
            Ok(found) => return Ok(found),
            Err(Miss::Never(error)) => return Err(error),
            Err(Miss::NotYet(last)) if begun.elapsed() > timeout => {
                let port = port.clone();
                return Err(LentError::NotThere { port, last });
            }
            Err(Miss::NotYet(_)) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

/// Enables the one device below the port and opens its memory.
fn find(sysfs: &Path, port: &PciAddress) -> Result<(File, PathBuf), Miss> {
    let at_port = sysfs.join("bus/pci/devices").join(&port.0);
    let device = at_port.join(child(&at_port, port)?.0);
    let vendor = attribute(&device.join("vendor"))?;
    let kind = attribute(&device.join("device"))?;
    if (vendor.as_str(), kind.as_str()) != IVSHMEM {
        return Err(Miss::Never(LentError::Another {
            port: port.clone(),
            found: format!("a device {vendor}:{kind}"),
        }));
    }
    // These files come last: before them the device has no addresses yet, and cannot be enabled.
    let memory = MEMORY.map(|name| device.join(name));
    let opened = memory.into_iter().find_map(|path| {
        let file = File::open(&path);
        (!matches!(&file, Err(error) if error.kind() == ErrorKind::NotFound))
            .then_some((file, path))
    });
    let Some((file, path)) = opened else {
        return Err(Miss::NotYet(format!("{device:?} has no memory")));
    };
    let file = file.map_err(|error| missed(&path, error))?;
    let enable = device.join("enable");
    std::fs::write(&enable, "1").map_err(|error| missed(&enable, error))?;
    Ok((file, path))
}

/// The one device below the port.
fn child(at_port: &Path, port: &PciAddress) -> Result<PciAddress, Miss> {
    let missed = |error| missed(at_port, error);
    let mut only = None;
    for entry in std::fs::read_dir(at_port).map_err(missed)? {
        let name = entry.map_err(missed)?.file_name();
        let Some(address) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Some(other) = only.replace(address) {
            return Err(Miss::Never(LentError::Another {
                port: port.clone(),
                found: format!("{other} is not alone"),
            }));
        }
    }
    only.ok_or_else(|| Miss::NotYet(format!("{at_port:?} has no device")))
}

fn attribute(path: &Path) -> Result<String, Miss> {
    let text = std::fs::read_to_string(path).map_err(|error| missed(path, error))?;
    Ok(text.trim().to_owned())
}

fn missed(path: &Path, error: io::Error) -> Miss {
    let what = format!("{path:?}: {error}");
    let passing = match error.kind() {
        // Its entries come one after the other. While it goes, they cannot be read: those of the one before may.
        ErrorKind::NotFound => true,
        // A driver is looking at it, to leave it alone.
        ErrorKind::ResourceBusy => true,
        _ => error.raw_os_error() == Some(Errno::ENODEV as i32),
    };
    if passing {
        return Miss::NotYet(what);
    }
    let what = format!("opening lent memory: {path:?}");
    Miss::Never(LentError::System {
        what,
        source: error,
    })
}

/// All that touches addresses.
mod mapping {
    use super::*;
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

    /// Has the kernel copy at most `wanted` bytes at `offset` of `file` to the beginning of `to`; how many it has
    /// copied, at least one.
    pub(super) fn copy(
        file: impl AsFd,
        offset: u64,
        wanted: usize,
        to: &File,
    ) -> io::Result<usize> {
        let begin = offset / MAP_ALIGN * MAP_ALIGN;
        let skipped = usize::try_from(offset - begin).map_err(io::Error::other)?;
        let wanted = wanted.min(usize::try_from(COPY_BYTES).unwrap_or(usize::MAX));
        let length = NonZeroUsize::new(skipped + wanted).ok_or(ErrorKind::InvalidInput)?;
        let begin = i64::try_from(begin).map_err(io::Error::other)?;
        let access = ProtFlags::PROT_READ;
        // SAFETY: a new mapping at an address of the system's choice takes nothing from anybody.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, begin) }?;
        // SAFETY: these addresses are within the mapping, which lasts until after the call. No reference to them is
        // made and nothing here reads them: the kernel does, and answers EFAULT where it cannot.
        let copied = unsafe {
            let from = start.as_ptr().cast::<u8>().add(skipped);
            nix::libc::pwrite(
                std::os::fd::AsRawFd::as_raw_fd(to),
                from.cast_const().cast(),
                wanted,
                0,
            )
        };
        let copied = Errno::result(copied);
        // SAFETY: mapped above, and nothing points into it any more.
        unsafe { munmap(start, length.get()) }?;
        match usize::try_from(copied?) {
            Ok(0) | Err(_) => Err(ErrorKind::WriteZero.into()),
            Ok(count) => Ok(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: &str = "0000:00:1e.0";

    /// A directory that looks like sysfs with one device below the port, and the memory it lends.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn empty() -> Self {
            let sysfs = Self(tempfile::tempdir().unwrap());
            // What else hangs below a port.
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
        let byte = |at: usize| (at ^ (at >> 8) ^ (at >> 16)) as u8;
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
        another(&sysfs, "not alone");

        another(&Sysfs::with(&[]), "empty");
    }

    #[test]
    fn a_device_that_appears_a_moment_later_is_waited_for() {
        let sysfs = Sysfs::empty();
        let port = PORT.parse().unwrap();
        let error = appear(sysfs.0.path(), &port, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("has no device"), "{error}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| sysfs.lent());
            sysfs.plug("0000:01:00.0", "0x1110", &[7; 4096]);
            assert_eq!(waiting.join().unwrap().unwrap().len(), 4096);
        });
    }
}
