//! Changes of an instance's row. Its actor alone writes the row; a recovery or a morph proposes what it would change, and
//! the actor writes that together with what the job has to write itself, in one transaction.

use actix::prelude::*;
use kmp_proto::instance::Desired;
use kmp_proto::morph::{CommitOrder, CommitRecord};

use super::{Change, JournalError};
use crate::model::rows::{InstanceRow, KernelChoice};

/// A change of an instance's row.
#[derive(Clone, Debug)]
pub enum Proposal {
    /// A wish: what is wanted of the instance from now on.
    Wish(Desired),
    /// A successor of its failed generation is intended.
    Succeeded {
        /// Its number.
        generation: u64,
    },
    /// A morph commits: its target is the instance.
    Committed {
        /// The target's number.
        generation: u64,
        /// Its kernel, which the next generation is started with as well.
        kernel: Box<KernelChoice>,
    },
}

impl Proposal {
    /// Makes the change.
    pub fn apply(&self, row: &mut InstanceRow) {
        match self {
            Self::Wish(desired) => row.desired = *desired,
            Self::Succeeded { generation } => {
                row.active_generation = *generation;
                row.recoveries += 1;
                // An end that is in the journal comes about.
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

/// Proposes a change, with what is to be written in the same transaction. Durable when answered.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), JournalError>")]
pub struct Propose {
    /// The change of the row.
    pub proposal: Proposal,
    /// What else is written.
    pub with: Vec<Change>,
}

/// Has a morph's commit record written: the only place where one comes from, but for
/// [`MorphRow::commit_record`](crate::model::rows::MorphRow::commit_record).
///
/// # Errors
/// As the journal's; [`JournalError::Gone`] when the instance's actor has ended.
pub async fn record_commit(
    instance: &Recipient<Propose>,
    order: CommitOrder,
    propose: Propose,
) -> Result<CommitRecord, JournalError> {
    let written = instance.send(propose).await;
    written.unwrap_or(Err(JournalError::Gone))?;
    Ok(order.recorded())
}
