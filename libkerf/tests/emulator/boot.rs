//! Load, boot and halt, including facts that the kernel's status does not show.

use std::ffi::CStr;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kmorph_emulated_kernel::Mk;
use libkerf::kernel::{BootError, Calls, Command, Parked};
use libkerf::overlay::Status;
use nix::libc::{EBUSY, EINVAL, ENOENT, ENOEXEC, ETIMEDOUT};

use crate::{create, ground};

/// The emulated kernel's end of the system calls.
pub(crate) struct Spawns {
    mk: Arc<Mutex<Mk>>,
    /// True if the kernel waits until CPUs have stopped, like the fork; generations D and E do not.
    waits: bool,
    /// True if the spawn answers a request to halt.
    answers: bool,
    /// True if a booted kernel panics at once.
    panics: bool,
    /// True if the CPUs have stopped. Generations D and E report `loaded` earlier.
    parked: Mutex<bool>,
    /// Delay until the status shows a change.
    lag: Duration,
    unloads: Mutex<u32>,
    /// First bytes of the image that was loaded last.
    pub(crate) loaded: Mutex<Vec<u8>>,
}

impl Spawns {
    pub(crate) fn new(mk: &Arc<Mutex<Mk>>) -> Self {
        Self {
            mk: Arc::clone(mk),
            waits: false,
            answers: true,
            panics: false,
            parked: Mutex::new(true),
            lag: Duration::ZERO,
            unloads: Mutex::new(0),
            loaded: Mutex::default(),
        }
    }

    fn state(&self, id: u32) -> Result<&'static str, i32> {
        let mk = self.mk.lock().unwrap();
        mk.instances
            .iter()
            .find(|i| i.id == id)
            .map(|i| i.state)
            .ok_or(ENOENT)
    }

    fn set(&self, id: u32, state: &'static str) {
        let (mk, lag) = (Arc::clone(&self.mk), self.lag);
        let set = move || {
            std::thread::sleep(lag);
            let mut mk = mk.lock().unwrap();
            if let Some(instance) = mk.instances.iter_mut().find(|i| i.id == id) {
                instance.state = state;
            }
        };
        if lag.is_zero() {
            set();
        } else {
            std::thread::spawn(set);
        }
    }

    fn run(&self, command: Command, id: u32) -> Result<(), i32> {
        match (command, self.state(id)?) {
            (Command::Boot, "loaded") if self.panics => {}
            (Command::Boot, "loaded") if *self.parked.lock().unwrap() => {
                self.set(id, "active");
                *self.parked.lock().unwrap() = false;
            }
            (Command::Boot, _) => return Err(EBUSY),
            (Command::Halt, "active") if self.answers => {
                *self.parked.lock().unwrap() = true;
                self.set(id, "loaded");
            }
            (Command::Halt, "active") => return Err(ETIMEDOUT),
            (Command::Halt, _) => return Err(EINVAL),
            (Command::HaltForce, "loaded") if self.waits => return Err(EINVAL),
            (Command::HaltForce, "active" | "loaded") => {
                // The first stop reaches all CPUs if the kernel waits; otherwise only the second one does.
                let mut parked = self.parked.lock().unwrap();
                *parked = self.waits || self.state(id)? == "loaded";
                self.set(id, "loaded");
            }
            (Command::HaltForce, _) => return Err(EINVAL),
        }
        Ok(())
    }
}

impl Calls for Spawns {
    fn load(
        &self,
        id: u32,
        image: BorrowedFd<'_>,
        _: Option<BorrowedFd<'_>>,
        cmdline: &CStr,
    ) -> io::Result<()> {
        let file = std::fs::File::from(image.try_clone_to_owned()?);
        let mut start = Vec::new();
        file.take(4).read_to_end(&mut start)?;
        if start.is_empty() {
            return Err(io::Error::from_raw_os_error(ENOEXEC));
        }
        *self.loaded.lock().unwrap() = start;
        assert_eq!(cmdline.to_str().unwrap(), "console=mktty0");
        self.set(id, "loaded");
        Ok(())
    }

    fn unload(&self, id: u32) -> io::Result<()> {
        *self.unloads.lock().unwrap() += 1;
        self.set(id, "ready");
        Ok(())
    }

    fn reboot(&self, command: Command, id: u32) -> io::Result<()> {
        self.run(command, id).map_err(io::Error::from_raw_os_error)
    }
}

