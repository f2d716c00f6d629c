//! The kernel's status of a generation and its meaning.
//!
//! ```text
//!  active ───────────────────────────▶ runs or hangs: the file does not distinguish them
//!  loaded, after a halt request ─▶ it has ended
//!  loaded, no request ───────────────────▶ its kernel panicked
//! ```
//!
//! The kernel does not notify anyone of changes, so the backend polls. A panicked kernel shows as `loaded`, like one
//! that has powered off: the backend distinguishes them by whether a halt was requested. A kernel that powers itself
//! off without a request counts as panicked; the agent, which is its init, never does that.

use std::path::Path;
use std::time::Duration;

use kmorph_files::{OwnDir, PRIVATE_DIR};
use libkerf::overlay::Status;

use super::slots::{Holds, SlotError, Slots};
use crate::contract::{ExitCause, Observation, Placement};

/// Interval between checks whether a generation has ended.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Name of a file in the run directory: a halt was requested.
const ASKED: &str = "asked-to-halt";

/// Records that a generation was asked to halt, for this daemon and the next.
pub(super) fn note_asked(run_dir: &Path) -> std::io::Result<()> {
    OwnDir::make(run_dir, PRIVATE_DIR)?.write(ASKED, b"")?;
    Ok(())
}

impl Slots {
    /// Observes a generation now.
    pub(super) fn observe(&self, placement: &Placement) -> Result<Observation, SlotError> {
        let asked = || placement.run_dir.join(ASKED).exists();
        let ended = |cause| Ok(Observation::Ended(cause));
        match self.seems_to_hold(placement)? {
            Holds::This(mark, Status::Active) if !mark.fenced => Ok(Observation::Running),
            Holds::This(mark, Status::Loaded) if !mark.fenced && !asked() => {
                ended(ExitCause::KernelPanicked)
            }
            Holds::This(..) | Holds::Gone | Holds::Another | Holds::Foreign(_) => {
                ended(ExitCause::Exited { status: None })
            }
        }
    }
}
