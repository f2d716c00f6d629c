//! The Journal actor: the state database, and its only writer.
//!
//! It runs on a thread of its own, since a durable write waits for the disk. Every external effect
//! (spawn, fence, freeze, switch, reclaim) is written before it is attempted and after it is
//! confirmed. Rows carry what undoes them; nothing here decides anything.
//!
//! What is decided waits for the disk, with [`Record`]. What only reports ([`Note`]) does not, and is
//! written together with the next record, or when nothing was written for a while: a commit record
//! must not stand in line behind the disk writes of a dozen events.
//!
//! The disk takes as long for one transaction as for many in one. So records that arrive while the disk is waited
//! for are written together: what hundreds of recoveries decide at the same time takes them a few writes.

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

/// Transactions that may wait for the disk before new ones are refused.
pub const JOURNAL_MAILBOX: usize = 4096;

/// Notes that may wait to be written.
pub const NOTES_MAX: usize = 256;
/// Records that are written together.
pub const RECORDS_TOGETHER_MAX: usize = 256;
/// Time without a write after which notes are written.
pub const NOTES_DELAY: Duration = Duration::from_millis(50);

/// The actor. [`Journal::open`] starts it.
pub struct Journal {
    store: Store,
    /// What is written next, in the order in which it came.
    queue: Vec<Entry>,
    /// Records in it.
    records: usize,
    calm: Option<SpawnHandle>,
    /// Why the last transaction failed, if it did.
    failure: Option<JournalError>,
    /// Copies of it, once they are kept.
    copies: Option<Copies>,
    /// How the disk behaves, in a test.
    pace: Option<Box<dyn Pace>>,
}

/// How a test has the disk behave.
pub trait Pace {
    /// How long the next transaction takes.
    fn delay(&mut self) -> Duration;
    /// Whether it fails; nothing of it is written then.
    fn fails(&mut self) -> bool;
    /// Whether what stands in line is written when the daemon dies.
    fn outlives(&mut self) -> bool;
}

/// What stands in line for the next transaction.
struct Entry {
    changes: Vec<Change>,
    /// Whoever waits for them; nobody for a note.
    answer: Option<oneshot::Sender<Result<(), JournalError>>>,
}

/// Writes all changes in one transaction. Durable when answered.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), JournalError>")]
pub struct Record(pub Vec<Change>);

/// Writes a change some time, after what was sent before and before what is sent later. It may be lost
/// when the daemon dies within [`NOTES_DELAY`].
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Note(pub Change);

/// Makes copies of the journal in this directory from now on: soon one, unless there is one of the last day, then
/// daily.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct KeepBackups {
    /// The journal's directory.
    pub dir: PathBuf,
    /// Where it is told when one cannot be made.
    pub log: Logger,
}

/// Time after the start before the first copy: instances come first.
const FIRST_BACKUP_AFTER: Duration = Duration::from_secs(5);
/// How often it is looked whether a copy is due.
const BACKUP_LOOK_INTERVAL: Duration = Duration::from_secs(15 * 60);

/// Reads everything.
#[derive(Debug, Message)]
#[rtype(result = "Result<Snapshot, JournalError>")]
pub struct Load;

/// Reads events back.
#[derive(Debug, Message)]
#[rtype(result = "Result<StoredEvents, JournalError>")]
pub struct EventsAfter {
    /// The id of the event before them.
    pub after: u64,
    /// How many, at most.
    pub limit: usize,
}

/// See [`EventsAfter`].
#[derive(Debug)]
pub struct StoredEvents {
    /// The events, oldest first.
    pub events: Vec<crate::model::Event>,
    /// Older ones after the id asked for are not kept any more.
    pub dropped: bool,
}

/// Asks why the last transaction failed; `None` when it did not.
#[derive(Debug, Message)]
#[rtype(result = "Option<JournalError>")]
pub struct GetFailure;

/// Longest wait for the answer to [`GetFailure`]: the journal's thread may be waiting for the disk.
const STATUS_TIMEOUT: Duration = Duration::from_millis(500);

/// Why the journal cannot be written, as far as is known; `None` when all is well.
pub async fn failure(journal: &Addr<Journal>) -> Option<String> {
    match tokio::time::timeout(STATUS_TIMEOUT, journal.send(GetFailure)).await {
        Ok(Ok(failure)) => failure.map(|error| error.to_string()),
        Ok(Err(_)) => Some(JournalError::Gone.to_string()),
        Err(_) => Some(format!("the disk has not answered for {STATUS_TIMEOUT:?}")),
    }
}

impl Journal {
    /// Opens the journal in `dir`, reads it, and starts the actor on its own thread. The thread
    /// ends with the returned arbiter.
    ///
    /// # Errors
    /// When another daemon has it, or it cannot be opened, read and written.
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

    /// As [`Journal::open`], on the thread of the caller, for a run of a test with one thread and a clock of its own.
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

    /// Puts the copy `copy` in the place of the journal in `dir`. The journal that was there is kept; where.
    ///
    /// # Errors
    /// When a daemon runs there, the copy is damaged, or the system refuses.
    pub fn restore(dir: &Path, copy: &Path) -> Result<Option<PathBuf>, JournalError> {
        Store::restore(dir, copy)
    }

    /// Writes what stands in line, in one transaction. Where that fails, each record is tried on its own: one that
    /// the disk has no room for must not be the end of the others.
    ///
    /// # Errors
    /// When it could not be written as one transaction.
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
            // Notes may be lost, and a disk that cannot be written is met again by the next record.
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

    /// What can wait is done once nothing was written for [`NOTES_DELAY`].
    fn wait_for_calm(&mut self, ctx: &mut Context<Self>) {
        if let Some(earlier) = self.calm.take() {
            ctx.cancel_future(earlier);
        }
        self.calm = Some(ctx.run_later(NOTES_DELAY, |act, _| {
            act.calm = None;
            if act.records > 0 {
                // A disk that stalls: calm begins when it has written.
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

/// Everything that had arrived before is in line.
#[derive(Message)]
#[rtype(result = "()")]
struct Write;

impl Handler<Record> for Journal {
    type Result = ResponseFuture<Result<(), JournalError>>;

    fn handle(&mut self, Record(changes): Record, ctx: &mut Self::Context) -> Self::Result {
        crate::platform::fault::point("journal");
        let (answer, written) = oneshot::channel();
        if self.records == 0 {
            // Handled after what is in the mailbox now.
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
                // What an earlier daemon did not live to scrub.
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
/// As the journal's own; [`JournalError::Gone`] when its thread has ended.
pub async fn record(journal: &Addr<Journal>, changes: Vec<Change>) -> Result<(), JournalError> {
    journal
        .send(Record(changes))
        .await
        .unwrap_or(Err(JournalError::Gone))
}

#[cfg(test)]
mod tests;
