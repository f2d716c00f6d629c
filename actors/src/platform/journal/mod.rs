//! The Journal actor: the state database, and its only writer.
//!
//! The actor runs on a separate thread, since a durable write waits for the disk. Every external effect (spawn,
//! fence, freeze, switch, reclaim) is written before it is attempted and after it is confirmed. Rows contain the
//! data that undoes them; this actor makes no decisions.
//!
//! A decision ([`Record`]) waits for the disk. A report ([`Note`]) does not: it is written together with the next
//! record, or after a pause without writes, so that a commit record does not queue behind the disk writes of a
//! dozen events.
//!
//! The disk takes as long for one transaction as for many in one. Records that arrive during a disk write are
//! therefore written together: the decisions of hundreds of concurrent recoveries take a few writes.

mod backup;
mod change;
mod copies;
mod error;
mod proposal;
mod store;

use std::path::{Path, PathBuf};
use std::time::Duration;

use actix::prelude::*;
pub use change::{Change, Snapshot};
use copies::Copies;
pub use error::JournalError;
pub use proposal::{Proposal, Propose, record_commit};
use slog::Logger;
pub use store::{EVENTS_KEPT, MORPHS_KEPT, OPERATIONS_KEPT, RECOVERIES_KEPT};
use store::{Readers, Store};
use tokio::sync::oneshot;

/// Maximum number of transactions that wait for the disk before new ones are refused.
pub const JOURNAL_MAILBOX: usize = 4096;

/// Maximum number of notes that wait to be written.
pub const NOTES_MAX: usize = 256;
/// Maximum number of records written together.
pub const RECORDS_TOGETHER_MAX: usize = 256;
/// Time without a write after which waiting notes are written.
pub const NOTES_DELAY: Duration = Duration::from_millis(50);

/// The actor. [`Journal::open`] starts it.
pub struct Journal {
    store: Store,
    /// The next changes to write, in the order of their arrival.
    queue: Vec<Entry>,
    /// Number of records in the queue.
    records: usize,
    calm: Option<SpawnHandle>,
    /// Error of the last transaction, if it failed.
    failure: Option<JournalError>,
    /// The backups, once enabled.
    copies: Option<Copies>,
    /// Behaviour of the disk in a test.
    pace: Option<Box<dyn Pace>>,
}

/// A test's model of the disk.
pub trait Pace {
    /// Returns the duration of the next transaction.
    fn delay(&mut self) -> Duration;
    /// Returns whether the next transaction fails; then nothing of it is written.
    fn fails(&mut self) -> bool;
    /// Returns whether queued changes are written when the daemon dies.
    fn outlives(&mut self) -> bool;
}

/// Changes that wait for the next transaction.
struct Entry {
    changes: Vec<Change>,
    /// The caller that waits for the changes; `None` for a note.
    answer: Option<oneshot::Sender<Result<(), JournalError>>>,
}

/// Writes all changes in one transaction. The changes are durable when the answer arrives.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), JournalError>")]
pub struct Record(pub Vec<Change>);

/// Writes a change later, in order with the messages before and after it. The change may be lost if
/// the daemon dies within [`NOTES_DELAY`].
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Note(pub Change);

/// Makes backups of the journal in this directory from now on: the first one soon, unless there is one from the
/// last day, then daily.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct KeepBackups {
    /// The journal's directory.
    pub dir: PathBuf,
    /// Receives errors of the backups.
    pub log: Logger,
}

/// Time from the start to the first backup: the restoration of instances goes first.
const FIRST_BACKUP_AFTER: Duration = Duration::from_secs(5);
/// Interval between checks whether a backup is due.
const BACKUP_LOOK_INTERVAL: Duration = Duration::from_secs(15 * 60);

/// Reads everything.
#[derive(Debug, Message)]
#[rtype(result = "Result<Snapshot, JournalError>")]
pub struct Load;

/// Reads stored events.
#[derive(Debug, Message)]
#[rtype(result = "Result<StoredEvents, JournalError>")]
pub struct EventsAfter {
    /// Id of the event before the first one to read.
    pub after: u64,
    /// Maximum number of events.
    pub limit: usize,
}

/// See [`EventsAfter`].
#[derive(Debug)]
pub struct StoredEvents {
    /// The events, oldest first.
    pub events: Vec<crate::model::Event>,
    /// Older events after the requested id are no longer stored.
    pub dropped: bool,
}

