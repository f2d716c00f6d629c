//! A generation that stands still while its memory is read.
//!
//! ```text
//! runs ─▶ [frozen] in the journal ─▶ frozen ─▶ … ─▶ resumed ─▶ [not frozen] in the journal
//! ```
//!
//! Invariant: what was frozen here is resumed here, or by the next daemon, which finds it in the journal.

use slog::{info, warn};

use super::CaptureError;
use crate::model::rows::GenerationRow;
use crate::platform::clock;
use crate::platform::journal::{Change, record};
use crate::services::Services;

impl Services {
    /// Has a generation execute nothing, unless that is so already; since when.
    ///
    /// # Errors
    /// When it cannot be written down or done. It runs on then.
    pub(super) async fn freeze(
        &self,
        row: &mut GenerationRow,
    ) -> Result<Option<kmp_proto::time::Instant>, CaptureError> {
        let Some(placement) = row.placement.clone().filter(|_| row.certificate.is_none()) else {
            // Fenced, or never started.
            return Ok(None);
        };
        row.frozen = true;
        if let Err(error) = self.note_frozen(row).await {
            row.frozen = false;
            return Err(CaptureError::Journal(error));
        }
        let since = clock::now();
        match self.backend.freeze(&placement).await {
            Ok(true) => Ok(Some(since)),
            Ok(false) => {
                row.frozen = false;
                self.forget_frozen(row).await;
                Ok(None)
            }
            Err(error) => {
                // It may have been frozen all the same.
                let _ = self.thaw(row).await;
                Err(CaptureError::Freeze(error.to_string()))
            }
        }
    }

    /// Has a frozen generation go on. What cannot be resumed stays marked, so that the next daemon tries again.
    ///
    /// # Errors
    /// When it was not resumed.
    pub(crate) async fn thaw(&self, row: &mut GenerationRow) -> Result<(), String> {
        let Some(placement) = row.placement.clone() else {
            return Ok(());
        };
        if let Err(error) = self.backend.resume(&placement).await {
            let reason = error.to_string();
            warn!(self.log, "frozen for a capture, and not resumed"; "instance" => &row.instance,
                "generation" => row.generation, "reason" => &reason);
            return Err(reason);
        }
        row.frozen = false;
        info!(self.log, "resumed"; "instance" => &row.instance, "generation" => row.generation);
        self.forget_frozen(row).await;
        Ok(())
    }

    async fn note_frozen(&self, row: &GenerationRow) -> Result<(), String> {
        let change = Change::Generation(Box::new(row.clone()));
        let written = record(&self.journal, vec![change]).await;
        written.map_err(|error| error.to_string())
    }

    /// A mark that stays is harmless: resuming what runs changes nothing.
    async fn forget_frozen(&self, row: &GenerationRow) {
        if let Err(error) = self.note_frozen(row).await {
            warn!(self.log, "that it is resumed was not recorded"; "instance" => &row.instance,
                "generation" => row.generation, "error" => error);
        }
    }
}
