//! The wanted end of an instance.
//!
//! ```text
//! asked ─▶ recorded ─▶ granted ─┬───────────────────────▶ asked to end ─▶ fenced ─▶ gone
//!             │                 └▶ its recovery or, by force, its morph is ended ▲
//!             └▶ refused: nothing has changed
//! ```
//!
//! Invariant: an end that was granted is in the journal, so that it comes also when the daemon dies.

use std::path::{Path, PathBuf};

use actix::prelude::*;
use kmorph_control_api::{ApiError, ErrorCode, EventKind, InstanceState, OperationKind};
use kmp_proto::fence::FenceOrder;
use slog::warn;

use super::{Ending, Instance, Terminate, Work};
use crate::generation::journal_failure;
use crate::journal::{Change, Desired, GenerationRow, InstanceRow, record};
use crate::morph::Terminated;
use crate::operations::Handle;
use crate::recovery::SuccessorNews;
use crate::release::{RELEASE_PATIENCE, Release};
use crate::services::Services;
use crate::supervisor::InstanceGone;

/// What an operation that a termination ended is told.
pub(super) const TERMINATED: &str = "it was terminated meanwhile";

impl Handler<Terminate> for Instance {
    type Result = ResponseActFuture<Self, Result<(), ApiError>>;

    fn handle(&mut self, request: Terminate, _: &mut Self::Context) -> Self::Result {
        let recovers = matches!(
            self.work,
            Work::Asked(_) | Work::Waiting(_) | Work::Queued(_) | Work::Recovering(_)
        );
        let by_force = request.force && matches!(self.work, Work::Morphing(_));
        let refusal = self.busy("terminated");
        if let Some(error) = refusal.filter(|_| !(recovers || by_force) || self.ending.is_some()) {
            request.operation.fail(error.clone(), None);
            return Box::pin(actix::fut::ready(Err(error)));
        }
        Box::pin(self.record_end(request))
    }
}

impl Instance {
    /// Goes on with a termination that an earlier daemon began: it has been asked already.
    pub(super) fn finish_termination(&mut self, ctx: &mut Context<Self>) {
        let operations = self.services.operations.clone();
        match operations.begin(OperationKind::Terminate, &self.row.name, None) {
            Ok(operation) => self.terminate(true, operation, ctx),
            Err(refused) => {
                warn!(self.log, "not terminated"; "generation" => self.generation.generation,
                    "reason" => &refused.message);
                self.enter(InstanceState::OperatorActionNeeded, Some(refused.message));
            }
        }
    }

    /// Ends it once that is in the journal. It is watched and healed until then.
    fn record_end(
        &mut self,
        request: Terminate,
    ) -> impl ActorFuture<Self, Output = Result<(), ApiError>> + use<> {
        let before = std::mem::replace(&mut self.row.desired, Desired::Terminating);
        // What holds where neither a recovery that was just asked for nor this end can be written.
        let wished = match self.work {
            Work::Asked(wished) => wished,
            _ => before,
        };
        self.ending = Some(Ending::Recorded);
        let (journal, row) = (self.services.journal.clone(), self.row.clone());
        let work = async move { record(&journal, vec![Change::Instance(Box::new(row))]).await };
        work.into_actor(self).map(move |written, act, ctx| {
            act.ending = None;
            let Err(error) = written else {
                act.begin_end(request, ctx);
                return Ok(());
            };
            let at_rest = matches!(act.work, Work::Nothing);
            act.row.desired = if at_rest { wished } else { before };
            let idle = at_rest && act.watch.is_none();
            if idle && wished == Desired::Running {
                // It failed meanwhile, or its recovery ended: looked at again, that comes to light.
                act.begin_watch(ctx);
            }
            let error = journal_failure(&error);
            request.operation.fail(error.clone(), None);
            Err(error)
        })
    }

    fn begin_end(&mut self, request: Terminate, ctx: &mut Context<Self>) {
        match &self.work {
            Work::Recovering(job) => {
                // Its fence is finished first; a successor is not waited for any longer.
                job.do_send(SuccessorNews::Failed(TERMINATED.to_owned()));
                request.operation.step("ending its recovery");
                self.ending = Some(Ending::After(request));
                return;
            }
            Work::Morphing(session) => {
                session.do_send(Terminated);
                request.operation.step("ending its morph");
                self.ending = Some(Ending::After(request));
                return;
            }
            // A recovery that waits has had no effect yet: termination takes its place.
            Work::Waiting(timer) => drop(ctx.cancel_future(*timer)),
            _ => {}
        }
        self.terminate(request.force, request.operation, ctx);
    }

