use std::collections::BTreeSet;
use std::path::PathBuf;

use thiserror::Error;

use super::files::{io_error, read_bytes, read_text, write_at_once};
use super::{Kernel, KernelError, Lock, LockError};
use crate::check::Report;
use crate::machine::Machine;
use crate::overlay::{Overlay, State, Unsplittable};

/// An applied overlay.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The kernel's number of the transaction; of several, the last one.
    pub transaction: u64,
    /// The numbers of the earlier transactions, in order: an overlay that is too large for one is split.
    pub earlier: Vec<u64>,
    /// Pool and instances afterwards, read back.
    pub state: State,
}

/// The kernel's status of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionStatus {
    /// Not run yet; never seen in practice.
    Pending,
    /// All operations have run.
    Applied,
    /// An operation failed; those before it are in place.
    Failed,
    /// The transaction was rolled back.
    Removed,
}

/// Why an overlay was not applied.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// The overlay violates rules. Nothing was written.
    #[error("the overlay breaks rules; nothing was changed:\n{0}")]
    Invalid(Report),
    /// The overlay cannot be written, neither whole nor in parts that the kernel accepts. Nothing was written.
    #[error("{0}; nothing was changed")]
    Unwritable(#[from] Unsplittable),
    /// Another process holds the lock.
    #[error("{0}; nothing was changed")]
    Locked(#[from] LockError),
    /// The caller's condition for the change does not hold. Nothing was written.
    #[error(
        "the kernel's instances have changed since the overlay was planned; nothing was changed"
    )]
    Outdated,
    /// A read or write failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The kernel accepted the overlay but shows no transaction with it.
    #[error("the kernel accepted the overlay but shows no transaction for it: see {}", directory.display())]
    Lost {
        /// Directory of the transactions.
        directory: PathBuf,
    },
    /// An operation failed, and the earlier operations were undone.
    #[error(
        "the kernel refused transaction {transaction}{}; its effects were undone",
        because(reason)
    )]
    RolledBack {
        /// The kernel's number.
        transaction: u64,
        /// The kernel's reason, if it gives one.
        reason: Option<String>,
    },
    /// An operation failed, and the earlier operations could not be undone.
    #[error(
        "the kernel refused transaction {transaction}{}, and did not undo its effects: {undo}",
        because(reason)
    )]
    Stuck {
        /// The kernel's number; its directory still exists.
        transaction: u64,
        /// The kernel's reason, if it gives one.
        reason: Option<String>,
        /// Why the operations were not undone.
        undo: String,
    },
    /// The kernel reports success, but the state that is read back differs from the plan.
    #[error("the kernel reports transaction {transaction} as applied, but {difference}")]
    NotAsPlanned {
        /// The kernel's number.
        transaction: u64,
        /// The difference.
        difference: String,
    },
    /// The change needed several transactions, and one of them failed. The earlier ones were undone.
    #[error("part {part} of {parts}: {error}; the parts before it were undone")]
    PartsUndone {
        /// The failed one, from 1.
        part: usize,
        /// Total number.
        parts: usize,
        /// The error.
        error: Box<ApplyError>,
    },
    /// The change needed several transactions, one of them failed, and the earlier ones are in effect.
    #[error(
        "part {part} of {parts}: {error}; the parts before it are in place, as transactions \
         {transactions:?}: {undo}"
    )]
    PartsInPlace {
        /// The failed one, from 1.
        part: usize,
        /// Total number.
        parts: usize,
        /// The error.
        error: Box<ApplyError>,
        /// The transactions in effect.
        transactions: Vec<u64>,
        /// Why they were not undone.
        undo: String,
    },
}

fn because(reason: &Option<String>) -> String {
    match reason {
        Some(reason) => format!(" ({reason})"),
        None => " (it gives no reason; its log, dmesg, may have one)".to_owned(),
    }
}

impl Kernel {
    /// Applies an overlay: computes its effect, writes it, finds its transaction, rolls it back if an
    /// operation failed, and reads the result back. An overlay that is larger than the kernel accepts
    /// at a time is applied in several transactions, under one lock; if one fails, the earlier ones
    /// are undone, unless they contain operations that the kernel cannot undo.
    ///
    /// # Errors
    ///
    /// Why the overlay was not applied, and the action that followed.
    pub fn apply(
        &self,
        overlay: &Overlay,
        machine: Option<&Machine>,
    ) -> Result<Applied, ApplyError> {
        self.apply_planned(machine, |_| Ok(overlay.clone()))
    }