/// Reads the error of the last transaction; `None` if it succeeded.
#[derive(Debug, Message)]
#[rtype(result = "Option<JournalError>")]
pub struct GetFailure;

/// Maximum wait for the answer to [`GetFailure`]: the journal's thread may wait for the disk.
const STATUS_TIMEOUT: Duration = Duration::from_millis(500);

/// Returns why the journal cannot be written, as far as known; `None` if it can.
pub async fn failure(journal: &Addr<Journal>) -> Option<String> {
    match tokio::time::timeout(STATUS_TIMEOUT, journal.send(GetFailure)).await {
        Ok(Ok(failure)) => failure.map(|error| error.to_string()),
        Ok(Err(_)) => Some(JournalError::Gone.to_string()),
        Err(_) => Some(format!("the disk has not answered for {STATUS_TIMEOUT:?}")),
    }
}

impl Journal {
    /// Opens the journal in `dir`, reads it, and starts the actor on its own thread. The thread ends with the returned
    /// arbiter.
    ///
    /// # Errors
    /// When another daemon holds it, or it cannot be opened, read and written.
    pub fn open(dir: &Path) -> Result<(Addr<Self>, Snapshot, Arbiter), JournalError> {
        let store = Store::open(dir)?;
        let snapshot = store.load_first(dir)?;
        #[expect(
            clippy::disallowed_methods,
            reason = "the daemon's; a run of a test opens the journal on its own thread"
        )]
        let arbiter = Arbiter::new();
        let address = Self::start_in_arbiter(&arbiter.handle(), move |ctx| {
            ctx.set_mailbox_capacity(JOURNAL_MAILBOX);
            Self::on(store, None)
        });
        Ok((address, snapshot, arbiter))
    }

    fn on(store: Store, pace: Option<Box<dyn Pace>>) -> Self {
        Self {
            store,
            queue: Vec::new(),
            records: 0,
            calm: None,
            failure: None,
            copies: None,
            pace,
        }
    }

    /// As [`Journal::open`], but on the caller's thread, for a test run with one thread and its own clock.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open_here(
        dir: &Path,
        pace: Box<dyn Pace>,
    ) -> Result<(Addr<Self>, Snapshot), JournalError> {
        let store = Store::open_for(dir, Readers::Process)?;
        let snapshot = store.load_first(dir)?;
        let address = Self::create(move |ctx| {
            ctx.set_mailbox_capacity(JOURNAL_MAILBOX);
            Self::on(store, Some(pace))
        });
        Ok((address, snapshot))
    }

    /// Replaces the journal in `dir` with the copy `copy`. Returns the path of the old journal, which is kept.
    ///
    /// # Errors
    /// When a daemon runs there, the copy is damaged, or the system fails.
    pub fn restore(dir: &Path, copy: &Path) -> Result<Option<PathBuf>, JournalError> {
        Store::restore(dir, copy)
    }

    /// Writes the queue in one transaction. If that fails, tries each record separately: a record that does not fit on
    /// the disk must not fail the others.
    ///
    /// # Errors
    /// When the single transaction failed.
    fn write(&mut self) -> Result<(), JournalError> {
        let queue = std::mem::take(&mut self.queue);
        let records = std::mem::take(&mut self.records);
        if queue.is_empty() {
            return Ok(());
        }
        let changes = || queue.iter().flat_map(|entry| &entry.changes);
        if changes().any(store::deletes_secrets)
            && let Some(copies) = &mut self.copies
        {
            copies.outdate();
        }
        let together = self.apply(changes());
        for Entry { changes, answer } in queue {
            // Notes may be lost, and the next record encounters the same disk error.
            let Some(answer) = answer else { continue };
            let written = match &together {
                Err(_) if records > 1 => self.apply(&changes),
                result => result.clone(),
            };
            let _ = answer.send(written);
        }
        together
    }

    fn apply<'a>(
        &mut self,
        changes: impl IntoIterator<Item = &'a Change>,
    ) -> Result<(), JournalError> {
        let fails = self.pace.as_mut().is_some_and(|pace| pace.fails());
        let written = match fails {
            true => Err(JournalError::DiskFull {
                reason: "as the test wants it".to_owned(),
            }),
            false => self.store.apply(changes),
        };
        self.failure = written.as_ref().err().cloned();
        written
    }

    fn write_now(&mut self, ctx: &mut Context<Self>) {
        self.wait_for_calm(ctx);
        if self.records > 0 {
            let _ = self.write();
        }
    }

    /// Runs deferred work after [`NOTES_DELAY`] without a write.
    fn wait_for_calm(&mut self, ctx: &mut Context<Self>) {
        if let Some(earlier) = self.calm.take() {
            ctx.cancel_future(earlier);
        }
        self.calm = Some(ctx.run_later(NOTES_DELAY, |act, _| {
            act.calm = None;
            if act.records > 0 {
                // The disk stalls: the pause begins once it has written.
                return;
            }
            let _ = act.write();
            act.store.checkpoint();
            if let Some(copies) = &mut act.copies {
                copies.scrub();
            }
        }));
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if self.pace.as_mut().is_none_or(|pace| pace.outlives()) {
            let _ = self.write();
        }
    }
}

