//! Releases the resources of a fenced generation.
//!
//! A kernel instance that kmorph created is removed, and its CPUs and memory return to the pool. One that kerf
//! created is only unloaded: its configuration stays. If the other kernel instance of the same kmorph instance is
//! running (the successor, after a morph), the devices move there in the same overlay. CPUs and memory do not move:
//! the successor has its own.

use std::io;
use std::time::{Duration, Instant};

use libkerf::allocate::{self, Exchange, Handover};
use libkerf::kernel::{ApplyError, BootError};
use libkerf::overlay::{Operation, Overlay, State, Status, Target};
use rustix::io::Errno;

use super::slots::{Content, Holds, Mark, Slots};
use crate::contract::{BackendError, KernelInstance, Placement};

/// Maximum wait for other processes that load, boot or halt: a halt request holds the kernel's lock for up to 30
/// s.
const BUSY_MAX: Duration = Duration::from_secs(35);
/// Pause before the kernel is asked again.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

impl Slots {
    /// Releases the resources of the generation of `placement`. Blocking.
    pub(super) fn release(&self, placement: &Placement) -> Result<(), BackendError> {
        let Some(KernelInstance { name, .. }) = &placement.kernel_instance else {
            return Ok(());
        };
        let what = || format!("releasing the kernel instance {name:?}");
        let failed = |error: &dyn std::error::Error| BackendError {
            what: what(),
            source: io::Error::other(error.to_string()),
        };
        match self.holds(placement).map_err(|error| failed(&error))? {
            Holds::Gone => self.forget(placement).map_err(|error| failed(&error)),
            Holds::Another | Holds::Foreign(_) => Ok(()),
            Holds::This(mark, status) => {
                if status == Status::Loaded {
                    self.unload(name).map_err(|error| failed(&error))?;
                }
                let successor = self.successor(placement, name);
                self.take_away(name, &mark, successor.as_deref())
                    .map_err(|error| failed(&error))
            }
        }
    }

    /// Returns the other kernel instance, if it runs a generation of the same kmorph instance.
    fn successor(&self, placement: &Placement, name: &str) -> Option<String> {
        let names = Self::names(&placement.name);
        let other = names.into_iter().find(|other| other != name)?;
        match self.content(&other) {
            Ok(Content::Marked(mark, Status::Active)) if !mark.fenced => Some(other),
            _ => None,
        }
    }

    /// Removes a kernel instance that kmorph created, with its record; for one that kerf created, only the record.
    pub(super) fn take_away(
        &self,
        name: &str,
        mark: &Mark,
        successor: Option<&str>,
    ) -> Result<(), TakeError> {
        let _one = self.changing();
        let handed = match successor.map(|successor| self.hand_over(name, mark, successor)) {
            None => Ok(false),
            // The kernel instance no longer exists, and another program has created one with its name.
            Some(Err(TakeError::NotOurs)) => Ok(true),
            // The devices can be handed over later.
            Some(Err(error @ TakeError::Apply(ApplyError::Locked(_)))) => return Err(error),
            Some(handed) => handed,
        };
        // Devices that the successor does not take return to the pool.
        if mark.origin.is_ours() && !matches!(handed, Ok(true)) {
            let remove = self.apply(BUSY_MAX, &|_| {
                self.still(name, mark)?;
                Ok(removal(name))
            });
            match remove {
                Ok(_) | Err(TakeError::NotOurs) => {}
                Err(error) => return Err(error),
            }
        }
        self.forget_of(name, mark.generation, &mark.run_dir)?;
        handed.map(drop).map_err(|error| TakeError::Devices {
            successor: successor.unwrap_or_default().to_owned(),
            error: Box::new(error),
        })
    }

    /// Hands devices over and, in the same overlay, removes the giver if kmorph created it. Returns false if there are
    /// no devices.
    fn hand_over(&self, name: &str, mark: &Mark, successor: &str) -> Result<bool, TakeError> {
        let state = self.kernel.state(None).map_err(ApplyError::from)?;
        let devices = devices_of(&state, name);
        if devices.is_empty() {
            return Ok(false);
        }
        let exchange = Exchange {
            from: name.to_owned(),
            to: successor.to_owned(),
            handover: Handover::These {
                cpus: Vec::new(),
                devices,
            },
            memory: 0,
        };
        self.apply(BUSY_MAX, &|state| {
            self.still(name, mark)?;
            let mut overlay = allocate::plan(state, &exchange)?;
            if mark.origin.is_ours() {
                // At the end, because the kernel cannot undo it.
                overlay.fragments.extend(removal(name).fragments);
            }
            Ok(overlay)
        })?;
        Ok(true)
    }

    /// Checks that the kernel instance with this name is still the one for which the mark was made.
    fn still(&self, name: &str, mark: &Mark) -> Result<(), TakeError> {
        match self.is_of(name, mark).map_err(ApplyError::from)? {
            true => Ok(()),
            false => Err(TakeError::NotOurs),
        }
    }

    /// Plans and applies an overlay under kerf's lock, on the current state; retries while other processes load, boot
    /// or halt.
    pub(super) fn apply(
        &self,
        patience: Duration,
        plan: &dyn Fn(&State) -> Result<Overlay, TakeError>,
    ) -> Result<State, TakeError> {
        let begun = Instant::now();
        loop {
            match self.kernel.apply_planned(None, plan) {
                Ok(applied) => return Ok(applied.state),
                // The overlay has no effect then. The cause may be another process's lock, or a change by a process
                // that does not use the lock.
                Err(TakeError::Apply(ApplyError::RolledBack { .. }))
                    if begun.elapsed() < patience =>
                {
                    std::thread::sleep(BUSY_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Unloads an image; retries while other processes load, boot or halt.
    pub(super) fn unload(&self, name: &str) -> Result<(), BootError> {
        let begun = Instant::now();
        loop {
            match self.kernel.unload(&*self.calls, name) {
                Err(BootError::Refused { source, .. })
                    if source.raw_os_error() == Some(Errno::BUSY.raw_os_error())
                        && begun.elapsed() < BUSY_MAX =>
                {
                    std::thread::sleep(BUSY_PAUSE);
                }
                done => return done,
            }
        }
    }
}

/// Why a kernel instance was not changed as planned.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error("somebody else has created a kernel instance with its name meanwhile")]
    NotOurs,
    #[error(transparent)]
    Exchange(#[from] allocate::NoExchange),
    #[error(transparent)]
    Shortage(#[from] allocate::Shortage),
    #[error(transparent)]
    Record(#[from] libkerf::record::RecordError),
    #[error(
        "its devices are free but could not be assigned to {successor:?}: {error}; assign them with kerf update"
    )]
    Devices {
        successor: String,
        error: Box<TakeError>,
    },
}

fn removal(name: &str) -> Overlay {
    let remove = vec![Operation::Remove(name.to_owned())];
    Overlay::new([(Target::Instances, remove)])
}

fn devices_of(state: &State, name: &str) -> Vec<libkerf::model::PciAddress> {
    let devices = state.system.instance(name).map(|i| i.devices.as_slice());
    let devices = devices.unwrap_or_default().iter();
    devices
        .filter_map(|device| state.address_of(device))
        .collect()
}
