use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use thiserror::Error;

use super::files::read_text;
use super::{Calls, Command, Kernel, KernelError};
use crate::check::MAX_ID;
use crate::overlay::Status;

/// Path of the console devices.
pub const CONSOLE: &str = "/dev/mktty";

/// Maximum time by which the status lags behind a call that has returned.
const LAG: Duration = Duration::from_secs(2);

/// Whether an instance's CPUs are known to have stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// The kernel has waited for each of the CPUs.
    Confirmed,
    /// The kernel has told the CPUs to stop and does not report whether they did, as in generations D and E. Memory
    /// that they could still write to must not be reused.
    Unconfirmed,
}

/// Why a kernel was not loaded, booted or halted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A read failed or timed out.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The instance has another status. Nothing was done.
    #[error("cannot {action} {name:?}: it must be {wanted}, but it is {}; nothing was done", is.as_str())]
    State {
        /// The attempted action.
        action: &'static str,
        /// The instance.
        name: String,
        /// The actual status.
        is: Status,
        /// The required status.
        wanted: &'static str,
    },
    /// No kernel can be loaded for this id.
    #[error(
        "no kernel can be loaded for id {id} of {name:?}: the highest is {MAX_ID}; nothing was done"
    )]
    Id {
        /// The instance.
        name: String,
        /// Its id.
        id: u32,
    },
    /// The kernel accepted the boot, but the instance is not active: once active, it changes its status only when it
    /// ends.
    #[error("{name:?} was booted and {}: it is {} after {} ms; its console says why",
        match is {
            Status::Loaded => "its kernel ended while it booted, as after a panic",
            _ => "its kernel never ran",
        },
        is.as_str(), waited.as_millis())]
    Ended {
        /// The instance.
        name: String,
        /// The actual status.
        is: Status,
        /// Time waited.
        waited: Duration,
    },
    /// The command line contains a NUL.
    #[error("the command line holds a NUL byte; nothing was done")]
    CommandLine,
    /// The kernel refused.
    #[error("to {action} {name:?}: {source}{}", advice(action, source))]
    Refused {
        /// The attempted action.
        action: &'static str,
        /// The instance.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
}

/// Returns the meaning of a kernel error here.
fn advice(action: &str, error: &io::Error) -> &'static str {
    match (action, error.raw_os_error().map(Errno::from_raw)) {
        (_, Some(Errno::EPERM)) => {
            ": it requires CAP_SYS_BOOT, and a kernel that is not locked down"
        }
        ("load", Some(Errno::ENOEXEC)) => ": this kernel cannot load the format of the image",
        ("load", Some(Errno::EBUSY)) => {
            ": another load or halt is in progress, or an image is left over"
        }
        ("boot", Some(Errno::EBUSY)) => ": its CPUs have not stopped; halt it by force once more",
        ("boot", Some(Errno::ENOSPC)) => {
            ": the description of the host for it does not fit into 16 KiB"
        }
        ("halt", Some(Errno::ETIMEDOUT)) => ": it does not answer; halt it by force",
        _ => "",
    }
}

