//! The database file: schema, transactions, limits. Blocking; only the Journal actor's thread
//! calls it.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use rusqlite::{Connection, ErrorCode, OptionalExtension, Transaction, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::rows::{Change, Snapshot};

/// Version of the schema; a newer one is refused, an older one migrated.
const SCHEMA_VERSION: i64 = 1;
/// Events kept; older ones are removed.
pub const EVENTS_KEPT: u64 = 10_000;
/// Finished operations kept.
pub const OPERATIONS_KEPT: u64 = 1_000;
/// Recoveries kept.
pub const RECOVERIES_KEPT: u64 = 10_000;
/// Morphs kept.
pub const MORPHS_KEPT: u64 = 1_000;
/// Changes after which the log is worked into the database when there is time.
const CHECKPOINT_AFTER: usize = 500;
/// Pages of the log after which SQLite does that by itself, in the transaction that it meets (the
/// default is 1,000).
const CHECKPOINT_FORCED_PAGES: i64 = 20_000;
/// Tries for the lock, and the pause between them: half a second in all.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Events read back at the start for streams that resume.
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

/// Why the journal could not be opened, read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Another daemon has it.
    #[error(
        "another kmorphd uses the state directory {dir:?} (its lock file is held); stop it, or \
         give this one a state directory of its own"
    )]
    InUse {
        /// The state directory.
        dir: PathBuf,
    },
    /// The directory or file cannot be used.
    #[error(
        "the journal {path:?} cannot be opened: {reason}; the state directory must be writable"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's or SQLite's reason.
        reason: String,
    },
    /// Written by a newer kmorphd.
    #[error("the journal has schema version {found}, this kmorphd knows up to {SCHEMA_VERSION}")]
    NewerSchema {
        /// The version found.
        found: i64,
    },
    /// The disk is full.
    #[error("the journal cannot be written, the disk is full ({reason}); free some space")]
    DiskFull {
        /// SQLite's reason.
        reason: String,
    },
    /// Reading or writing failed otherwise.
    #[error("the journal cannot be read or written: {reason}")]
    Io {
        /// SQLite's reason.
        reason: String,
    },
    /// A row does not parse: the file was changed by something else.
    #[error("the journal's table {table} has a row that does not parse: {reason}")]
    Corrupt {
        /// The table.
        table: &'static str,
        /// Why.
        reason: String,
    },
    /// The journal's own thread is gone.
    #[error("the journal's actor is gone")]
    Gone,
}

impl From<rusqlite::Error> for JournalError {
    fn from(error: rusqlite::Error) -> Self {
        let reason = error.to_string();
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::DiskFull { reason },
            _ => Self::Io { reason },
        }
    }
}

/// The open database and the lock that keeps every other daemon out.
pub(super) struct Store {
    db: Connection,
    since_checkpoint: usize,
    _lock: Flock<std::fs::File>,
}

impl Store {
    /// Opens or creates the journal in `dir`.
    pub(super) fn open(dir: &Path) -> Result<Self, JournalError> {
        let path = dir.join("journal.sqlite");
        let refuse = |reason: String| JournalError::Open {
            path: path.clone(),
            reason,
        };
        let mut options = std::fs::OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let lock = options
            .open(dir.join("lock"))
            .map_err(|e| refuse(e.to_string()))?;
        let lock = lock_alone(lock, || std::thread::sleep(LOCK_PAUSE)).ok_or_else(|| {
            JournalError::InUse {
                dir: dir.to_owned(),
            }
        })?;
        let mut db = Connection::open(&path).map_err(|e| refuse(e.to_string()))?;
        prepare(&mut db).map_err(|error| match error {
            JournalError::Io { reason } => refuse(reason),
            other => other,
        })?;
        Ok(Self {
            db,
            since_checkpoint: 0,
            _lock: lock,
        })
    }

    /// Applies all of `changes`, or none. Durable when it returns.
    pub(super) fn apply(&mut self, changes: &[Change]) -> Result<(), JournalError> {
        if changes.is_empty() {
            return Ok(());
        }
        self.since_checkpoint += changes.len();
        let tx = self.db.transaction()?;
        for change in changes {
            apply_one(&tx, change)?;
        }
        Ok(tx.commit()?)
    }

    /// Works the log into the database if it has grown long. To be called when nobody waits: it
    /// takes several disk writes.
    pub(super) fn checkpoint(&mut self) {
        if self.since_checkpoint < CHECKPOINT_AFTER {
            return;
        }
        self.since_checkpoint = 0;
        // What fails here is done later; nothing depends on it but the length of the log.
        let _ = self
            .db
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
    }

