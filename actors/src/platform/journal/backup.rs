//! Backups of the journal, in case it is damaged.
//!
//! The daemon makes a copy before it changes the schema, and daily while it runs. SQLite copies over a separate
//! connection on a separate thread, so that no change waits for the copy. A copy is checked before it receives its
//! name, and only then is the oldest one removed: a damaged journal never replaces a good copy.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kmorph_control_api::paths::JOURNAL_NAME;
use rusqlite::{Connection, OpenFlags};

use crate::platform::ambient;

/// Number of copies to keep.
pub(super) const BACKUPS_KEPT: usize = 7;
/// Age of the newest copy after which the daemon makes another one.
pub(super) const BACKUP_AGE: Duration = Duration::from_secs(24 * 3600);
/// Maximum time that a copy waits for a lock on the journal.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// Name of the copies' directory in the state directory.
const DIRECTORY: &str = "backups";
const PREFIX: &str = "journal-";
const SUFFIX: &str = ".sqlite";

/// Why no copy was made, or why a copy was not restored.
#[derive(Debug, thiserror::Error)]
pub(super) enum BackupError {
    /// A system call failed.
    #[error("{what} {path:?}: {source}")]
    System {
        /// The attempted action.
        what: &'static str,
        /// Its object.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// SQLite failed.
    #[error("{what} {path:?}: {source}")]
    Database {
        /// The attempted action.
        what: &'static str,
        /// Its object.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// The copy itself is damaged.
    #[error("{path:?} is damaged: {reason}")]
    Damaged {
        /// The copy.
        path: PathBuf,
        /// SQLite's finding.
        reason: String,
    },
}

fn system(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::System { what, path, source }
}

fn database(what: &'static str, path: &Path) -> impl FnOnce(rusqlite::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::Database { what, path, source }
}

/// Returns the copies of the journal in `state_dir` with their times, newest first.
fn all(state_dir: &Path) -> Vec<(SystemTime, PathBuf)> {
    let entries = std::fs::read_dir(state_dir.join(DIRECTORY));
    let mut found: Vec<_> = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with(PREFIX) && name.ends_with(SUFFIX)
        })
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    // Sort copies of the same time by their names, which contain their numbers.
    found.sort_by(|a, b| b.cmp(a));
    found
}

/// Returns the newest undamaged copy.
pub(super) fn newest_good(state_dir: &Path) -> Option<PathBuf> {
    let mut copies = all(state_dir).into_iter();
    copies
        .find(|(_, path)| check(path).is_ok())
        .map(|(_, path)| path)
}

/// Whether no copy exists, or the newest one is older than [`BACKUP_AGE`].
#[expect(
    clippy::disallowed_methods,
    reason = "the system gave the copy its time"
)]
pub(super) fn is_due(state_dir: &Path) -> bool {
    let newest = all(state_dir).into_iter().next();
    // A copy from the future does not make a new copy due: the clock was set back.
    newest.is_none_or(|(made, _)| made.elapsed().is_ok_and(|age| age >= BACKUP_AGE))
}

/// Makes a copy of the journal in `state_dir`, checks it, and removes the oldest copies.
///
/// # Errors
/// When the copy cannot be made or is damaged; the other copies then stay.
pub(super) fn make(state_dir: &Path) -> Result<PathBuf, BackupError> {
    let directory = state_dir.join(DIRECTORY);
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory);
    made.map_err(system("making the directory", &directory))?;
    let new = directory.join("new");
    let _ = std::fs::remove_file(&new);
    let written = write(&state_dir.join(JOURNAL_NAME), &new);
    let named = written.and_then(|()| {
        let copy = free_name(&directory);
        std::fs::rename(&new, &copy).map_err(system("naming the copy", &copy))?;
        sync(&directory)?;
        Ok(copy)
    });
    if named.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    let copy = named?;
    for (_, old) in all(state_dir).into_iter().skip(BACKUPS_KEPT) {
        std::fs::remove_file(&old).map_err(system("removing the old copy", &old))?;
    }
    Ok(copy)
}

/// Copies `journal` into the new file `copy`. On return, the copy is complete, checked and on the disk.
fn write(journal: &Path, copy: &Path) -> Result<(), BackupError> {
    // SQLite accepts an existing empty file; a file that SQLite creates would be readable by others.
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(copy)
        .map_err(system("making the copy", copy))?;
    let db = Connection::open_with_flags(journal, OpenFlags::SQLITE_OPEN_READ_WRITE)
        .map_err(database("opening", journal))?;
    db.busy_timeout(BUSY_TIMEOUT)
        .map_err(database("opening", journal))?;
    let name = copy.to_string_lossy();
    db.execute("VACUUM INTO ?1", [&name])
        .map_err(database("copying", journal))?;
    check(copy)?;
    sync(copy)
}

