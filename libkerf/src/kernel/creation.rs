//! Finds the transaction that created an instance: the kernel identifies instances by name and id, and reuses both.

use std::io;

use super::files::read_bytes;
use super::{Kernel, KernelError, TransactionStatus};
use crate::check;
use crate::dtb;
use crate::model::Virtio;
use crate::overlay::{Operation, Overlay};

/// The transaction that created an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    /// The kernel's number of the transaction. A number is unique within one boot of the host.
    pub transaction: u64,
    /// The note of its overlay ([`Overlay::note`]).
    pub note: Option<String>,
    /// The virtio devices with which it was created.
    pub virtio: Vec<Virtio>,
}

/// The effect of a transaction on an instance, as far as its status shows.
enum Done {
    Created,
    /// The transaction failed, and either created the instance before that, or failed because the instance existed.
    PerhapsCreated,
    Removed,
    PerhapsRemoved,
}

impl Kernel {
    /// Returns the transaction that created the instance which has this name now; `None` if the existing
    /// transactions do not tell. Reads transactions from the newest back, as far as needed.
    ///
    /// # Errors
    ///
    /// If a transaction cannot be read. A transaction that is rolled back in the meantime is skipped.
    pub fn creation(&self, name: &str) -> Result<Option<Creation>, KernelError> {
        let mut perhaps = None;
        for transaction in self.transactions()?.into_iter().rev() {
            let Some((done, creation)) = self.done_to(name, transaction)? else {
                continue;
            };
            match done {
                // Later creations failed because this instance existed.
                Done::Created => return Ok(Some(creation)),
                Done::PerhapsCreated => perhaps = Some(creation),
                // The instance exists, so a later transaction has created it.
                Done::Removed => return Ok(perhaps),
                Done::PerhapsRemoved if perhaps.is_some() => return Ok(perhaps),
                Done::PerhapsRemoved => {}
            }
        }
        Ok(perhaps)
    }

    /// Returns the effect of a transaction on the instance with this name, with the details of its creation if the
    /// transaction created it.
    fn done_to(
        &self,
        name: &str,
        transaction: u64,
    ) -> Result<Option<(Done, Creation)>, KernelError> {
        let path = self.transaction_path(transaction).join("dtbo");
        let Some(blob) = still_there(read_bytes(&path))? else {
            return Ok(None);
        };
        // The kernel has executed nothing of an invalid blob.
        let Ok(tree) = dtb::read(&blob) else {
            return Ok(None);
        };
        let (overlay, _) = check::overlay(&tree, None);
        let Some(about) = is_about(&overlay, name) else {
            return Ok(None);
        };
        // Read the status only for transactions about this name: another transaction may have an unknown status.
        let Some(status) = still_there(self.transaction_status(transaction))? else {
            return Ok(None);
        };
        let applied = status == TransactionStatus::Applied;
        let (done, virtio) = match (about, applied) {
            (About::Creation(virtio), true) => (Done::Created, virtio),
            (About::Creation(virtio), false) => (Done::PerhapsCreated, virtio),
            (About::Removal, true) => (Done::Removed, Vec::new()),
            (About::Removal, false) => (Done::PerhapsRemoved, Vec::new()),
        };
        let creation = Creation {
            transaction,
            note: overlay.note,
            virtio,
        };
        Ok(Some((done, creation)))
    }
}

/// Returns the value read; `None` if its transaction was rolled back meanwhile.
fn still_there<T>(read: Result<T, KernelError>) -> Result<Option<T>, KernelError> {
    match read {
        Err(KernelError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

enum About {
    /// Creation with these devices.
    Creation(Vec<Virtio>),
    Removal,
}

/// Returns the last operation of an overlay that creates or removes the instance.
fn is_about(overlay: &Overlay, name: &str) -> Option<About> {
    let operations = overlay.fragments.iter().flat_map(|f| &f.operations);
    operations.rev().find_map(|operation| match operation {
        Operation::Create(create) if create.instance.name == name => {
            Some(About::Creation(create.instance.virtio.clone()))
        }
        Operation::Remove(removed) if removed == name => Some(About::Removal),
        _ => None,
    })
}
