//! Changes of an instance's row. Only the instance's actor writes the row. A recovery or a morph proposes a change, and
//! the actor writes it together with the job's own changes, in one transaction.

use actix::prelude::*;
use kmp_proto::instance::Desired;
use kmp_proto::morph::{CommitOrder, CommitRecord};

use super::{Change, JournalError};
use crate::model::rows::{InstanceRow, KernelChoice};

/// A change of an instance's row.
#[derive(Clone, Debug)]
pub enum Proposal {
    /// A new desired state of the instance.
    Wish(Desired),
    /// A successor of the failed generation is intended.
    Succeeded {
        /// Its number.
        generation: u64,
    },
    /// A morph commits: its target is the instance.
    Committed {
        /// The target's number.
        generation: u64,
        /// Its kernel, which is also the kernel of the next generation.
        kernel: Box<KernelChoice>,
    },
}

impl Proposal {
    /// Applies the change.
    pub fn apply(&self, row: &mut InstanceRow) {
        match self {
            Self::Wish(desired) => row.desired = *desired,
            Self::Succeeded { generation } => {
                row.active_generation = *generation;
                row.recoveries += 1;
                // A termination in the journal always completes.
                if row.desired != Desired::Terminating {
                    row.desired = Desired::Running;
                    row.reason = None;
                }
            }
            Self::Committed { generation, kernel } => {
                row.active_generation = *generation;
                row.spec.kernel = (**kernel).clone();
                row.morphs += 1;
            }
        }
    }
}

/// Proposes a change, with other changes for the same transaction. The changes are durable when the answer arrives.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), JournalError>")]
pub struct Propose {
    /// The change of the row.
    pub proposal: Proposal,
    /// The other changes.
    pub with: Vec<Change>,
}

/// Has the commit record of a morph written. This function and
/// [`MorphRow::commit_record`](crate::model::rows::MorphRow::commit_record) are the only sources of a commit record.
///
/// # Errors
/// The errors of the journal; [`JournalError::Gone`] when the instance's actor has ended.
pub async fn record_commit(
    instance: &Recipient<Propose>,
    order: CommitOrder,
    propose: Propose,
) -> Result<CommitRecord, JournalError> {
    let written = instance.send(propose).await;
    written.unwrap_or(Err(JournalError::Gone))?;
    Ok(order.recorded())
}
