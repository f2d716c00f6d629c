//! The database file: schema, transactions, limits. Its functions block; only the Journal actor's
//! thread calls them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kmorph_control_api::paths::{JOURNAL_NAME, STATE_MARKS};
use kmorph_files::{OwnDir, Refusal};
use nix::fcntl::{Flock, FlockArg};
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::change::{Change, Snapshot};
use super::error::JournalError;
use super::{StoredEvents, backup};
use crate::model::generation::AnyGeneration;
use crate::model::rows::GenerationRow;

/// Version of the schema. The daemon refuses a newer version and migrates an older one.
pub(super) const SCHEMA_VERSION: i64 = 1;
/// Number of events kept; older ones are removed.
pub const EVENTS_KEPT: u64 = 10_000;
/// Number of finished operations kept.
pub const OPERATIONS_KEPT: u64 = 1_000;
/// Number of recoveries kept.
pub const RECOVERIES_KEPT: u64 = 10_000;
/// Number of morphs kept.
pub const MORPHS_KEPT: u64 = 1_000;
/// Number of changes after which an idle journal is checkpointed.
const CHECKPOINT_AFTER: usize = 500;
/// Number of changes after which a journal that is not idle is checkpointed too, if the log still contains deleted
/// data.
const SCRUB_AFTER: usize = 4 * CHECKPOINT_AFTER;
/// Length of the log, in pages, at which SQLite checkpoints by itself, within the current
/// transaction (SQLite's default is 1,000).
const CHECKPOINT_FORCED_PAGES: i64 = 20_000;
/// Number of attempts to take the lock, and the pause between them: half a second in total.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Number of events read at the start, for streams that resume.
const EVENTS_LOADED: u64 = 1_000;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS instance (name TEXT PRIMARY KEY, row TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS generation (
    instance TEXT NOT NULL, generation INTEGER NOT NULL, row TEXT NOT NULL,
    PRIMARY KEY (instance, generation)) STRICT;
CREATE TABLE IF NOT EXISTS generation_counter (instance TEXT PRIMARY KEY, last INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS recovery (id INTEGER PRIMARY KEY, row TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS morph (session INTEGER PRIMARY KEY, row TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS operation (id INTEGER PRIMARY KEY, row TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS event (id INTEGER PRIMARY KEY, row TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS doctor (id INTEGER PRIMARY KEY, row TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS daemon_start (id INTEGER PRIMARY KEY CHECK (id = 1), count INTEGER NOT NULL) STRICT;
";

/// Number of compiled statements kept: more than the number of different statements.
const STATEMENTS_KEPT: usize = 64;

/// Other readers of the open database.
#[derive(Clone, Copy, Debug)]
pub(super) enum Readers {
    /// Other processes may read too.
    All,
    /// Only this process may read: SQLite locks the file once, and not for each transaction.
    Process,
}

impl Readers {
    /// Returns the name of SQLite's VFS for this mode (SQLite, "The SQLite OS Interface or VFS").
    const fn vfs(self) -> &'static std::ffi::CStr {
        match self {
            Self::All => c"unix",
            Self::Process => c"unix-excl",
        }
    }
}

/// The open database, and the lock that excludes other daemons.
pub(super) struct Store {
    db: Connection,
    since_checkpoint: usize,
    /// Number of events in the table: ids may have gaps, so they do not show the number.
    events: u64,
    /// The log still contains data that was deleted from the database, such as the environment of a workload.
    deleted_in_log: bool,
    _lock: Flock<std::fs::File>,
}

impl Store {
    /// Opens or creates the journal in `dir`. Restricts the directory and its contents to their owner.
    pub(super) fn open(dir: &Path) -> Result<Self, JournalError> {
        Self::open_for(dir, Readers::All)
    }

    /// As [`Store::open`], for the given readers.
    pub(super) fn open_for(dir: &Path, readers: Readers) -> Result<Self, JournalError> {
        let refused = |refusal| not_usable(dir, refusal);
        let owned = OwnDir::make_private(dir, &STATE_MARKS).map_err(refused)?;
        owned.mend().map_err(refused)?;
        let lock = Self::lock(&owned, dir)?;
        // SQLite gives its log and index the mode of the database.
        drop(owned.file(JOURNAL_NAME).map_err(refused)?);
        let path = owned.path().join(JOURNAL_NAME);
        let refuse = |reason: String| JournalError::Open {
            path: path.clone(),
            reason,
        };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let opened = Connection::open_with_flags_and_vfs(&path, flags, readers.vfs());
        let mut db = opened.map_err(|e| refuse(e.to_string()))?;
        db.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
        let prepared = prepare(&mut db, dir).and_then(|()| count_events(&db));
        let events = prepared.map_err(|error| match error {
            JournalError::Io { reason } => refuse(reason),
            JournalError::Broken { reason } => damaged(dir, reason),
            other => other,
        })?;
        Ok(Self {
            db,
            since_checkpoint: 0,
            events,
            // An earlier daemon may have deleted data and died before it scrubbed the log.
            deleted_in_log: true,
            _lock: lock,
        })
    }

    /// Excludes other daemons while the returned lock exists.
    fn lock(owned: &OwnDir, dir: &Path) -> Result<Flock<std::fs::File>, JournalError> {
        let lock = owned.file("lock");
        let lock = lock.map_err(|refusal| not_usable(dir, refusal))?;
        #[expect(
            clippy::disallowed_methods,
            reason = "before there are actors; runs of a test find the lock free"
        )]
        let pause = || std::thread::sleep(LOCK_PAUSE);
        lock_alone(lock, pause).ok_or_else(|| JournalError::InUse {
            dir: dir.to_owned(),
        })
    }

    /// Replaces the journal in `dir` with a copy. Returns the new path of the old journal, if there was one.
    pub(super) fn restore(dir: &Path, copy: &Path) -> Result<Option<PathBuf>, JournalError> {
        let owned = OwnDir::make_private(dir, &STATE_MARKS);
        let owned = owned.map_err(|refusal| not_usable(dir, refusal))?;
        let _lock = Self::lock(&owned, dir)?;
        backup::restore(dir, copy).map_err(|error| JournalError::NotRestored {
            reason: error.to_string(),
        })
    }

    /// Applies all of `changes` or none. They are durable on return.
    pub(super) fn apply<'a>(
        &mut self,
        changes: impl IntoIterator<Item = &'a Change>,
    ) -> Result<(), JournalError> {
        let mut changes = changes.into_iter().peekable();
        if changes.peek().is_none() {
            return Ok(());
        }
        let mut events = self.events;
        if self.deleted_in_log && self.since_checkpoint >= SCRUB_AFTER {
            self.checkpoint();
        }
        let (mut count, mut deleted) = (0, false);
        let applied = in_transaction(&self.db, |db| {
            for change in changes {
                count += 1;
                deleted |= deletes_secrets(change);
                match change {
                    Change::Event(id, row) => put_event(db, *id, row, &mut events)?,
                    other => apply_one(db, other)?,
                }
            }
            Ok(())
        });
        self.since_checkpoint += count;
        self.deleted_in_log |= deleted;
        applied?;
        self.events = events;
        Ok(())
    }

    /// Checkpoints the log if it is long or contains deleted data; in the second case also empties it. Call this when
    /// the journal is idle: it takes several disk writes.
    pub(super) fn checkpoint(&mut self) {
        if self.deleted_in_log {
            let truncate = "PRAGMA wal_checkpoint(TRUNCATE)";
            let busy = self.db.query_row(truncate, [], |row| row.get::<_, i64>(0));
            // A reader of the database can prevent this; the next call retries.
            self.deleted_in_log = busy != Ok(0);
            self.since_checkpoint = 0;
        }
        if self.since_checkpoint < CHECKPOINT_AFTER {
            return;
        }
        self.since_checkpoint = 0;
        // A failure here is harmless: the next call retries, and only the log's length depends on it.
        let _ = self
            .db
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
    }

    /// Returns up to `limit` events after the event with id `after`.
    pub(super) fn events_after(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<StoredEvents, JournalError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut statement = self
            .db
            .prepare_cached("SELECT row FROM event WHERE id > ?1 ORDER BY id LIMIT ?2")?;
        let texts = statement.query_map([signed(after), limit], |row| row.get(0))?;
        let events = parse_rows("event", texts)?;
        // Only the oldest events are removed: if an event before the requested ones exists, none in between is missing.
        let older = "SELECT EXISTS (SELECT 1 FROM event WHERE id <= ?1)";
        let older: bool = self
            .db
            .query_row(older, [signed(after)], |row| row.get(0))?;
        let dropped = !older && self.events >= EVENTS_KEPT;
        Ok(StoredEvents { events, dropped })
    }

    /// As [`Store::load`], for a journal that was just opened in `dir`: an error about damage contains the next step.
    pub(super) fn load_first(&self, dir: &Path) -> Result<Snapshot, JournalError> {
        self.load().map_err(|error| match error {
            JournalError::Broken { reason } => damaged(dir, reason),
            JournalError::Corrupt { table, reason } => {
                let reason = format!("the table {table} has a row that does not parse: {reason}");
                damaged(dir, reason)
            }
            other => other,
        })
    }

    /// Reads the whole journal.
    pub(super) fn load(&self) -> Result<Snapshot, JournalError> {
        let newest = format!("SELECT row FROM event ORDER BY id DESC LIMIT {EVENTS_LOADED}");
        let mut events = rows(&self.db, "event", &newest)?;
        events.reverse();
        let mut counters = self
            .db
            .prepare("SELECT instance, last FROM generation_counter")?;
        let last_generation = counters
            .query_map([], |row| {
                Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs()))
            })?
            .collect::<Result<_, _>>()?;
        let count = "SELECT count FROM daemon_start";
        let incarnation: i64 = self.db.query_row(count, [], |row| row.get(0))?;
        let generations: Vec<GenerationRow> = rows(
            &self.db,
            "generation",
            "SELECT row FROM generation ORDER BY generation",
        )?;
        Ok(Snapshot {
            incarnation: incarnation.unsigned_abs(),
            instances: rows(
                &self.db,
                "instance",
                "SELECT row FROM instance ORDER BY name",
            )?,
            generations: generations.into_iter().map(AnyGeneration::from).collect(),
            last_generation,
            recoveries: rows(&self.db, "recovery", "SELECT row FROM recovery ORDER BY id")?,
            morphs: rows(&self.db, "morph", "SELECT row FROM morph ORDER BY session")?,
            operations: rows(
                &self.db,
                "operation",
                "SELECT row FROM operation ORDER BY id",
            )?,
            events,
            doctor: rows(&self.db, "doctor", "SELECT row FROM doctor")?.pop(),
        })
    }
}

/// Returns why the state directory `dir` is unusable.
fn not_usable(dir: &Path, refusal: Refusal) -> JournalError {
    match refusal {
        Refusal::System { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            JournalError::DiskFull {
                reason: source.to_string(),
            }
        }
        Refusal::System { .. } => JournalError::Open {
            path: dir.join(JOURNAL_NAME),
            reason: refusal.to_string(),
        },
        other => JournalError::Unsafe(other.to_string()),
    }
}

/// Takes the lock. If a daemon was killed while it started a process, that process has inherited the lock and
/// holds it until it executes its own program. So this function retries for a while before it reports another
/// daemon.
fn lock_alone(file: std::fs::File, mut pause: impl FnMut()) -> Option<Flock<std::fs::File>> {
    let mut file = file;
    for _ in 0..LOCK_TRIES {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((back, _)) => file = back,
        }
        pause();
    }
    None
}