impl Actor for Journal {
    type Context = Context<Self>;
}

/// Marks that all earlier messages are in the queue.
#[derive(Message)]
#[rtype(result = "()")]
struct Write;

impl Handler<Record> for Journal {
    type Result = ResponseFuture<Result<(), JournalError>>;

    fn handle(&mut self, Record(changes): Record, ctx: &mut Self::Context) -> Self::Result {
        crate::platform::fault::point("journal");
        let (answer, written) = oneshot::channel();
        if self.records == 0 {
            // Handled after all messages that are in the mailbox now.
            ctx.notify(Write);
        }
        self.records += 1;
        self.queue.push(Entry {
            changes,
            answer: Some(answer),
        });
        if self.records >= RECORDS_TOGETHER_MAX {
            let _ = self.write();
        }
        Box::pin(async move { written.await.unwrap_or(Err(JournalError::Gone)) })
    }
}

impl Handler<Write> for Journal {
    type Result = ();

    fn handle(&mut self, _: Write, ctx: &mut Self::Context) {
        let delay = self
            .pace
            .as_mut()
            .map_or(Duration::ZERO, |pace| pace.delay());
        if delay > Duration::ZERO {
            ctx.run_later(delay, |act, ctx| act.write_now(ctx));
        } else {
            self.write_now(ctx);
        }
    }
}

impl Handler<Note> for Journal {
    type Result = ();

    fn handle(&mut self, Note(change): Note, ctx: &mut Self::Context) {
        if self.queue.len() >= self.records + NOTES_MAX {
            let _ = self.write();
        }
        self.queue.push(Entry {
            changes: vec![change],
            answer: None,
        });
        self.wait_for_calm(ctx);
    }
}

impl Handler<KeepBackups> for Journal {
    type Result = ();

    fn handle(&mut self, keep: KeepBackups, ctx: &mut Self::Context) {
        self.copies = Some(Copies::new(keep.dir, keep.log));
        ctx.run_later(FIRST_BACKUP_AFTER, |act, _| {
            if let Some(copies) = &mut act.copies {
                // An earlier daemon may have died before it scrubbed the copies.
                copies.outdate();
                copies.look();
            }
        });
        ctx.run_interval(BACKUP_LOOK_INTERVAL, |act, _| {
            if let Some(copies) = &mut act.copies {
                copies.look();
            }
        });
    }
}

impl Handler<GetFailure> for Journal {
    type Result = MessageResult<GetFailure>;

    fn handle(&mut self, _: GetFailure, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.failure.clone())
    }
}

impl Handler<EventsAfter> for Journal {
    type Result = Result<StoredEvents, JournalError>;

    fn handle(&mut self, asked: EventsAfter, _: &mut Self::Context) -> Self::Result {
        self.store.events_after(asked.after, asked.limit)
    }
}

impl Handler<Load> for Journal {
    type Result = Result<Snapshot, JournalError>;

    fn handle(&mut self, _: Load, _: &mut Self::Context) -> Self::Result {
        self.write()?;
        self.store.load()
    }
}

/// Writes `changes` and waits until they are durable.
///
/// # Errors
/// The errors of the journal; [`JournalError::Gone`] when its thread has ended.
pub async fn record(journal: &Addr<Journal>, changes: Vec<Change>) -> Result<(), JournalError> {
    journal
        .send(Record(changes))
        .await
        .unwrap_or(Err(JournalError::Gone))
}

#[cfg(test)]
mod tests;