    /// Reads everything.
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
        Ok(Snapshot {
            incarnation: incarnation.unsigned_abs(),
            instances: rows(
                &self.db,
                "instance",
                "SELECT row FROM instance ORDER BY name",
            )?,
            generations: rows(
                &self.db,
                "generation",
                "SELECT row FROM generation ORDER BY generation",
            )?,
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

/// Takes the lock. A daemon that was killed while it started a process is gone, and its lock is not: that process
/// has inherited it, until it executes its own program. So it is tried again for a while before another daemon is
/// believed to be there.
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

fn prepare(db: &mut Connection) -> Result<(), JournalError> {
    // FULL with WAL: a transaction is on the disk when commit returns (SQLite, "PRAGMA
    // synchronous"). The commit point of a morph rests on this.
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_FORCED_PAGES)?;
    let found: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if found > SCHEMA_VERSION {
        return Err(JournalError::NewerSchema { found });
    }
    let tx = db.transaction()?;
    tx.execute_batch(SCHEMA)?;
    if found < SCHEMA_VERSION {
        tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    }
    // Written at every start, so that a read-only or full disk is found now and not at the first
    // failure of an instance.
    tx.execute(
        "DELETE FROM event WHERE id <= (SELECT max(id) FROM event) - ?1",
        [EVENTS_KEPT as i64],
    )?;
    tx.execute(
        "INSERT INTO daemon_start VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET count = count + 1",
        [],
    )?;
    Ok(tx.commit()?)
}

fn rows<T: DeserializeOwned>(
    db: &Connection,
    table: &'static str,
    query: &str,
) -> Result<Vec<T>, JournalError> {
    let mut statement = db.prepare(query)?;
    let texts = statement.query_map([], |row| row.get::<_, String>(0))?;
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

/// SQLite's integers are signed; ids here are counters that start at 1.
fn signed(id: u64) -> i64 {
    i64::try_from(id).unwrap_or(i64::MAX)
}

fn apply_one(tx: &Transaction<'_>, change: &Change) -> Result<(), JournalError> {
    match change {
        Change::Instance(row) => {
            let sql = "INSERT INTO instance VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE
                       SET row = json_set(excluded.row, '$.policy', instance.row -> '$.policy')";
            tx.prepare_cached(sql)?
                .execute(params![row.name, json(row)?])?;
        }
        Change::Policy(name, policy) => {
            let sql = "UPDATE instance SET row = json_set(row, '$.policy', json(?2))
                       WHERE name = ?1";
            tx.prepare_cached(sql)?
                .execute(params![name, json(policy)?])?;
        }
        Change::InstanceGone(name) => {
            tx.execute("DELETE FROM instance WHERE name = ?1", [name])?;
        }
        Change::Generation(row) => {
            let sql = "INSERT OR REPLACE INTO generation VALUES (?1, ?2, ?3)";
            let number = signed(row.generation);
            tx.prepare_cached(sql)?
                .execute(params![row.instance, number, json(row)?])?;
            let sql = "INSERT INTO generation_counter VALUES (?1, ?2)
                       ON CONFLICT (instance) DO UPDATE SET last = max(last, excluded.last)";
            tx.prepare_cached(sql)?
                .execute(params![row.instance, number])?;
        }
        Change::GenerationGone(instance, generation) => {
            let sql = "DELETE FROM generation WHERE instance = ?1 AND generation = ?2";
            tx.execute(sql, params![instance, signed(*generation)])?;
        }
        Change::Recovery(row) => put(tx, "recovery", row.record.id, &json(row)?, RECOVERIES_KEPT)?,
        Change::Morph(row) => put(tx, "morph", row.status.session, &json(row)?, MORPHS_KEPT)?,
        Change::Operation(row) => {
            let id = row
                .id
                .strip_prefix("op-")
                .and_then(|n| n.parse().ok())
                .unwrap_or(0);
            put(tx, "operation", id, &json(row)?, OPERATIONS_KEPT)?;
        }
        Change::Event(row) => put(tx, "event", row.id, &json(row)?, EVENTS_KEPT)?,
        Change::Doctor(row) => put(tx, "doctor", 1, &json(row)?, 1)?,
    }
    Ok(())
}

/// Inserts or replaces a row of a table whose key is a counter, and drops the row that falls out
/// of the number kept.
fn put(
    tx: &Transaction<'_>,
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
    let known = tx
        .prepare_cached(&sql)?
        .query_row([signed(id)], |_| Ok(()))
        .optional()?;
    let sql = format!("INSERT OR REPLACE INTO {table} VALUES (?1, ?2)");
    tx.prepare_cached(&sql)?.execute(params![signed(id), row])?;
    if known.is_none() {
        let sql = format!("DELETE FROM {table} WHERE {key} <= ?1");
        tx.prepare_cached(&sql)?
            .execute([signed(id).saturating_sub(signed(kept))])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_about_to_be_free_is_waited_for_and_another_daemons_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let open = || std::fs::File::create(dir.path().join("lock")).unwrap();
        let mut held = lock_alone(open(), || {});
        let mut pauses = 0;
        assert!(lock_alone(open(), || pauses += 1).is_none());
        assert_eq!(pauses, LOCK_TRIES);
        // What inherited it executes its program in the first pause.
        assert!(lock_alone(open(), || held = None).is_some());
    }
}
