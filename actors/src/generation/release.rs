//! Giving back what fenced generations held, until it is given back.
//!
//! ```text
//!  [Fenced] ─▶ release ─┬──────────────────────────────▶ gone from the journal
//!                       └▶ kept: tried again, also by the next daemon ▲
//! ```
//!
//! Invariant: a generation that still holds something has its row in the journal, with its certificate, and its lease
//! in the pool. Who asked for its end hears of success only when both are gone.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kmorph_backends::contract::Placement;
use kmorph_control_api::{ApiError, ErrorCode, EventKind, KeptGeneration};
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use slog::{info, warn};
use tokio::sync::oneshot;

use crate::generation::tidy_up;
use crate::model::rows::GenerationRow;
use crate::platform::ambient;
use crate::platform::aside;
use crate::platform::events::Draft;
use crate::platform::journal::{Change, record};
use crate::platform::wall_clock;
use crate::resources::pool::Holder;
use crate::services::Services;

/// Pause before what was not given back is tried again.
pub const RELEASE_RETRY: Duration = Duration::from_secs(2);
/// Longest time that an operation waits for what was not given back; it is tried again after that too.
pub const RELEASE_PATIENCE: Duration = Duration::from_secs(30);

/// What came of a release.
#[derive(Debug)]
pub enum Release {
    /// Nothing of the generation is left.
    Done,
    /// It holds something still.
    Kept(Kept),
}

/// A generation that holds something still.
#[derive(Debug)]
pub struct Kept {
    /// Its number.
    pub generation: u64,
    /// Why it could not be given back.
    pub reason: String,
    /// `None` once it was given back.
    returned: Option<oneshot::Receiver<()>>,
}

impl Kept {
    /// Completes when it is given back; at once, where that was seen already.
    pub async fn returned(&mut self) {
        if let Some(returned) = &mut self.returned {
            // The other end goes with the entry.
            let _ = returned.await;
        }
        self.returned = None;
    }

    /// What an operation says that waits for it.
    pub fn waiting(&self) -> String {
        format!("waiting: {}", said(self.generation, &self.reason))
    }

    /// What an operation ends with that has waited long enough.
    pub fn error(&self, what: &str) -> ApiError {
        let text = format!("{what}, but {}", said(self.generation, &self.reason));
        let hint = format!(
            "it is tried again every {} s, also after a restart; `kmorphctl daemon status` shows whether it still has \
             them",
            RELEASE_RETRY.as_secs()
        );
        ApiError::new(ErrorCode::OperatorActionNeeded, text).hint(hint)
    }
}

fn said(generation: u64, reason: &str) -> String {
    format!("generation {generation} keeps its CPUs and memory: {reason}")
}

/// The generations that hold something still. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Rc<RefCell<BTreeMap<Holder, Entry>>>);

#[derive(Debug)]
struct Entry {
    row: GenerationRow,
    proof: FenceCertificate,
    reason: String,
    since: String,
    tries: u32,
    waiting: Vec<oneshot::Sender<()>>,
}

impl Ledger {
    /// What those of `instance`, or all, hold.
    pub fn shown(&self, instance: Option<&str>) -> Vec<KeptGeneration> {
        let entries = self.0.borrow();
        let wanted = entries
            .values()
            .filter(|entry| instance.is_none_or(|name| name == entry.row.instance));
        wanted
            .map(|entry| KeptGeneration {
                instance: entry.row.instance.clone(),
                generation: entry.row.generation,
                cpus: entry.row.cpus.clone(),
                memory_bytes: entry.row.memory_bytes,
                reason: entry.reason.clone(),
                since: entry.since.clone(),
                tries: entry.tries,
            })
            .collect()
    }

    /// Notes a failure; whether it is the first of this generation with this reason.
    fn note(&self, row: &GenerationRow, proof: &FenceCertificate, reason: &str) -> (bool, Kept) {
        let (tell, returned) = oneshot::channel();
        let mut entries = self.0.borrow_mut();
        let entry = entries.entry(holder(row)).or_insert_with(|| Entry {
            row: row.clone(),
            proof: proof.clone(),
            reason: String::new(),
            since: wall_clock::now_rfc3339(),
            tries: 0,
            waiting: Vec::new(),
        });
        entry.tries = entry.tries.saturating_add(1);
        let is_new = entry.tries == 1;
        reason.clone_into(&mut entry.reason);
        entry.waiting.retain(|waiting| !waiting.is_closed());
        entry.waiting.push(tell);
        let kept = Kept {
            generation: row.generation,
            reason: reason.to_owned(),
            returned: Some(returned),
        };
        (is_new, kept)
    }

