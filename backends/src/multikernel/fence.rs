//! Stops a generation for good.
//!
//! The fence halts the generation's CPUs by force, and the kernel must confirm their stop: the status `loaded` does
//! not prove that. To distinguish kernels that wait for the CPUs from those that do not, libkerf halts twice
//! (`halt_by_force`). Kernels that do not wait (generations D and E) confirm nothing, and so this backend confirms
//! nothing either: the generation keeps its resources until an operator removes the kernel instance with
//! `kerf delete`, and the backend then finds it gone.
//!
//! A confirmed fence is written to the record before it is certified. Later observations rely on the record, because
//! the status file is the same before and after.

use std::time::SystemTime;

use kmp_proto::fence::{Confirmation, FenceMethod, FenceOrder};
use libkerf::kernel::Parked;
use libkerf::overlay::Status;

use super::slots::{Holds, Mark, Slots};
use crate::contract::{FenceUnconfirmed, Fenced, KernelInstance, Placement, Proof};

type Seen = Result<(FenceMethod, Confirmation), String>;

impl Slots {
    /// Stops the generation of `placement` and certifies it. Blocks until the kernel has answered.
    pub(super) fn fence(
        &self,
        placement: &Placement,
        order: FenceOrder,
    ) -> Result<Fenced, FenceUnconfirmed> {
        if order.generation() != placement.generation {
            let reason = format!(
                "the placement belongs to generation {}",
                placement.generation
            );
            return Err(FenceUnconfirmed { order, reason });
        }
        match self.stop(placement) {
            Ok((method, confirmation)) => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                let nanos = now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
                Ok(Fenced {
                    certificate: order.confirm(method, confirmation, nanos),
                    proof: Proof::KernelReport,
                })
            }
            Err(reason) => Err(FenceUnconfirmed { order, reason }),
        }
    }

    fn stop(&self, placement: &Placement) -> Seen {
        let Some(KernelInstance { name, .. }) = &placement.kernel_instance else {
            return Ok((FenceMethod::NeverStarted, Confirmation::NothingFound));
        };
        match self.holds(placement).map_err(|error| error.to_string())? {
            // The kernel removes only an instance without a running kernel, and this backend starts a generation only
            // after the previous one's fence.
            Holds::Gone | Holds::Another => {
                Ok((FenceMethod::AlreadyEnded, Confirmation::NothingFound))
            }
            Holds::Foreign(status) => Err(format!(
                "the record of kernel instance {name:?} (which is {}) no longer names this generation: \
                 somebody else has loaded or unloaded a kernel there; when it is no longer running, remove it with \
                 kerf delete {name}",
                status.as_str()
            )),
            Holds::This(mark, _) if mark.fenced => {
                Ok((FenceMethod::AlreadyEnded, Confirmation::CpusParked))
            }
            Holds::This(mark, status) => self.stop_this(name, mark, status),
        }
    }

    fn stop_this(&self, name: &str, mark: Mark, status: Status) -> Seen {
        let seen = match status {
            Status::Active | Status::Loaded => {
                let parked = self.kernel.halt_by_force(&*self.calls, name);
                if parked.map_err(|error| error.to_string())? == Parked::Unconfirmed {
                    return Err(format!(
                        "kernel instance {name:?} was halted by force, but this kernel does not say whether its \
                         CPUs have stopped (generation D or E); once they have, remove it with kerf kill \
                         --force, unload and delete {name}"
                    ));
                }
                let method = match status {
                    Status::Active => FenceMethod::HaltedByForce,
                    _ => FenceMethod::AlreadyEnded,
                };
                (method, Confirmation::CpusParked)
            }
            Status::Empty | Status::Ready if !self.was_loaded(name)? => {
                (FenceMethod::NeverStarted, Confirmation::NothingFound)
            }
            other => {
                return Err(format!(
                    "kernel instance {name:?} is {}, which does not show what its CPUs are doing; once they have stopped, \
                     remove it with kerf delete {name}",
                    other.as_str()
                ));
            }
        };
        let mark = Mark {
            fenced: true,
            ..mark
        };
        self.mark(name, &mark).map_err(|error| {
            format!("its CPUs have stopped, but that could not be recorded: {error}")
        })?;
        Ok(seen)
    }

    /// Returns whether a kernel was ever loaded for the generation in this kernel instance.
    fn was_loaded(&self, name: &str) -> Result<bool, String> {
        let record = self.records.load(name).map_err(|error| error.to_string())?;
        Ok(record.is_some_and(|record| record.loaded_at.is_some()))
    }
}
