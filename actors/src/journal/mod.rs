//! The Journal actor: the state database, and its only writer.
//!
//! It runs on a thread of its own, since a durable write waits for the disk. Every external effect
//! (spawn, fence, freeze, switch, reclaim) is written before it is attempted and after it is
//! confirmed. Rows carry what undoes them; nothing here decides anything.

mod rows;
mod store;

use std::path::Path;

use actix::prelude::*;
pub use rows::{
    CertificateRow, Change, Desired, GenerationPhase, GenerationRow, InstanceRow, InstanceSpec,
    KernelChoice, MorphRow, PublishedPortSpec, RecoveryRow, Snapshot,
};
use store::Store;
pub use store::{EVENTS_KEPT, JournalError, MORPHS_KEPT, OPERATIONS_KEPT, RECOVERIES_KEPT};

/// Transactions that may wait for the disk before new ones are refused.
pub const JOURNAL_MAILBOX: usize = 4096;

/// The actor. [`Journal::open`] starts it.
pub struct Journal {
    store: Store,
}

/// Writes all changes in one transaction. Durable when answered.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), JournalError>")]
pub struct Record(pub Vec<Change>);

/// Reads everything.
#[derive(Debug, Message)]
#[rtype(result = "Result<Snapshot, JournalError>")]
pub struct Load;

impl Journal {
    /// Opens the journal in `dir`, reads it, and starts the actor on its own thread. The thread
    /// ends with the returned arbiter.
    ///
    /// # Errors
    /// When another daemon has it, or it cannot be opened, read and written.
    pub fn open(dir: &Path) -> Result<(Addr<Self>, Snapshot, Arbiter), JournalError> {
        let store = Store::open(dir)?;
        let snapshot = store.load()?;
        let arbiter = Arbiter::new();
        let address = Self::start_in_arbiter(&arbiter.handle(), move |ctx| {
            ctx.set_mailbox_capacity(JOURNAL_MAILBOX);
            Self { store }
        });
        Ok((address, snapshot, arbiter))
    }
}

impl Actor for Journal {
    type Context = Context<Self>;
}

impl Handler<Record> for Journal {
    type Result = Result<(), JournalError>;

    fn handle(&mut self, Record(changes): Record, _: &mut Self::Context) -> Self::Result {
        self.store.apply(&changes)
    }
}

impl Handler<Load> for Journal {
    type Result = Result<Snapshot, JournalError>;

    fn handle(&mut self, _: Load, _: &mut Self::Context) -> Self::Result {
        self.store.load()
    }
}

/// Writes `changes` and waits until they are durable.
///
/// # Errors
/// As the journal's own; [`JournalError::Gone`] when its thread has ended.
pub async fn record(journal: &Addr<Journal>, changes: Vec<Change>) -> Result<(), JournalError> {
    journal
        .send(Record(changes))
        .await
        .unwrap_or(Err(JournalError::Gone))
}