/// Returns whether a change deletes a row that can contain an environment, and with it passwords.
pub(super) fn deletes_secrets(change: &Change) -> bool {
    matches!(change, Change::InstanceGone(_))
}

fn damaged(dir: &Path, reason: String) -> JournalError {
    JournalError::Damaged {
        path: dir.join(JOURNAL_NAME),
        reason,
        backup: backup::newest_good(dir),
    }
}

fn prepare(db: &mut Connection, dir: &Path) -> Result<(), JournalError> {
    // Overwrite deleted and replaced data with zeros: rows of instances contain the environments of workloads.
    db.pragma_update(None, "secure_delete", "ON")?;
    // FULL with WAL: a transaction is on the disk when commit returns (SQLite, "PRAGMA
    // synchronous"). The commit point of a morph rests on this.
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_FORCED_PAGES)?;
    let found: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if found > SCHEMA_VERSION {
        return Err(JournalError::NewerSchema { found });
    }
    if let Some(reason) = backup::damage(db)? {
        return Err(JournalError::Broken { reason });
    }
    let is_new: bool = db.query_row(
        "SELECT NOT EXISTS (SELECT 1 FROM sqlite_schema)",
        [],
        |row| row.get(0),
    )?;
    if found < SCHEMA_VERSION && !is_new {
        backup::make(dir).map_err(|error| JournalError::NoBackup {
            reason: error.to_string(),
        })?;
    }
    let tx = db.transaction()?;
    tx.execute_batch(SCHEMA)?;
    // Written at every start, so that a read-only or full disk is found now and not at the first
    // failure of an instance.
    tx.execute(
        "DELETE FROM event WHERE id NOT IN (SELECT id FROM event ORDER BY id DESC LIMIT ?1)",
        [signed(EVENTS_KEPT)],
    )?;
    tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    tx.execute(
        "INSERT INTO daemon_start VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET count = count + 1",
        [],
    )?;
    Ok(tx.commit()?)
}

