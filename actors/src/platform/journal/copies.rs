//! Schedules copies of the journal and their scrubbing: on a separate thread, one at a time.

use std::path::PathBuf;

use slog::{Logger, info, warn};

use super::backup;
use crate::platform::ambient::{self, Thread};

/// The backups of one journal.
pub(super) struct Copies {
    dir: PathBuf,
    log: Logger,
    thread: Option<Thread>,
    /// An instance has ended, and copies may still contain its row.
    outdated: bool,
}

impl Copies {
    /// Backups of the journal in `dir`.
    pub(super) fn new(dir: PathBuf, log: Logger) -> Self {
        Self {
            dir,
            log,
            thread: None,
            outdated: false,
        }
    }

    /// Records that an instance has ended: its row must be removed from the copies.
    pub(super) fn outdate(&mut self) {
        self.outdated = true;
    }

    /// Scrubs the copies if an instance has ended. Does not start a second thread next to one that runs: the next
    /// check starts it.
    pub(super) fn scrub(&mut self) {
        if self.outdated {
            self.look();
        }
    }

    /// Starts the work that is due.
    pub(super) fn look(&mut self) {
        let under_way = self
            .thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished());
        let due = backup::is_due(&self.dir);
        if under_way || !(due || self.outdated) {
            return;
        }
        let outdated = std::mem::take(&mut self.outdated);
        let (dir, log) = (self.dir.clone(), self.log.clone());
        let begun = ambient::thread("journal-backup", None, move || {
            if due {
                match backup::make(&dir) {
                    Ok(path) => info!(log, "journal copied"; "path" => %path.display()),
                    Err(error) => warn!(log, "the journal was not copied; the next try follows";
                        "error" => %error),
                }
            }
            if outdated && let Err(error) = backup::scrub(&dir) {
                warn!(log, "a copy of the journal may keep environments of instances that have ended; the daemon's \
                    next start tries again"; "error" => %error);
            }
        });
        match begun {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => {
                self.outdated = outdated;
                warn!(self.log, "no thread to copy the journal; the next try follows"; "error" => %error);
            }
        }
    }
}
