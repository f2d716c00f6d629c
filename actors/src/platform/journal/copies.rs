//! When copies of the journal are made and scrubbed: on a thread of its own, one at a time.

use std::path::PathBuf;

use slog::{Logger, info, warn};

use super::backup;
use crate::platform::ambient::{self, Thread};

/// The copies of a journal that are kept from now on.
pub(super) struct Copies {
    dir: PathBuf,
    log: Logger,
    thread: Option<Thread>,
    /// An instance has ended, and copies may still have its row.
    outdated: bool,
}

impl Copies {
    /// Those of the journal in `dir`.
    pub(super) fn new(dir: PathBuf, log: Logger) -> Self {
        Self {
            dir,
            log,
            thread: None,
            outdated: false,
        }
    }

    /// An instance has ended: its row is to be scrubbed from the copies.
    pub(super) fn outdate(&mut self) {
        self.outdated = true;
    }

    /// Scrubs the copies if an instance has ended. The thread that is under way is not joined by another: the next
    /// look comes.
    pub(super) fn scrub(&mut self) {
        if self.outdated {
            self.look();
        }
    }

    /// Does what is due.
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