    fn all(&self) -> Vec<(GenerationRow, FenceCertificate)> {
        let entries = self.0.borrow();
        let all = entries.values();
        all.map(|entry| (entry.row.clone(), entry.proof.clone()))
            .collect()
    }
}

fn holder(row: &GenerationRow) -> Holder {
    (row.instance.clone(), row.generation)
}

impl Services {
    /// Gives back everything a fenced generation held. What cannot be given back now is noted, and tried again by
    /// [`Services::release_kept`].
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn release(
        &self,
        row: &GenerationRow,
        proof: &FenceCertificate,
    ) -> Result<Release, String> {
        if let Some(placement) = row.placement.clone()
            && let Err(reason) = self.release_placement(placement, proof.clone()).await
        {
            return Ok(Release::Kept(self.keep(row, proof, &reason)));
        }
        let (run_dir, started) = (row.run_dir.clone(), row.placement.is_some());
        self.tidy(row, &run_dir, started).await;
        self.forget(row);
        let gone = Change::GenerationGone(row.instance.clone(), row.generation);
        record(&self.journal, vec![gone])
            .await
            .map_err(|e| e.to_string())?;
        // Who waits for it hears of it now.
        let entry = self.kept.0.borrow_mut().remove(&holder(row));
        if let Some(entry) = entry {
            let text = format!(
                "generation {} has given its CPUs and memory back",
                row.generation
            );
            info!(self.log, "{}", &text; "instance" => &row.instance, "tries" => entry.tries);
            self.events.publish(Draft::of(
                EventKind::Resources,
                &row.instance,
                row.generation,
                text,
            ));
        }
        Ok(Release::Done)
    }

    /// Notes that a fenced generation holds something, which is to be given back.
    pub fn keep(&self, row: &GenerationRow, proof: &FenceCertificate, reason: &str) -> Kept {
        let (is_new, kept) = self.kept.note(row, proof, reason);
        if is_new {
            let text = said(row.generation, reason);
            warn!(self.log, "{}", &text; "instance" => &row.instance);
            self.events.publish(Draft::of(
                EventKind::Resources,
                &row.instance,
                row.generation,
                text,
            ));
        }
        kept
    }

    /// Ends a generation that belongs to no instance: fences and releases it. Waits for the first try only. A failed try
    /// is repeated every [`RELEASE_RETRY`] until one succeeds: no instance would do it, and until then nobody can use what
    /// the generation holds.
    pub(crate) async fn end_unowned(&self, mut row: GenerationRow) {
        let Err(reason) = self.fence_and_release(&mut row).await else {
            return;
        };
        warn!(self.log, "a leftover generation keeps its resources; its end is tried again";
            "instance" => &row.instance, "generation" => row.generation, "reason" => reason);
        let services = self.clone();
        actix::spawn(async move {
            loop {
                tokio::time::sleep(RELEASE_RETRY).await;
                if services.fence_and_release(&mut row).await.is_ok() {
                    return;
                }
            }
        });
    }

    async fn fence_and_release(&self, row: &mut GenerationRow) -> Result<(), String> {
        let order = FenceOrder::new(row.generation);
        let certificate = self.fence(row, order).await?;
        // What is kept is told, and tried again, by whoever keeps it.
        if let Release::Done = self.release(row, &certificate).await? {
            info!(self.log, "a leftover generation was fenced"; "instance" => &row.instance,
                "generation" => row.generation);
        }
        Ok(())
    }

    /// Tries once more to give back what was not, one generation after the other.
    pub async fn release_kept(&self) {
        for (row, proof) in self.kept.all() {
            if let Err(error) = self.release(&row, &proof).await {
                warn!(self.log, "a release was not recorded"; "instance" => &row.instance,
                    "generation" => row.generation, "error" => error);
            }
        }
    }

    async fn tidy(&self, row: &GenerationRow, run_dir: &Path, started: bool) {
        let run_dir = run_dir.to_owned();
        let tidy = ambient::blocking(move || tidy_up(&run_dir, started));
        if let Ok(Err(error)) = tidy.await {
            warn!(self.log, "logs of earlier generations stay"; "instance" => &row.instance,
                "generation" => row.generation, "error" => %error);
        }
    }

    async fn release_placement(
        &self,
        placement: Placement,
        proof: FenceCertificate,
    ) -> Result<(), String> {
        let backend = Arc::clone(&self.backend);
        let work = async move { backend.release(&placement, &proof).await };
        let released = aside::run(work).await.map_err(|e| e.to_string())?;
        released.map_err(|e| e.to_string())
    }
}
