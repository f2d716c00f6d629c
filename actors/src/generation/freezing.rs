//! A generation that stands still while its memory is read.
//!
//! ```text
//! runs ─▶ [frozen] in the journal ─▶ frozen ─▶ … ─▶ resumed ─▶ [not frozen] in the journal
//! ```
//!
//! Invariant: what was frozen here is resumed here, or by the next daemon, which finds it in the journal.

use kmp_proto::time::Instant;
use slog::{info, warn};

use crate::generation::Generations;
use crate::model::generation::AnyGeneration;
use crate::platform::clock;
use crate::platform::journal::{Change, record};

/// Why a generation was not frozen; it runs on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotFrozen {
    /// It could not be written down first.
    #[error("{0}")]
    Journal(String),
    /// The backend did not do it.
    #[error("{0}")]
    Backend(String),
}

impl Generations {
    /// Has a generation execute nothing, unless that is so already; since when.
    ///
    /// # Errors
    /// When it cannot be written down or done. It runs on then.
    pub(crate) async fn freeze(
        &self,
        row: &mut AnyGeneration,
    ) -> Result<Option<Instant>, NotFrozen> {
        let AnyGeneration::Placed(placed) = &*row else {
            // Fenced, or never started.
            return Ok(None);
        };
        let placement = placed.placement().clone();
        row.frozen = true;
        if let Err(error) = self.note_frozen(row).await {
            row.frozen = false;
            return Err(NotFrozen::Journal(error));
        }
        let since = clock::now();
        match self.machine.backend.freeze(&placement).await {
            Ok(true) => Ok(Some(since)),
            Ok(false) => {
                row.frozen = false;
                self.forget_frozen(row).await;
                Ok(None)
            }
            Err(error) => {
                // It may have been frozen all the same.
                let _ = self.thaw(row).await;
                Err(NotFrozen::Backend(error.to_string()))
            }
        }
    }

    /// Has a frozen generation go on. What cannot be resumed stays marked, so that the next daemon tries again.
    ///
    /// # Errors
    /// When it was not resumed.
    pub(crate) async fn thaw(&self, row: &mut AnyGeneration) -> Result<(), String> {
        let Some(placement) = row.placement().cloned() else {
            return Ok(());
        };
        if let Err(error) = self.machine.backend.resume(&placement).await {
            let reason = error.to_string();
            warn!(self.platform.log, "frozen for a capture, and not resumed"; "instance" => &row.instance,
                "generation" => row.generation, "reason" => &reason);
            return Err(reason);
        }
        row.frozen = false;
        info!(self.platform.log, "resumed"; "instance" => &row.instance, "generation" => row.generation);
        self.forget_frozen(row).await;
        Ok(())
    }

    async fn note_frozen(&self, row: &AnyGeneration) -> Result<(), String> {
        let change = Change::Generation(Box::new(row.into()));
        let written = record(&self.platform.journal, vec![change]).await;
        written.map_err(|error| error.to_string())
    }

    /// A mark that stays is harmless: resuming what runs changes nothing.
    async fn forget_frozen(&self, row: &AnyGeneration) {
        if let Err(error) = self.note_frozen(row).await {
            warn!(self.platform.log, "that it is resumed was not recorded"; "instance" => &row.instance,
                "generation" => row.generation, "error" => error);
        }
    }
}
