//! Releases the resources of fenced generations, and retries until the release succeeds.
//!
//! ```text
//!  [Fenced] ─▶ release ─┬──────────────────────────────▶ gone from the journal
//!                       └▶ kept: tried again, also by the next daemon ▲
//! ```
//!
//! Invariant: a generation that still holds resources has its row in the journal, with its certificate, and its lease
//! in the pool. A request to end it succeeds only when both are gone.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::model::shown::KeptGeneration;
use crate::model::{Command, EventKind, Failure, FailureKind};
use kmorph_backends::contract::Placement;
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use slog::{info, warn};
use tokio::sync::oneshot;

use crate::generation::tidy_up;
use crate::generation::{Generations, NotFenced};
use crate::model::generation::{AnyGeneration, Facts, Fenced, Generation};
use crate::platform::ambient;
use crate::platform::aside;
use crate::platform::events::Draft;
use crate::platform::journal::{Change, record};
use crate::platform::wall_clock;
use crate::resources::pool::Holder;

/// Pause before a failed release is retried.
pub const RELEASE_RETRY: Duration = Duration::from_secs(2);
/// Maximum time that an operation waits for a release; the retries continue after that.
pub const RELEASE_PATIENCE: Duration = Duration::from_secs(30);

/// The result of a release.
#[derive(Debug)]
pub enum Release {
    /// Nothing of the generation is left.
    Done,
    /// The generation still holds resources.
    Kept(Kept),
}

/// A generation that still holds resources.
#[derive(Debug)]
pub struct Kept {
    /// Its generation number.
    pub generation: u64,
    /// Why the release failed.
    pub reason: String,
    /// `None` once it is released.
    returned: Option<oneshot::Receiver<()>>,
}

impl Kept {
    /// Waits for the release; returns at once if it was already seen.
    pub async fn returned(&mut self) {
        if let Some(returned) = &mut self.returned {
            // The sender is dropped together with the entry.
            let _ = returned.await;
        }
        self.returned = None;
    }

    /// Returns the progress message of an operation that waits for the release.
    pub fn waiting(&self) -> String {
        format!("waiting: {}", said(self.generation, &self.reason))
    }

    /// Returns the failure of an operation whose wait has timed out.
    pub fn error(&self, what: &str) -> Failure {
        let text = format!("{what}, but {}", said(self.generation, &self.reason));
        let hint = Command::SeeKept {
            retry_s: RELEASE_RETRY.as_secs(),
        };
        Failure::new(FailureKind::OperatorActionNeeded, text).hint(hint)
    }
}

fn said(generation: u64, reason: &str) -> String {
    format!("generation {generation} keeps its CPUs and memory: {reason}")
}

/// The generations that still hold resources. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Rc<RefCell<BTreeMap<Holder, Entry>>>);

#[derive(Debug)]
struct Entry {
    generation: Generation<Fenced>,
    reason: String,
    since: String,
    tries: u32,
    waiting: Vec<oneshot::Sender<()>>,
}

impl Ledger {
    /// Returns the kept generations of `instance`, or of all instances.
    pub fn shown(&self, instance: Option<&str>) -> Vec<KeptGeneration> {
        let entries = self.0.borrow();
        let wanted = entries
            .values()
            .filter(|entry| instance.is_none_or(|name| name == entry.generation.instance));
        wanted
            .map(|entry| KeptGeneration {
                instance: entry.generation.instance.clone(),
                generation: entry.generation.generation,
                cpus: entry.generation.cpus.clone(),
                memory_bytes: entry.generation.memory_bytes,
                reason: entry.reason.clone(),
                since: entry.since.clone(),
                tries: entry.tries,
            })
            .collect()
    }

