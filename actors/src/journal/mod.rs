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
mod copies;
mod error;
mod rows;
mod store;

use std::path::{Path, PathBuf};
use std::time::Duration;

use actix::prelude::*;
use copies::Copies;
pub use error::JournalError;
pub use rows::{
    CertificateRow, Change, Desired, GenerationPhase, GenerationRow, InstanceRow, InstanceSpec,
    KernelChoice, MorphRow, PublishedPortSpec, RecoveryRow, Snapshot, WorkloadRestarts,
};
use slog::Logger;
use store::Store;
pub use store::{EVENTS_KEPT, MORPHS_KEPT, OPERATIONS_KEPT, RECOVERIES_KEPT};
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
    pub events: Vec<kmorph_control_api::Event>,
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
        let arbiter = Arbiter::new();
        let address = Self::start_in_arbiter(&arbiter.handle(), move |ctx| {
            ctx.set_mailbox_capacity(JOURNAL_MAILBOX);
            Self {
                store,
                queue: Vec::new(),
                records: 0,
                calm: None,
                failure: None,
                copies: None,
            }
        });
        Ok((address, snapshot, arbiter))
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
        let written = self.store.apply(changes);
        self.failure = written.as_ref().err().cloned();
        written
    }

    /// What can wait is done once nothing was written for [`NOTES_DELAY`].
    fn wait_for_calm(&mut self, ctx: &mut Context<Self>) {
        if let Some(earlier) = self.calm.take() {
            ctx.cancel_future(earlier);
        }
        self.calm = Some(ctx.run_later(NOTES_DELAY, |act, _| {
            act.calm = None;
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
        let _ = self.write();
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
        crate::fault::point("journal");
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
        self.wait_for_calm(ctx);
        if self.records > 0 {
            let _ = self.write();
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
mod tests {
    use kmorph_control_api::{Event, EventKind};

    use super::*;

    fn event(id: u64, message: &str) -> Change {
        let event = Event {
            id,
            at: String::new(),
            kind: EventKind::Daemon,
            instance: None,
            generation: None,
            message: message.to_owned(),
            detail: serde_json::json!({}),
        };
        Change::Event(id, serde_json::to_string(&event).unwrap().into())
    }

    /// Messages on the disk, as another process would find them.
    fn on_disk(dir: &Path) -> Vec<String> {
        let db = rusqlite::Connection::open(dir.join("journal.sqlite")).unwrap();
        let mut rows = db.prepare("SELECT row FROM event ORDER BY id").unwrap();
        let texts = rows.query_map([], |row| row.get::<_, String>(0)).unwrap();
        texts
            .map(|text| {
                serde_json::from_str::<Event>(&text.unwrap())
                    .unwrap()
                    .message
            })
            .collect()
    }

    #[actix::test]
    async fn a_note_is_written_with_the_next_record_and_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        journal.send(Note(event(1, "note"))).await.unwrap();
        journal.send(Note(event(2, "older"))).await.unwrap();
        record(&journal, vec![event(2, "newer")]).await.unwrap();
        assert_eq!(on_disk(dir.path()), ["note", "newer"]);
        arbiter.stop();
        arbiter.join().unwrap();
    }

    #[actix::test]
    async fn a_note_alone_is_written_soon_and_one_more_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        journal.send(Note(event(1, "alone"))).await.unwrap();
        let written = async {
            while on_disk(dir.path()).is_empty() {
                tokio::time::sleep(NOTES_DELAY).await;
            }
        };
        let deadline = Duration::from_secs(60);
        tokio::time::timeout(deadline, written).await.unwrap();
        journal.send(Note(event(2, "last"))).await.unwrap();
        arbiter.stop();
        arbiter.join().unwrap();
        assert_eq!(on_disk(dir.path()), ["alone", "last"]);
    }

    #[actix::test]
    async fn one_of_many_records_that_is_refused_takes_none_of_the_others_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let other = rusqlite::Connection::open(dir.path().join("journal.sqlite")).unwrap();
        other
            .execute_batch(
                "CREATE TRIGGER refuse BEFORE INSERT ON event WHEN NEW.row LIKE '%refused%'
                 BEGIN SELECT RAISE(ABORT, 'as the test wants it'); END;",
            )
            .unwrap();
        // The journal's thread is busy; what is sent meanwhile is written together.
        arbiter.spawn_fn(|| std::thread::sleep(Duration::from_millis(200)));
        let texts = ["first", "second", "refused", "third"];
        let sent = (1..)
            .zip(texts)
            .map(|(id, text)| journal.send(Record(vec![event(id, text)])));
        let sent: Vec<_> = sent.collect();
        let answers = futures_util::future::join_all(sent).await;
        let written: Vec<bool> = answers
            .iter()
            .map(|a| a.as_ref().unwrap().is_ok())
            .collect();
        assert_eq!(written, [true, true, false, true]);
        assert_eq!(on_disk(dir.path()), ["first", "second", "third"]);
        arbiter.stop();
        arbiter.join().unwrap();
    }

    fn instance(morphs: u64) -> InstanceRow {
        InstanceRow {
            name: "web".to_owned(),
            spec: InstanceSpec {
                kernel: KernelChoice {
                    path: "/boot/vmlinuz".into(),
                    release: "6.1.0".to_owned(),
                    sha256: "ab".repeat(32),
                    cmdline: "quiet \"x\"".to_owned(),
                    initramfs: None,
                },
                cpus: 1,
                memory_bytes: u64::MAX,
                workload: None,
                publish: Vec::new(),
                monitor: true,
                backend: kmorph_backends::contract::BackendKind::Embedded,
                throw_away: false,
            },
            policy: kmorph_control_api::Policy {
                heartbeat_timeout_s: 0.1,
                auto_heal: true,
                morph_timeout_s: 60.0,
                vmcore: kmorph_control_api::VmcorePolicy::Off,
                stuck_cpu: kmorph_control_api::StuckCpuPolicy::Degraded,
            },
            desired: Desired::Running,
            reason: None,
            created_at: String::new(),
            active_generation: u64::MAX,
            recoveries: 0,
            morphs,
            workload_failures: 0,
            workload_restarts: WorkloadRestarts::default(),
        }
    }

    const SECRET: &str = "correct-horse-battery-staple";

    /// The files in `dir` that hold the secret anywhere, in use or not.
    fn files_with_the_secret(dir: &Path) -> Vec<std::path::PathBuf> {
        let paths = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
        let holds = |path: &std::path::PathBuf| {
            let bytes = std::fs::read(path).unwrap_or_default();
            bytes.windows(SECRET.len()).any(|w| w == SECRET.as_bytes())
        };
        paths.filter(holds).collect()
    }

    #[actix::test]
    async fn the_environment_of_an_instance_that_is_gone_is_on_the_disk_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let mut row = instance(0);
        row.spec.workload = Some(kmorph_control_api::WorkloadRequest {
            program: "/bin/db".to_owned(),
            args: Vec::new(),
            // Long enough for pages of its own.
            env: [("PASSWORD".to_owned(), SECRET.repeat(1000))].into(),
        });
        for morphs in 0..3 {
            row.morphs = morphs;
            let change = Change::Instance(Box::new(row.clone()));
            record(&journal, vec![change]).await.unwrap();
        }
        assert!(!files_with_the_secret(dir.path()).is_empty());
        let gone = Change::InstanceGone(row.name.clone());
        record(&journal, vec![gone]).await.unwrap();
        let scrubbed = async {
            while !files_with_the_secret(dir.path()).is_empty() {
                tokio::time::sleep(NOTES_DELAY).await;
            }
        };
        let deadline = Duration::from_secs(60);
        let waited = tokio::time::timeout(deadline, scrubbed).await;
        assert!(waited.is_ok(), "{:?}", files_with_the_secret(dir.path()));
        arbiter.stop();
        arbiter.join().unwrap();
    }

    #[actix::test]
    async fn the_journal_is_for_its_owner_only_also_one_that_was_not() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        for earlier in [false, true] {
            if earlier {
                for entry in std::fs::read_dir(&state).unwrap() {
                    set(&entry.unwrap().path(), 0o644);
                }
                set(&state, 0o755);
            }
            let (journal, _, arbiter) = Journal::open(&state).unwrap();
            record(&journal, vec![event(1, "written")]).await.unwrap();
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode(&state), 0o700);
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&state).unwrap() {
                let path = entry.unwrap().path();
                assert_eq!(mode(&path), 0o600, "{path:?}");
                names.push(path.file_name().unwrap().to_owned());
            }
            assert!(names.contains(&"journal.sqlite-wal".into()), "{names:?}");
            arbiter.stop();
            arbiter.join().unwrap();
        }
    }

    #[actix::test]
    async fn a_planted_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&state, private).unwrap();
        let target = dir.path().join("precious");
        std::os::unix::fs::symlink(&target, state.join("journal.sqlite-wal")).unwrap();
        let refused = Journal::open(&state).map(|_| ()).unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains("symbolic link") && text.contains("remove"),
            "{text}"
        );
        assert!(!target.exists());
    }

    #[actix::test]
    async fn a_policy_is_changed_by_its_own_change_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let written = instance(0);
        let new = Change::Instance(Box::new(written.clone()));
        record(&journal, vec![new]).await.unwrap();
        let mut policy = written.policy.clone();
        policy.heartbeat_timeout_s = 7.25;
        let changed = Change::Policy("web".to_owned(), Box::new(policy.clone()));
        let gone = Change::Policy("gone".to_owned(), Box::new(policy.clone()));
        record(&journal, vec![changed, gone]).await.unwrap();
        // Written by someone who knows the older policy.
        let later = Change::Instance(Box::new(instance(1)));
        record(&journal, vec![later]).await.unwrap();
        let found = journal.send(Load).await.unwrap().unwrap().instances;
        assert_eq!(
            found,
            [InstanceRow {
                policy,
                ..instance(1)
            }]
        );
        arbiter.stop();
        arbiter.join().unwrap();
    }
}
