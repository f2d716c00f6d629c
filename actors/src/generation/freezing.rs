//! Freezes a generation while its memory is read.
//!
//! ```text
//! runs ─▶ [frozen] in the journal ─▶ frozen ─▶ … ─▶ resumed ─▶ [not frozen] in the journal
//! ```
//!
//! Invariant: this daemon resumes a frozen generation, or the next daemon does, which finds the mark in the journal.

use kmp_proto::time::Instant;
use slog::{info, warn};

use crate::generation::Generations;
use crate::model::generation::AnyGeneration;
use crate::platform::clock;
use crate::platform::journal::{Change, record};

/// Why a generation was not frozen; it continues to run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotFrozen {
    /// The mark could not be written to the journal.
    #[error("{0}")]
    Journal(String),
    /// The backend failed.
    #[error("{0}")]
    Backend(String),
}

impl Generations {
    /// Freezes a generation, unless it executes nothing anyway. Returns the time of the freeze.
    ///
    /// # Errors
    /// When the mark cannot be written, or the backend fails. The generation continues to run.
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
                // The backend may have frozen it in spite of the error.
                let _ = self.thaw(row).await;
                Err(NotFrozen::Backend(error.to_string()))
            }
        }
    }

    /// Resumes a frozen generation. If that fails, the mark stays, so that the next daemon retries.
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

    /// Removes the mark of a resumed generation. If that fails, the mark is harmless: to resume a running generation
    /// changes nothing.
    async fn forget_frozen(&self, row: &AnyGeneration) {
        if let Err(error) = self.note_frozen(row).await {
            warn!(self.platform.log, "that it is resumed was not recorded"; "instance" => &row.instance,
                "generation" => row.generation, "error" => error);
        }
    }
}