    /// Records a failure. Returns true if it is the generation's first one with this reason.
    fn note(&self, row: Generation<Fenced>, reason: &str) -> (bool, Kept) {
        let (tell, returned) = oneshot::channel();
        let mut entries = self.0.borrow_mut();
        let entry = entries.entry(holder(&row)).or_insert_with(|| Entry {
            generation: row.clone(),
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

    fn all(&self) -> Vec<Generation<Fenced>> {
        let entries = self.0.borrow();
        let all = entries.values().map(|entry| entry.generation.clone());
        all.collect()
    }
}

fn holder(row: &Facts) -> Holder {
    (row.instance.clone(), row.generation)
}

impl Generations {
    /// Releases all resources of a fenced generation. If that fails, the generation is recorded, and
    /// [`Generations::release_kept`] retries.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn release(&self, row: Generation<Fenced>) -> Result<Release, String> {
        if let Some(placement) = row.placement().cloned()
            && let Err(reason) = self
                .release_placement(placement, row.certificate().clone())
                .await
        {
            return Ok(Release::Kept(self.keep(row, &reason)));
        }
        let (run_dir, started) = (row.run_dir.clone(), row.placement().is_some());
        self.tidy(&row, &run_dir, started).await;
        self.forget(&row);
        let gone = Change::GenerationGone(row.instance.clone(), row.generation);
        record(&self.platform.journal, vec![gone])
            .await
            .map_err(|e| e.to_string())?;
        // The callers that wait are notified now.
        let entry = self.kept.0.borrow_mut().remove(&holder(&row));
        if let Some(entry) = entry {
            let text = format!(
                "generation {} has given its CPUs and memory back",
                row.generation
            );
            info!(self.platform.log, "{}", &text; "instance" => &row.instance, "tries" => entry.tries);
            self.platform.events.publish(Draft::of(
                EventKind::Resources,
                &row.instance,
                row.generation,
                text,
            ));
        }
        Ok(Release::Done)
    }

    /// Records that a fenced generation still holds resources.
    pub fn keep(&self, row: Generation<Fenced>, reason: &str) -> Kept {
        let (instance, generation) = holder(&row);
        let (is_new, kept) = self.kept.note(row, reason);
        if is_new {
            let text = said(generation, reason);
            warn!(self.platform.log, "{}", &text; "instance" => &instance);
            let draft = Draft::of(EventKind::Resources, &instance, generation, text);
            self.platform.events.publish(draft);
        }
        kept
    }

    /// Ends a generation that belongs to no instance: fences and releases it. Waits for the first attempt only. A
    /// failed attempt is repeated every [`RELEASE_RETRY`] until one succeeds: no instance would do so, and until then
    /// the generation's resources are unusable.
    pub(crate) async fn end_unowned(&self, generation: AnyGeneration) {
        let Err(not_fenced) = self.fence_and_release(generation).await else {
            return;
        };
        let NotFenced {
            mut generation,
            reason,
        } = not_fenced;
        warn!(self.platform.log, "a leftover generation keeps its resources; its end is tried again";
            "instance" => &generation.instance, "generation" => generation.generation, "reason" => reason);
        let generations = self.clone();
        actix::spawn(async move {
            loop {
                tokio::time::sleep(RELEASE_RETRY).await;
                match generations.fence_and_release(generation).await {
                    Ok(()) => return,
                    Err(not_fenced) => generation = not_fenced.generation,
                }
            }
        });
    }

    async fn fence_and_release(&self, generation: AnyGeneration) -> Result<(), NotFenced> {
        let order = FenceOrder::new(generation.generation);
        let fenced = self.fence(generation, order).await?;
        let (instance, number) = holder(&fenced);
        // The ledger reports a kept generation and retries its release.
        match self.release(fenced.clone()).await {
            Ok(Release::Kept(_)) => Ok(()),
            Ok(Release::Done) => {
                info!(self.platform.log, "a leftover generation was fenced"; "instance" => instance,
                    "generation" => number);
                Ok(())
            }
            Err(reason) => Err(NotFenced {
                generation: fenced.into(),
                reason,
            }),
        }
    }

    /// Retries the release of all kept generations, one after the other.
    pub async fn release_kept(&self) {
        for fenced in self.kept.all() {
            let (instance, generation) = holder(&fenced);
            if let Err(error) = self.release(fenced).await {
                warn!(self.platform.log, "a release was not recorded"; "instance" => instance,
                    "generation" => generation, "error" => error);
            }
        }
    }

    async fn tidy(&self, row: &Facts, run_dir: &Path, started: bool) {
        let run_dir = run_dir.to_owned();
        let tidy = ambient::blocking(move || tidy_up(&run_dir, started));
        if let Ok(Err(error)) = tidy.await {
            warn!(self.platform.log, "logs of earlier generations stay"; "instance" => &row.instance,
                "generation" => row.generation, "error" => %error);
        }
    }

    async fn release_placement(
        &self,
        placement: Placement,
        proof: FenceCertificate,
    ) -> Result<(), String> {
        let backend = Arc::clone(&self.machine.backend);
        let work = async move { backend.release(&placement, &proof).await };
        let released = aside::run(work).await.map_err(|e| e.to_string())?;
        released.map_err(|e| e.to_string())
    }
}