/// Applies all changes of `change` or none.
///
/// Replaces [`Connection::transaction`], which would compile its statements each time.
fn in_transaction(
    db: &Connection,
    change: impl FnOnce(&Connection) -> Result<(), JournalError>,
) -> Result<(), JournalError> {
    db.prepare_cached("BEGIN")?.execute([])?;
    let made = change(db).and_then(|()| Ok(db.prepare_cached("COMMIT")?.execute([])?));
    if made.is_err() && !db.is_autocommit() {
        db.prepare_cached("ROLLBACK")?.execute([])?;
    }
    made.map(drop)
}

fn count_events(db: &Connection) -> Result<u64, JournalError> {
    let count: i64 = db.query_row("SELECT count(*) FROM event", [], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// Adds an event, and removes the oldest one if there are more than [`EVENTS_KEPT`].
fn put_event(db: &Connection, id: u64, row: &str, count: &mut u64) -> Result<(), JournalError> {
    let sql = "INSERT OR IGNORE INTO event VALUES (?1, ?2)";
    let added = db.prepare_cached(sql)?.execute(params![signed(id), row])?;
    if added == 0 {
        let sql = "UPDATE event SET row = ?2 WHERE id = ?1";
        db.prepare_cached(sql)?.execute(params![signed(id), row])?;
    }
    *count += added as u64;
    while *count > EVENTS_KEPT {
        let sql = "DELETE FROM event WHERE id = (SELECT min(id) FROM event)";
        let dropped = db.prepare_cached(sql)?.execute([])?;
        if dropped == 0 {
            break;
        }
        *count -= 1;
    }
    Ok(())
}

fn rows<T: DeserializeOwned>(
    db: &Connection,
    table: &'static str,
    query: &str,
) -> Result<Vec<T>, JournalError> {
    let mut statement = db.prepare(query)?;
    let texts = statement.query_map([], |row| row.get(0))?;
    parse_rows(table, texts)
}

fn parse_rows<T: DeserializeOwned>(
    table: &'static str,
    texts: impl Iterator<Item = Result<String, rusqlite::Error>>,
) -> Result<Vec<T>, JournalError> {
    let parse = |text: Result<String, rusqlite::Error>| {
        serde_json::from_str(&text?).map_err(|e| JournalError::Corrupt {
            table,
            reason: e.to_string(),
        })
    };
    texts.map(parse).collect()
}

fn json<T: Serialize>(row: &T) -> Result<String, JournalError> {
    serde_json::to_string(row).map_err(|e| JournalError::Io {
        reason: e.to_string(),
    })
}

/// Converts an id to SQLite's signed integers; the ids are counters that start at 1.
fn signed(id: u64) -> i64 {
    i64::try_from(id).unwrap_or(i64::MAX)
}

fn apply_one(db: &Connection, change: &Change) -> Result<(), JournalError> {
    match change {
        Change::Instance(row) => {
            let sql = "INSERT INTO instance VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE
                       SET row = json_set(excluded.row, '$.policy', instance.row -> '$.policy')";
            db.prepare_cached(sql)?
                .execute(params![row.name, json(row)?])?;
        }
        Change::Policy(name, policy) => {
            let sql = "UPDATE instance SET row = json_set(row, '$.policy', json(?2))
                       WHERE name = ?1";
            db.prepare_cached(sql)?
                .execute(params![name, json(policy)?])?;
        }
        Change::InstanceGone(name) => {
            let sql = "DELETE FROM instance WHERE name = ?1";
            db.prepare_cached(sql)?.execute([name])?;
        }
        Change::Generation(row) => {
            let sql = "INSERT INTO generation VALUES (?1, ?2, ?3)
                       ON CONFLICT (instance, generation) DO UPDATE
                       SET row = json_set(excluded.row, '$.boot_id', generation.row -> '$.boot_id')";
            let number = signed(row.generation);
            db.prepare_cached(sql)?
                .execute(params![row.instance, number, json(row)?])?;
            let sql = "INSERT INTO generation_counter VALUES (?1, ?2)
                       ON CONFLICT (instance) DO UPDATE SET last = max(last, excluded.last)";
            db.prepare_cached(sql)?
                .execute(params![row.instance, number])?;
        }
        Change::Booted(instance, generation, boot_id) => {
            let sql = "UPDATE generation SET row = json_set(row, '$.boot_id', json(?3))
                       WHERE instance = ?1 AND generation = ?2";
            db.prepare_cached(sql)?.execute(params![
                instance,
                signed(*generation),
                json(boot_id)?
            ])?;
        }
        Change::GenerationGone(instance, generation) => {
            let sql = "DELETE FROM generation WHERE instance = ?1 AND generation = ?2";
            db.prepare_cached(sql)?
                .execute(params![instance, signed(*generation)])?;
        }
        Change::Recovery(row) => put(db, "recovery", row.record.id, &json(row)?, RECOVERIES_KEPT)?,
        Change::Morph(row) => put(db, "morph", row.status.session, &json(row)?, MORPHS_KEPT)?,
        Change::Operation(id, row) => put(db, "operation", *id, row, OPERATIONS_KEPT)?,
        // `put_event` counts them.
        Change::Event(..) => {}
        Change::Doctor(row) => put(db, "doctor", 1, &json(row)?, 1)?,
    }
    Ok(())
}

/// Inserts or replaces a row of a table whose key is a counter, and removes the row that exceeds
/// the number kept.
fn put(
    db: &Connection,
    table: &'static str,
    id: u64,
    row: &str,
    kept: u64,
) -> Result<(), JournalError> {
    let key = match table {
        "morph" => "session",
        _ => "id",
    };
    let sql = format!("SELECT 1 FROM {table} WHERE {key} = ?1");
    let known = db
        .prepare_cached(&sql)?
        .query_row([signed(id)], |_| Ok(()))
        .optional()?;
    let sql = format!("INSERT OR REPLACE INTO {table} VALUES (?1, ?2)");
    db.prepare_cached(&sql)?.execute(params![signed(id), row])?;
    if known.is_none() {
        let sql = format!("DELETE FROM {table} WHERE {key} <= ?1");
        db.prepare_cached(&sql)?
            .execute([signed(id).saturating_sub(signed(kept))])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_made_before_the_schema_is_changed_and_not_of_a_new_journal() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(backup::newest_good(dir.path()), None);
        store.db.pragma_update(None, "user_version", 0).unwrap();
        drop(store);
        drop(Store::open(dir.path()).unwrap());
        let copy = backup::newest_good(dir.path()).unwrap();
        let version = Connection::open(copy).unwrap();
        let version: i64 = version
            .query_row("PRAGMA user_version", [], |r| r.get(0))
            .unwrap();
        assert_eq!(version, 0, "as it was before");
    }

    #[test]
    fn each_start_of_a_daemon_is_a_later_incarnation() {
        let dir = tempfile::tempdir().unwrap();
        for incarnation in 1..4 {
            let store = Store::open(dir.path()).unwrap();
            assert_eq!(store.load().unwrap().incarnation, incarnation);
        }
    }

    #[test]
    fn what_is_damaged_is_named_with_the_newest_good_copy() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        let copy = backup::make(dir.path()).unwrap();
        let path = dir.path().join(JOURNAL_NAME);
        let whole = std::fs::read(&path).unwrap();
        let refusal = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let opened = Store::open(dir.path()).and_then(|s| s.load_first(dir.path()).map(drop));
            opened.unwrap_err().to_string()
        };
        let mut torn = whole.clone();
        torn[4096..8192].fill(0xa5);
        for bytes in [
            &b"no database at all, but long enough"[..],
            &torn,
            &whole[..whole.len() / 2],
        ] {
            let text = refusal(bytes);
            assert!(text.contains("is damaged"), "{text}");
            let command = format!("--restore-journal={}", copy.display());
            assert!(text.contains(&command), "{text}");
        }
        std::fs::write(&path, &whole).unwrap();
        let store = Store::open(dir.path()).unwrap();
        store
            .db
            .execute("INSERT INTO operation VALUES (1, '{')", [])
            .unwrap();
        let text = store.load_first(dir.path()).unwrap_err().to_string();
        assert!(
            text.contains("table operation") && text.contains("--restore-journal="),
            "{text}"
        );
        drop(store);
        Store::restore(dir.path(), &copy).unwrap();
        Store::open(dir.path())
            .unwrap()
            .load_first(dir.path())
            .unwrap();
    }

    #[test]
    fn a_lock_that_is_about_to_be_free_is_waited_for_and_another_daemons_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let open = || std::fs::File::create(dir.path().join("lock")).unwrap();
        let mut held = lock_alone(open(), || {});
        let mut pauses = 0;
        assert!(lock_alone(open(), || pauses += 1).is_none());
        assert_eq!(pauses, LOCK_TRIES);
        // The process that inherited the lock executes its program during the first pause.
        assert!(lock_alone(open(), || held = None).is_some());
    }
}