/// Deletes the rows of ended instances from all copies, as far as the journal in `state_dir` knows them: the rows
/// contain the environments of workloads, and passwords in these must not outlive the instance.
///
/// An instance has ended if the journal's generation counter has reached the copy's, and the journal has no instance
/// with that name and creation time. So a journal that was restored from an older copy removes nothing from a newer
/// one.
///
/// # Errors
/// The first failure; the remaining copies are still processed.
pub(super) fn scrub(state_dir: &Path) -> Result<(), BackupError> {
    let journal = state_dir.join(JOURNAL_NAME);
    let mut result = Ok(());
    for (made, copy) in all(state_dir) {
        let scrubbed = scrub_one(&journal, &copy).map_err(database("scrubbing", &copy));
        // The time shows the age of the copy.
        let dated = File::options()
            .append(true)
            .open(&copy)
            .and_then(|file| file.set_modified(made))
            .map_err(system("dating", &copy));
        result = result.and(scrubbed).and(dated);
    }
    result
}

fn scrub_one(journal: &Path, copy: &Path) -> rusqlite::Result<()> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let db = Connection::open_with_flags(copy, flags)?;
    db.busy_timeout(BUSY_TIMEOUT)?;
    db.pragma_update(None, "secure_delete", "ON")?;
    // A rollback journal on disk would keep the old pages there. A copy that a crash damages now is skipped later.
    db.pragma_update(None, "journal_mode", "MEMORY")?;
    db.execute("ATTACH ?1 AS live", [journal.to_string_lossy()])?;
    db.execute(
        "DELETE FROM main.instance
         WHERE NOT EXISTS (SELECT 1 FROM live.instance l WHERE l.name = instance.name
                           AND l.row ->> '$.created_at' = instance.row ->> '$.created_at')
         AND (SELECT last FROM live.generation_counter l WHERE l.instance = instance.name)
             >= (SELECT last FROM main.generation_counter m WHERE m.instance = instance.name)",
        [],
    )?;
    Ok(())
}

/// Returns an unused name: timestamps have a limited resolution, and clocks are set back.
fn free_name(directory: &Path) -> PathBuf {
    let mut number = ambient::calendar().as_millisecond().max(0);
    loop {
        let path = directory.join(format!("{PREFIX}{number:014}{SUFFIX}"));
        if !path.exists() {
            return path;
        }
        number += 1;
    }
}

/// Refuses a damaged database.
fn check(path: &Path) -> Result<(), BackupError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
    let db = Connection::open_with_flags(path, flags).map_err(database("opening", path))?;
    let found = damage(&db).map_err(database("checking", path))?;
    let tables = "SELECT count(*) FROM sqlite_schema WHERE name = 'instance'";
    let tables: i64 = db
        .query_row(tables, [], |row| row.get(0))
        .map_err(database("checking", path))?;
    let foreign = (tables == 0).then(|| "not a journal of kmorph".to_owned());
    match found.or(foreign) {
        None => Ok(()),
        Some(reason) => Err(BackupError::Damaged {
            path: path.to_owned(),
            reason,
        }),
    }
}

/// Returns the damage of a database, as SQLite reports it; `None` for an undamaged one.
pub(super) fn damage(db: &Connection) -> rusqlite::Result<Option<String>> {
    let found: String = db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    Ok((found != "ok").then_some(found))
}

fn sync(path: &Path) -> Result<(), BackupError> {
    let opened = File::open(path).and_then(|file| file.sync_all());
    opened.map_err(system("writing to the disk", path))
}

