//! Errors of opening, reading and writing the journal, with the next step.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use super::store::SCHEMA_VERSION;
use crate::platform::wall_clock;

/// Why the journal could not be opened, read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Another daemon holds the lock.
    #[error(
        "another kmorphd uses the state directory {dir:?} (its lock file is held); stop it, or \
         give this one a state directory of its own"
    )]
    InUse {
        /// The state directory.
        dir: PathBuf,
    },
    /// The directory or file is unusable.
    #[error(
        "the journal {path:?} cannot be opened: {reason}; the state directory must be writable"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's or SQLite's reason.
        reason: String,
    },
    /// Another user could read or change the contents of the state directory.
    #[error("the state directory is not used: {0}")]
    Unsafe(String),
    /// A newer kmorphd wrote the file.
    #[error("the journal has schema version {found}, this kmorphd knows up to {SCHEMA_VERSION}")]
    NewerSchema {
        /// The version found.
        found: i64,
    },
    /// The file is damaged.
    #[error("the journal {path:?} is damaged: {reason}; {}", what_to_do(path, backup.as_deref()))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damage.
        reason: String,
        /// The newest undamaged copy.
        backup: Option<PathBuf>,
    },
    /// The copy that precedes a change of the schema cannot be made.
    #[error(
        "the journal is not changed to schema {SCHEMA_VERSION} without a copy of it, which cannot be made: {reason}"
    )]
    NoBackup {
        /// The reason.
        reason: String,
    },
    /// A copy was not restored.
    #[error("the journal is not replaced: {reason}")]
    NotRestored {
        /// The reason.
        reason: String,
    },
    /// The disk is full.
    #[error("the journal cannot be written, the disk is full ({reason}); free some space")]
    DiskFull {
        /// SQLite's reason.
        reason: String,
    },
    /// SQLite has found the file damaged. The caller that opened the file knows its path and the next step.
    #[error("the journal is damaged: {reason}; the next start of kmorphd says what to do")]
    Broken {
        /// SQLite's reason.
        reason: String,
    },
    /// Another read or write error.
    #[error("the journal cannot be read or written: {reason}")]
    Io {
        /// SQLite's reason.
        reason: String,
    },
    /// A row does not parse: another program has changed the file.
    #[error("the journal's table {table} has a row that does not parse: {reason}")]
    Corrupt {
        /// The table.
        table: &'static str,
        /// The reason.
        reason: String,
    },
    /// The journal's thread has ended.
    #[error("the journal's actor is gone")]
    Gone,
}

/// Returns the next step for a damaged journal.
fn what_to_do(path: &Path, backup: Option<&Path>) -> String {
    let directory = path.parent().unwrap_or(Path::new("/")).display();
    match backup {
        Some(backup) => format!(
            "`kmorphd --state-dir={directory} --restore-journal={}` puts back the newest good copy, made {}; \
             docs/operations.md says what to look at then",
            backup.display(),
            made_at(backup)
        ),
        None => format!(
            "there is no good copy of it in {directory}/backups: move it away to begin anew, and end by hand what still \
             runs"
        ),
    }
}

fn made_at(file: &Path) -> String {
    let made = std::fs::metadata(file).and_then(|meta| meta.modified());
    made.map_or_else(|_| "at an unknown time".to_owned(), wall_clock::rfc3339)
}

impl From<rusqlite::Error> for JournalError {
    fn from(error: rusqlite::Error) -> Self {
        let reason = error.to_string();
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::DiskFull { reason },
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Broken { reason },
            _ => Self::Io { reason },
        }
    }
}
