//! Stopping a generation for good.
//!
//! Its CPUs are halted by force, and the kernel must have seen them stop: a status file that says `loaded` says
//! nothing of that. Kernels that wait for the CPUs are told from those that do not by asking twice (libkerf,
//! `halt_by_force`). Those that do not (generations D and E) confirm nothing, and so neither do we: what ran keeps
//! its resources until a person takes the kernel instance away with `kerf delete`, which is then found gone.
//!
//! A confirmed fence is written into the record before it is certified. It is what later looks go by, because the
//! status file says the same before and after.

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
            let reason = format!("the placement is of generation {}", placement.generation);
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
            // The kernel takes only what runs nothing away, and we put only one in after the other's fence.
            Holds::Gone | Holds::Another => {
                Ok((FenceMethod::AlreadyEnded, Confirmation::NothingFound))
            }
            Holds::Foreign(status) => Err(format!(
                "the record of kernel instance {name:?} (which is {}) does not name this generation any more: \
                 somebody else has loaded or unloaded a kernel there; when nothing of it runs, take it away with \
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
                        "kernel instance {name:?} was halted by force, and this kernel does not say whether its \
                         CPUs have stopped (generation D or E); when they have, take it away with kerf kill \
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
                    "kernel instance {name:?} is {}, which does not say what its CPUs do; when they have stopped, \
                     take it away with kerf delete {name}",
                    other.as_str()
                ));
            }
        };
        let mark = Mark {
            fenced: true,
            ..mark
        };
        self.mark(name, &mark).map_err(|error| {
            format!("its CPUs have stopped, and that is not written down: {error}")
        })?;
        Ok(seen)
    }

    /// Whether a kernel was ever loaded for the generation in this kernel instance.
    fn was_loaded(&self, name: &str) -> Result<bool, String> {
        let record = self.records.load(name).map_err(|error| error.to_string())?;
        Ok(record.is_some_and(|record| record.loaded_at.is_some()))
    }
}