    /// Like [`Kernel::apply`], but plans the overlay under the lock, from the current state: no process that
    /// honours the lock changes anything between the plan and the change.
    ///
    /// # Errors
    ///
    /// As [`Kernel::apply`], and the errors of `plan`, after which nothing was changed.
    pub fn apply_planned<E: From<ApplyError>>(
        &self,
        machine: Option<&Machine>,
        plan: impl FnOnce(&State) -> Result<Overlay, E>,
    ) -> Result<Applied, E> {
        let _lock = Lock::take(&self.lock, self.patience).map_err(ApplyError::from)?;
        let state = self.state(machine).map_err(ApplyError::from)?;
        let overlay = plan(&state)?;
        Ok(self.apply_locked(&overlay, state, machine)?)
    }

    fn apply_locked(
        &self,
        overlay: &Overlay,
        mut state: State,
        machine: Option<&Machine>,
    ) -> Result<Applied, ApplyError> {
        let parts = overlay.split()?;
        // Compute the effect of the whole overlay before anything is written.
        state.apply(overlay).map_err(ApplyError::Invalid)?;
        let mut earlier = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            match self.apply_part(part, state, machine) {
                Ok((transaction, after)) => {
                    earlier.push(transaction);
                    state = after;
                }
                Err(error) if at == 0 => return Err(error),
                Err(error) => return Err(self.undo_parts(&parts, &earlier, error)),
            }
        }
        let transaction = earlier.pop().ok_or_else(|| ApplyError::Lost {
            directory: self.root.join("overlays"),
        })?;
        Ok(Applied {
            transaction,
            earlier,
            state,
        })
    }

    /// Undoes the transactions of the earlier parts after a later part failed.
    fn undo_parts(&self, parts: &[Overlay], done: &[u64], error: ApplyError) -> ApplyError {
        let (part, error) = (done.len() + 1, Box::new(error));
        let in_place = |transactions: &[u64], undo: String, error| ApplyError::PartsInPlace {
            part,
            parts: parts.len(),
            error,
            transactions: transactions.to_vec(),
            undo,
        };
        if !parts[..done.len()].iter().all(Overlay::can_be_undone) {
            let why =
                "they end an instance or give memory to the pool, which the kernel cannot undo";
            return in_place(done, why.to_owned(), error);
        }
        for (left, transaction) in done.iter().enumerate().rev() {
            if let Err(why) = self.rollback(*transaction) {
                return in_place(&done[..=left], why.to_string(), error);
            }
        }
        ApplyError::PartsUndone {
            part,
            parts: parts.len(),
            error,
        }
    }

    fn apply_part(
        &self,
        overlay: &Overlay,
        before: State,
        machine: Option<&Machine>,
    ) -> Result<(u64, State), ApplyError> {
        let blob = overlay.to_blob().map_err(Unsplittable::from)?;
        let planned = before.apply(overlay).map_err(ApplyError::Invalid)?;
        let known = self.transactions()?;
        let new = self.root.join("overlays/new");
        write_at_once(&new, &blob)
            .map_err(|source| io_error("writing an overlay to", &new, source))?;
        let transaction = self.find(&known, &blob)?;
        let (status, reason) = (
            self.transaction_status(transaction)?,
            self.reason(transaction),
        );
        if status != TransactionStatus::Applied {
            return Err(match self.rollback(transaction) {
                Ok(()) => ApplyError::RolledBack {
                    transaction,
                    reason,
                },
                Err(undo) => ApplyError::Stuck {
                    transaction,
                    reason,
                    undo: undo.to_string(),
                },
            });
        }
        let state = self.state(machine)?;
        match difference(&planned, &state) {
            None => Ok((transaction, state)),
            Some(difference) => Err(ApplyError::NotAsPlanned {
                transaction,
                difference,
            }),
        }
    }

    /// Returns the numbers of all existing transactions.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn transactions(&self) -> Result<BTreeSet<u64>, KernelError> {
        let path = self.root.join("overlays");
        let failed = |source| io_error("reading", &path, source);
        let mut numbers = BTreeSet::new();
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix("tx_")?.parse::<u64>().ok());
            numbers.extend(number);
        }
        Ok(numbers)
    }

    /// Returns the kernel's status of a transaction.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn transaction_status(&self, transaction: u64) -> Result<TransactionStatus, KernelError> {
        let path = self.transaction_path(transaction).join("status");
        let text = read_text(&path)?;
        Ok(match text.as_str() {
            "pending" => TransactionStatus::Pending,
            "applied" => TransactionStatus::Applied,
            "failed" => TransactionStatus::Failed,
            "removed" => TransactionStatus::Removed,
            _ => return Err(KernelError::Unknown { path, text }),
        })
    }

    /// Undoes a transaction, in reverse order. The kernel cannot undo the removal of an instance, nor
    /// the addition of memory to the pool.
    ///
    /// # Errors
    ///
    /// If the kernel does not undo the transaction, or it still exists.
    pub fn rollback(&self, transaction: u64) -> Result<(), KernelError> {
        let path = self.transaction_path(transaction);
        std::fs::remove_dir(&path).map_err(|source| io_error("rolling back", &path, source))?;
        match path.try_exists() {
            Ok(false) => Ok(()),
            Ok(true) => Err(KernelError::Unknown {
                path,
                text: "it is still there".to_owned(),
            }),
            Err(source) => Err(io_error("looking for", &path, source)),
        }
    }

    /// Returns the new transaction with this blob. Its number alone does not identify it: processes
    /// without a lock may write at the same time.
    fn find(&self, known: &BTreeSet<u64>, blob: &[u8]) -> Result<u64, ApplyError> {
        for number in self.transactions()?.difference(known) {
            if read_bytes(&self.transaction_path(*number).join("dtbo"))? == blob {
                return Ok(*number);
            }
        }
        Err(ApplyError::Lost {
            directory: self.root.join("overlays"),
        })
    }

    /// Returns why a transaction failed; only later kernels report it.
    fn reason(&self, transaction: u64) -> Option<String> {
        let text = read_text(&self.transaction_path(transaction).join("reason")).ok()?;
        (!text.is_empty()).then_some(text)
    }

    pub(super) fn transaction_path(&self, transaction: u64) -> PathBuf {
        self.root.join(format!("overlays/tx_{transaction}"))
    }
}

