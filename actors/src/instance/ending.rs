//! Terminates an instance.
//!
//! ```text
//! asked ─▶ recorded ─▶ granted ─┬───────────────────────▶ asked to end ─▶ fenced ─▶ gone
//!             │                 └▶ its recovery or, by force, its morph is ended ▲
//!             └▶ refused: nothing has changed
//! ```
//!
//! Invariant: a granted termination is in the journal, so that it happens even if the daemon crashes.

use std::path::{Path, PathBuf};

use crate::model::{EventKind, Failure, FailureKind, OperationKind};
use actix::prelude::*;
use kmp_proto::fence::FenceOrder;
use kmp_proto::instance::{Event, Wish};
use slog::warn;

use super::Instance;
use super::requests::Answered;
use crate::generation::journal_failure;
use crate::generation::release::{RELEASE_PATIENCE, Release};
use crate::model::generation::AnyGeneration;
use crate::model::rows::InstanceRow;
use crate::platform::ambient;
use crate::platform::journal::{Change, JournalError, record};
use crate::platform::operations::Handle;
use crate::services::Services;

impl Instance {
    pub(super) fn termination_written(
        &mut self,
        written: Result<(), JournalError>,
        ctx: &mut Context<Self>,
    ) {
        match written {
            Ok(()) => {
                let operation = self.asked.termination.take().map(Answered::granted);
                if let (Some(operation), Some(job)) = (&operation, &self.job) {
                    operation.step(format!("ending its {}", job.name()));
                }
                self.asked.termination = operation.map(Answered::unasked);
                self.tell(Event::Recorded(Wish::Terminate), ctx);
            }
            Err(error) => {
                self.tell(Event::NotRecorded(Wish::Terminate), ctx);
                if let Some(asked) = self.asked.termination.take() {
                    asked.refused(journal_failure(&error));
                }
            }
        }
    }

    /// Terminates the instance: requests a clean shutdown, fences it, and removes its records.
    pub(super) fn begin_end(&mut self, force: bool, ctx: &mut Context<Self>) {
        let operation = match self.asked.termination.take() {
            Some(asked) => asked.granted(),
            // An earlier daemon was asked.
            None => {
                let operations = self.services.platform.operations.clone();
                match operations.begin(OperationKind::Terminate, &self.row.name, None) {
                    Ok(operation) => operation,
                    Err(refused) => return self.not_ended(refused.message, ctx),
                }
            }
        };
        self.row.drop_reports();
        let services = self.services.clone();
        let ending = self.ending(force, ctx);
        let work = async move {
            let (operation, ended) = end(&services, ending, operation).await;
            match (&ended, operation) {
                // The operation has timed out and has its result.
                (_, None) => {}
                (Ok(()), Some(operation)) => operation.succeed(None),
                (Err(reason), Some(operation)) => {
                    let error = Failure::new(FailureKind::OperatorActionNeeded, reason.clone())
                        .hint("it keeps its resources; when the cause is gone, terminate it again");
                    operation.fail(error, None);
                }
            }
            ended
        };
        ctx.spawn(work.into_actor(self).map(|ended, act, ctx| match ended {
            Ok(()) => {
                act.say(EventKind::InstanceState, "terminated");
                act.tell(Event::Ended, ctx);
            }
            Err(reason) => act.not_ended(reason, ctx),
        }));
    }

    fn not_ended(&mut self, reason: String, ctx: &mut Context<Self>) {
        warn!(self.log, "not terminated"; "generation" => self.generation.generation,
            "reason" => &reason);
        self.tell(Event::NotEnded(reason), ctx);
    }

    /// Returns the parts of the instance to end now.
    pub(super) fn ending(&self, force: bool, ctx: &Context<Self>) -> Ending {
        Ending {
            row: (*self.row).clone(),
            generation: self.generation.clone(),
            left: self.left.clone(),
            force,
            owner: ctx.address().recipient(),
        }
    }
}

/// An instance that is about to be terminated.
pub(super) struct Ending {
    row: InstanceRow,
    generation: AnyGeneration,
    /// See [`Instance`].
    left: Vec<AnyGeneration>,
    /// Skip the clean shutdown.
    force: bool,
    /// Receives reports about a slow release.
    owner: Recipient<Unreturned>,
}

/// The generation of an instance under termination still holds resources.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(super) struct Unreturned(String);

impl Handler<Unreturned> for Instance {
    type Result = ();

    fn handle(&mut self, Unreturned(reason): Unreturned, ctx: &mut Self::Context) {
        self.tell(Event::Unreturned(reason), ctx);
    }
}

/// Stops, fences and forgets an instance, once all of its resources are released. Returns the operation if it has not
/// failed by then.
pub(super) async fn end(
    services: &Services,
    ending: Ending,
    operation: Handle,
) -> (Option<Handle>, Result<(), String>) {
    let Ending {
        row,
        generation,
        left,
        force,
        owner,
    } = ending;
    for generation in left {
        if let Err(reason) = stop(services, generation, true, &operation).await {
            return (Some(operation), Err(reason));
        }
    }
    let (run_dir, mut kept) = match stop(services, generation, force, &operation).await {
        Err(reason) => return (Some(operation), Err(reason)),
        Ok((run_dir, Release::Kept(kept))) => (run_dir, Some(kept)),
        Ok((run_dir, Release::Done)) => (run_dir, None),
    };
    let mut operation = Some(operation);
    if let Some(kept) = &mut kept {
        owner.do_send(Unreturned(kept.waiting()));
        if let Some(operation) = &operation {
            operation.step(kept.waiting());
        }
        let returned = tokio::time::timeout(RELEASE_PATIENCE, kept.returned()).await;
        if returned.is_err()
            && let Some(operation) = operation.take()
        {
            operation.fail(kept.error("it has ended"), None);
        }
        kept.returned().await;
    }
    (operation, forget(services, &row, &run_dir).await)
}

/// Stops, fences and releases a generation. Returns its run directory and the result of the release.
async fn stop(
    services: &Services,
    generation: AnyGeneration,
    force: bool,
    operation: &Handle,
) -> Result<(PathBuf, Release), String> {
    operation.step("stopping");
    if let (false, Some(placement)) = (force, generation.placement()) {
        let grace = services.platform.settings.borrow().stop_timeout;
        let asked = services.backend().request_shutdown(placement).await;
        if asked.is_ok() {
            let ended = services.backend().ended(placement);
            let _ = tokio::time::timeout(grace, ended).await;
        }
    }
    operation.step("fencing");
    let order = FenceOrder::new(generation.generation);
    let run_dir = generation.run_dir.clone();
    let fenced = services.generations.fence(generation, order).await;
    let fenced = fenced.map_err(|not_fenced| not_fenced.reason)?;
    let released = services.generations.release(fenced).await?;
    Ok((run_dir, released))
}

async fn forget(services: &Services, row: &InstanceRow, run_dir: &Path) -> Result<(), String> {
    let gone = Change::InstanceGone(row.name.clone());
    let written = record(&services.platform.journal, vec![gone]).await;
    written.map_err(|e| e.to_string())?;
    services.ports().unpublish(&row.name);
    if let Some(dir) = run_dir.parent() {
        // Remove its logs too: a termination removes everything of the instance.
        let dir = dir.to_owned();
        let _ = ambient::blocking(move || std::fs::remove_dir_all(dir)).await;
    }
    Ok(())
}