    /// The recovery or morph has written what it did over the wish that was recorded: it is recorded again.
    pub(super) fn end_after_work(&mut self, request: Terminate, ctx: &mut Context<Self>) {
        self.work = Work::Nothing;
        let ended = self.record_end(request).map(|ended, act, _| {
            if let Err(error) = ended {
                act.enter(InstanceState::OperatorActionNeeded, Some(error.message));
            }
        });
        ctx.spawn(ended);
    }

    /// Ends the instance for good: asks it, then fences it, then forgets it.
    fn terminate(&mut self, force: bool, operation: Handle, ctx: &mut Context<Self>) {
        self.work = Work::Terminating;
        if let Some(waiting) = self.operation.take() {
            waiting.fail(ApiError::new(ErrorCode::WrongState, TERMINATED), None);
        }
        self.enter(InstanceState::Terminating, None);
        self.services.aim(&self.row.name, None);
        self.end_watch();
        let (services, generation) = (self.services.clone(), self.generation.clone());
        let (row, own) = (self.row.clone(), ctx.address());
        let work = async move {
            let (operation, ended) = end(&services, &row, generation, force, operation, own).await;
            match (&ended, operation) {
                // It has waited long enough, and was told.
                (_, None) => {}
                (Ok(()), Some(operation)) => operation.succeed(None),
                (Err(reason), Some(operation)) => {
                    let error = ApiError::new(ErrorCode::OperatorActionNeeded, reason.clone())
                        .hint("it keeps its resources; when the cause is gone, terminate it again");
                    operation.fail(error, None);
                }
            }
            ended
        };
        ctx.spawn(work.into_actor(self).map(|ended, act, ctx| match ended {
            Ok(()) => {
                act.say(EventKind::InstanceState, "terminated");
                act.supervisor.do_send(InstanceGone(act.row.name.clone()));
                ctx.stop();
            }
            Err(reason) => {
                warn!(act.log, "not terminated"; "generation" => act.generation.generation,
                    "reason" => &reason);
                act.work = Work::Nothing;
                act.enter(InstanceState::OperatorActionNeeded, Some(reason));
            }
        }));
    }
}

/// The generation of an instance that is being ended holds something still.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(super) struct Unreturned(String);

impl Handler<Unreturned> for Instance {
    type Result = ();

    fn handle(&mut self, Unreturned(reason): Unreturned, _: &mut Self::Context) {
        if matches!(self.work, Work::Terminating) {
            self.enter(InstanceState::Terminating, Some(reason));
        }
    }
}

/// Stops, fences and forgets an instance; `force` does not ask it first. It is forgotten once all that it held is given
/// back, which `owner` is told when it takes a while; the operation is given back where it has not failed by then.
pub(super) async fn end(
    services: &Services,
    row: &InstanceRow,
    generation: GenerationRow,
    force: bool,
    operation: Handle,
    owner: Addr<Instance>,
) -> (Option<Handle>, Result<(), String>) {
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
    (operation, forget(services, row, &run_dir).await)
}

/// Stops, fences and releases a generation; its run directory, and what came of the release.
async fn stop(
    services: &Services,
    mut generation: GenerationRow,
    force: bool,
    operation: &Handle,
) -> Result<(PathBuf, Release), String> {
    operation.step("stopping");
    if let (false, Some(placement)) = (force, &generation.placement) {
        let grace = services.settings.borrow().stop_timeout;
        let asked = services.backend.request_shutdown(placement).await;
        if asked.is_ok() {
            let ended = services.backend.ended(placement);
            let _ = tokio::time::timeout(grace, ended).await;
        }
    }
    operation.step("fencing");
    let order = FenceOrder::new(generation.generation);
    let certificate = services.fence(&mut generation, order).await?;
    let released = services.release(&generation, &certificate).await?;
    Ok((generation.run_dir, released))
}

async fn forget(services: &Services, row: &InstanceRow, run_dir: &Path) -> Result<(), String> {
    let gone = Change::InstanceGone(row.name.clone());
    let written = record(&services.journal, vec![gone]).await;
    written.map_err(|e| e.to_string())?;
    services.unpublish(&row.name);
    if let Some(dir) = run_dir.parent() {
        // Its logs; whoever terminates an instance wants it gone.
        let _ = tokio::fs::remove_dir_all(dir).await;
    }
    Ok(())
}