/// Returns the difference from the plan. The kernel may choose the location of memory, and an id that the plan left
/// open.
fn difference(planned: &State, is: &State) -> Option<String> {
    let cpus = |cpus: &[u64]| cpus.iter().copied().collect::<BTreeSet<u64>>();
    if cpus(&planned.system.resources.cpus) != cpus(&is.system.resources.cpus) {
        let (planned, is) = (&planned.system.resources.cpus, &is.system.resources.cpus);
        return Some(format!("the pool has CPUs {is:?} and not {planned:?}"));
    }
    for instance in &planned.system.instances {
        let name = &instance.name;
        let Some(there) = is.system.instance(name) else {
            return Some(format!("there is no instance {name:?}"));
        };
        if cpus(&instance.cpus) != cpus(&there.cpus) {
            return Some(format!(
                "{name} has CPUs {:?} and not {:?}",
                there.cpus, instance.cpus
            ));
        }
        if instance.memory_bytes != there.memory_bytes {
            return Some(format!(
                "{name} has {} bytes of memory and not {}",
                there.memory_bytes, instance.memory_bytes
            ));
        }
        if instance.id.is_some() && instance.id != there.id {
            return Some(format!(
                "{name} has id {:?} and not {:?}",
                there.id, instance.id
            ));
        }
        let addresses = |state: &State, devices: &[String]| {
            devices
                .iter()
                .filter_map(|d| state.address_of(d))
                .collect::<BTreeSet<_>>()
        };
        if addresses(planned, &instance.devices) != addresses(is, &there.devices) {
            return Some(format!(
                "{name} has devices {:?} and not {:?}",
                there.devices, instance.devices
            ));
        }
    }
    let surplus = is
        .system
        .instances
        .iter()
        .find(|i| planned.system.instance(&i.name).is_none());
    surplus.map(|instance| format!("there is an instance {:?} still", instance.name))
}