impl Kernel {
    /// Returns an instance's id.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn id(&self, name: &str) -> Result<u32, KernelError> {
        let path = self.root.join("instances").join(name).join("id");
        let text = read_text(&path)?;
        text.parse()
            .map_err(|_| KernelError::Unknown { path, text })
    }

    /// Loads a kernel: on x86 an uncompressed ELF image, from any source.
    ///
    /// # Errors
    ///
    /// Why the kernel was not loaded. Remains of a failed load are unloaded.
    pub fn load(
        &self,
        calls: &(impl Calls + ?Sized),
        name: &str,
        image: BorrowedFd<'_>,
        initrd: Option<BorrowedFd<'_>>,
        cmdline: &str,
    ) -> Result<(), BootError> {
        let cmdline = CString::new(cmdline).map_err(|_| BootError::CommandLine)?;
        let id = self.expect(name, "load", &[Status::Ready])?;
        if let Err(source) = calls.load(id, image, initrd, &cmdline) {
            // A failed load can leave a partial image, which blocks the next load. An instance that
            // runs by now is left alone.
            if self.status(name)? == Status::Ready {
                let _ = calls.unload(id);
            }
            return Err(refused("load", name, source));
        }
        Ok(self.wait_for(name, Status::Loaded, LAG)?)
    }

    /// Unloads an instance's kernel. Unlike the kernel's call, this function refuses to unload a running kernel.
    ///
    /// # Errors
    ///
    /// Why the kernel was not unloaded.
    pub fn unload(&self, calls: &(impl Calls + ?Sized), name: &str) -> Result<(), BootError> {
        let id = self.expect(name, "unload", &[Status::Loaded])?;
        calls
            .unload(id)
            .map_err(|source| refused("unload", name, source))?;
        Ok(self.wait_for(name, Status::Ready, LAG)?)
    }

    /// Boots the loaded kernel. An active instance does not necessarily run.
    ///
    /// # Errors
    ///
    /// Why the kernel was not booted.
    pub fn boot(&self, calls: &(impl Calls + ?Sized), name: &str) -> Result<(), BootError> {
        let id = self.expect(name, "boot", &[Status::Loaded])?;
        calls
            .reboot(Command::Boot, id)
            .map_err(|source| refused("boot", name, source))?;
        match self.wait_for(name, Status::Active, LAG) {
            Err(KernelError::Late { waited, .. }) => Err(BootError::Ended {
                name: name.to_owned(),
                is: self.status(name)?,
                waited,
            }),
            other => Ok(other?),
        }
    }

    /// Asks an instance's kernel to halt, and waits up to 30 s for it.
    ///
    /// # Errors
    ///
    /// Why the kernel has not halted.
    pub fn halt(&self, calls: &(impl Calls + ?Sized), name: &str) -> Result<(), BootError> {
        let id = self.expect(name, "halt", &[Status::Active])?;
        calls
            .reboot(Command::Halt, id)
            .map_err(|source| refused("halt", name, source))?;
        Ok(self.wait_for(name, Status::Loaded, LAG)?)
    }

    /// Stops an instance's CPUs, whatever its kernel is doing. Returns whether the kernel has confirmed their stop.
    ///
    /// A second stop distinguishes two kinds of host kernels: one that waits for the CPUs knows that none is left to
    /// stop, and refuses; one that does not wait stops them again, which is harmless and reaches those that the first
    /// stop missed.
    ///
    /// # Errors
    ///
    /// Why the CPUs were not stopped.
    pub fn halt_by_force(
        &self,
        calls: &(impl Calls + ?Sized),
        name: &str,
    ) -> Result<Parked, BootError> {
        let id = self.expect(name, "halt by force", &[Status::Active, Status::Loaded])?;
        let was_loaded = self.status(name)? == Status::Loaded;
        let stop = || calls.reboot(Command::HaltForce, id);
        let is_refused = |error: &io::Error| error.raw_os_error() == Some(nix::libc::EINVAL);
        match stop() {
            Ok(()) => {}
            // The kernel is loaded but not running: a host kernel that waits for CPUs has none to stop.
            Err(error) if was_loaded && is_refused(&error) => return Ok(Parked::Confirmed),
            Err(source) => return Err(refused("halt by force", name, source)),
        }
        self.wait_for(name, Status::Loaded, LAG)?;
        match stop() {
            Err(error) if is_refused(&error) => Ok(Parked::Confirmed),
            Ok(()) => Ok(Parked::Unconfirmed),
            Err(source) => Err(refused("halt by force", name, source)),
        }
    }

    /// Opens an instance's console, at [`CONSOLE`] or at another device path. Earlier output is not
    /// repeated, and only one reader at a time receives the output.
    ///
    /// # Errors
    ///
    /// When the instance or the device does not exist.
    pub fn console(&self, device: &Path, name: &str) -> Result<File, BootError> {
        let id = self.id(name)?;
        let open = || {
            let mut console = OpenOptions::new().read(true).write(true).open(device)?;
            console.write_all(format!("{id}\n").as_bytes())?;
            Ok(console)
        };
        open().map_err(|source| refused("open the console of", name, source))
    }

    /// Returns the id of an instance whose status must be one of these.
    fn expect(
        &self,
        name: &str,
        action: &'static str,
        states: &[Status],
    ) -> Result<u32, BootError> {
        let is = self.status(name)?;
        if !states.contains(&is) {
            return Err(BootError::State {
                action,
                name: name.to_owned(),
                is,
                wanted: match states {
                    [state] => state.as_str(),
                    _ => "active or loaded",
                },
            });
        }
        match self.id(name)? {
            id @ 1..=MAX_ID => Ok(id),
            id => Err(BootError::Id {
                name: name.to_owned(),
                id,
            }),
        }
    }
}

fn refused(action: &'static str, name: &str, source: io::Error) -> BootError {
    BootError::Refused {
        action,
        name: name.to_owned(),
        source,
    }
}