/// Replaces the journal in `state_dir` with `copy`, and keeps the old journal under another name. Returns that name, or
/// `None` if there was no journal.
///
/// No daemon may run on this directory.
///
/// # Errors
/// When `copy` is damaged, or the system fails; the journal is then unchanged, or exists under the other name.
pub(super) fn restore(state_dir: &Path, copy: &Path) -> Result<Option<PathBuf>, BackupError> {
    check(copy)?;
    let journal = state_dir.join(JOURNAL_NAME);
    let new = state_dir.join("journal.sqlite.new");
    let _ = std::fs::remove_file(&new);
    let copied = (|| {
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        io::copy(&mut File::open(copy)?, &mut file)?;
        file.sync_all()
    })();
    copied.map_err(system("copying into", &new))?;
    let seconds = ambient::calendar().as_second();
    let mut kept = None;
    // The log belongs to the old journal: SQLite would apply it to the copy.
    for part in ["", "-wal", "-shm"] {
        let from = state_dir.join(format!("{JOURNAL_NAME}{part}"));
        let to = state_dir.join(format!("{JOURNAL_NAME}.damaged-{seconds}{part}"));
        match std::fs::rename(&from, &to) {
            Ok(()) if part.is_empty() => kept = Some(to),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(system("moving away", &from)(error)),
        }
    }
    std::fs::rename(&new, &journal).map_err(system("putting back", &journal))?;
    sync(state_dir)?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::journal::store::Store;

    /// Returns a state directory with a journal.
    fn state() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        dir
    }

    #[test]
    fn some_copies_are_kept_and_nobody_else_may_read_them() {
        use std::os::unix::fs::PermissionsExt;
        let dir = state();
        assert!(is_due(dir.path()));
        let made: Vec<_> = (0..BACKUPS_KEPT + 2)
            .map(|_| make(dir.path()).unwrap())
            .collect();
        let left: Vec<_> = all(dir.path()).into_iter().map(|(_, path)| path).collect();
        let newest: Vec<_> = made.iter().rev().take(BACKUPS_KEPT).cloned().collect();
        assert_eq!(left, newest);
        assert!(!is_due(dir.path()));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&left[0]), 0o600);
        assert_eq!(mode(left[0].parent().unwrap()), 0o700);
        #[expect(clippy::disallowed_methods, reason = "the time of a file")]
        let old = SystemTime::now() - BACKUP_AGE;
        for path in &left {
            File::options()
                .append(true)
                .open(path)
                .unwrap()
                .set_modified(old)
                .unwrap();
        }
        assert!(is_due(dir.path()));
    }

    /// Writes an instance with a password and a generation; replaces an earlier instance with this name.
    fn put(journal: &Path, name: &str, created_at: &str, generation: u32) {
        let db = Connection::open(journal).unwrap();
        let row = format!(r#"{{"created_at": "{created_at}", "env": "hunter2"}}"#);
        db.execute("REPLACE INTO instance VALUES (?1, ?2)", [name, &row])
            .unwrap();
        let counter = "REPLACE INTO generation_counter VALUES (?1, ?2)";
        db.execute(counter, rusqlite::params![name, generation])
            .unwrap();
    }

    fn names(path: &Path) -> Vec<String> {
        let db = Connection::open(path).unwrap();
        let mut rows = db
            .prepare("SELECT name FROM instance ORDER BY name")
            .unwrap();
        let names = rows.query_map([], |row| row.get(0)).unwrap();
        names.map(Result::unwrap).collect()
    }

    #[test]
    fn what_has_ended_is_scrubbed_from_the_copies_and_nothing_else() {
        let dir = state();
        let journal = dir.path().join(JOURNAL_NAME);
        let older = make(dir.path()).unwrap();
        for name in ["ended", "again", "lives"] {
            put(&journal, name, "monday", 1);
        }
        let copy = make(dir.path()).unwrap();
        let dated = std::fs::metadata(&copy).unwrap().modified().unwrap();
        let db = Connection::open(&journal).unwrap();
        db.execute("DELETE FROM instance WHERE name = 'ended'", [])
            .unwrap();
        put(&journal, "again", "tuesday", 2);
        scrub(dir.path()).unwrap();
        assert_eq!(names(&copy), ["lives"]);
        assert_eq!(std::fs::metadata(&copy).unwrap().modified().unwrap(), dated);
        check(&copy).unwrap();
        let bytes = std::fs::read(&copy).unwrap();
        let left = bytes.windows(7).filter(|found| found == b"hunter2").count();
        assert_eq!(left, 1, "of the one that lives");

        // The restored journal does not know the instance in the newer copy.
        drop(db);
        restore(dir.path(), &older).unwrap();
        scrub(dir.path()).unwrap();
        assert_eq!(names(&copy), ["lives"]);
    }

    #[test]
    fn a_damaged_journal_replaces_no_copy_and_a_damaged_copy_is_passed_over() {
        let dir = state();
        let good = make(dir.path()).unwrap();
        let newer = make(dir.path()).unwrap();
        assert_eq!(newest_good(dir.path()), Some(newer.clone()));
        std::fs::write(&newer, "no database").unwrap();
        assert_eq!(newest_good(dir.path()), Some(good.clone()));
        std::fs::write(dir.path().join(JOURNAL_NAME), "no database").unwrap();
        make(dir.path()).unwrap_err();
        assert_eq!(all(dir.path()).len(), 2, "and nothing half-made");
        restore(dir.path(), &newer).unwrap_err();
        let kept = restore(dir.path(), &good).unwrap().unwrap();
        assert_eq!(std::fs::read_to_string(kept).unwrap(), "no database");
        drop(Store::open(dir.path()).unwrap());
    }
}