fn image(content: &str) -> std::fs::File {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    file.into_file()
}

#[test]
fn a_kernel_is_loaded_booted_halted_and_unloaded() {
    let Some(ground) = ground() else { return };
    let kernel = &ground.kernel;
    kernel.apply(&create("web", &[8]), None).unwrap();
    let mut spawns = Spawns::new(&ground.emulator.mk);
    spawns.lag = Duration::from_millis(60);
    let (good, bad) = (image("kernel"), image(""));
    let load =
        |image: &std::fs::File| kernel.load(&spawns, "web", image.as_fd(), None, "console=mktty0");

    let refused = load(&bad).unwrap_err();
    assert!(
        refused.to_string().contains("cannot load the format"),
        "{refused}"
    );
    assert_eq!(
        *spawns.unloads.lock().unwrap(),
        1,
        "what it left is unloaded"
    );
    std::thread::sleep(spawns.lag * 2);
    let refused = kernel.boot(&spawns, "web").unwrap_err();
    assert!(
        matches!(
            refused,
            BootError::State {
                is: Status::Ready,
                ..
            }
        ),
        "{refused}"
    );
    load(&good).unwrap();
    assert!(matches!(
        load(&good),
        Err(BootError::State {
            is: Status::Loaded,
            ..
        })
    ));
    spawns.panics = true;
    let ended = kernel.boot(&spawns, "web").unwrap_err();
    assert!(
        matches!(
            ended,
            BootError::Ended {
                is: Status::Loaded,
                ..
            }
        ),
        "{ended}"
    );
    assert!(ended.to_string().contains("while it booted"), "{ended}");
    spawns.panics = false;
    kernel.boot(&spawns, "web").unwrap();
    assert_eq!(
        kernel.status("web").unwrap(),
        Status::Active,
        "the lag was waited for"
    );
    // The kernel itself would allow the unload now.
    let refused = kernel.unload(&spawns, "web").unwrap_err();
    assert!(
        matches!(
            refused,
            BootError::State {
                is: Status::Active,
                ..
            }
        ),
        "{refused}"
    );
    kernel.halt(&spawns, "web").unwrap();
    kernel.unload(&spawns, "web").unwrap();
    assert_eq!(kernel.status("web").unwrap(), Status::Ready);
}

#[test]
fn a_kernel_that_hangs_is_stopped_and_it_is_said_whether_that_is_sure() {
    let Some(ground) = ground() else { return };
    let kernel = &ground.kernel;
    kernel.apply(&create("web", &[8]), None).unwrap();
    let file = image("kernel");
    let mut spawns = Spawns::new(&ground.emulator.mk);
    spawns.answers = false;
    kernel
        .load(&spawns, "web", file.as_fd(), None, "console=mktty0")
        .unwrap();
    kernel.boot(&spawns, "web").unwrap();
    let refused = kernel.halt(&spawns, "web").unwrap_err();
    assert!(
        refused.to_string().contains("halt it by force"),
        "{refused}"
    );
    assert_eq!(kernel.status("web").unwrap(), Status::Active);
    // Generations D and E: the status is `loaded`, but the stop is unconfirmed.
    assert_eq!(
        kernel.halt_by_force(&spawns, "web").unwrap(),
        Parked::Unconfirmed
    );
    assert!(
        *spawns.parked.lock().unwrap(),
        "the second stop reached what the first had missed"
    );
    kernel.boot(&spawns, "web").unwrap();
    // The fork waits for the CPUs.
    spawns.waits = true;
    assert_eq!(
        kernel.halt_by_force(&spawns, "web").unwrap(),
        Parked::Confirmed
    );
    assert_eq!(
        kernel.halt_by_force(&spawns, "web").unwrap(),
        Parked::Confirmed,
        "again"
    );
}

#[test]
fn a_console_is_opened_by_the_id() {
    let Some(ground) = ground() else { return };
    ground.kernel.apply(&create("web", &[8]), None).unwrap();
    let device = ground.emulator.beside("mktty");
    assert!(ground.kernel.console(&device, "web").is_err(), "no device");
    std::fs::write(&device, "").unwrap();
    ground.kernel.console(&device, "web").unwrap();
    assert_eq!(std::fs::read_to_string(&device).unwrap(), "1\n");
}
