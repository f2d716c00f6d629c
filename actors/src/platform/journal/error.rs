//! Why the journal cannot be opened, read or written, and what to do then.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use super::store::SCHEMA_VERSION;
use crate::platform::wall_clock;

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
    /// Somebody else could read or change what is in the state directory.
    #[error("the state directory is not used: {0}")]
    Unsafe(String),
    /// Written by a newer kmorphd.
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
        /// What is wrong with it.
        reason: String,
        /// The newest good copy.
        backup: Option<PathBuf>,
    },
    /// The copy that is to be made before the schema is changed cannot be made.
    #[error(
        "the journal is not changed to schema {SCHEMA_VERSION} without a copy of it, which cannot be made: {reason}"
    )]
    NoBackup {
        /// Why.
        reason: String,
    },
    /// A copy was not put back.
    #[error("the journal is not replaced: {reason}")]
    NotRestored {
        /// Why.
        reason: String,
    },
    /// The disk is full.
    #[error("the journal cannot be written, the disk is full ({reason}); free some space")]
    DiskFull {
        /// SQLite's reason.
        reason: String,
    },
    /// SQLite has found the file damaged; which file, and what to do, is known to who opened it.
    #[error("the journal is damaged: {reason}; the next start of kmorphd says what to do")]
    Broken {
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

/// How to go on with a damaged journal.
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
