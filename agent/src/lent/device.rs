//! The device below a PCI port, in sysfs, and its memory.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::LentError;

/// Longest wait for the device: the daemon's word can be here before the hot-plug's event is handled. An idle kernel
/// takes milliseconds, in software emulation too.
pub const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two looks for it: sysfs tells of no changes.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// QEMU's ivshmem device: vendor and device id, as sysfs writes them.
const IVSHMEM: (&str, &str) = ("0x1af4", "0x1110");
/// Its memory, the way that is read fastest first: through a write-combining mapping, then through an uncached one.
const MEMORY: [&str; 2] = ["resource2_wc", "resource2"];
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

/// Why there is nothing to read yet.
enum Miss {
    /// The device may still appear.
    NotYet(String),
    /// The device will not appear.
    Never(LentError),
}

/// Waits for the device's memory.
pub(super) fn appear(
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
                found: format!("the port also has {other}"),
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
