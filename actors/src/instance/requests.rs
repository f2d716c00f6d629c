//! What may be asked of an instance.

use std::time::Duration;

use actix::prelude::*;
use kmorph_control_api::{
    ApiError, ErrorCode, HealthReport, HeartbeatStatus, InstanceStatus, InstanceSummary,
    MorphStatus, PingReport,
};
use kmp_proto::instance::{Doing, Event, Request};
use kmp_proto::message::TopologyEntry;
use kmp_proto::morph::CommitLimit;
use tokio::sync::oneshot;

use super::{Instance, Job};
use crate::model::rows::GenerationRow;
use crate::morph::{GetMorph, MorphPlan};
use crate::platform::operations::Handle;
use crate::watch::Ping;

/// Longest wait for the answer to a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// One line of the list.
#[derive(Debug, Message)]
#[rtype(result = "InstanceSummary")]
pub struct GetSummary;

/// Everything.
#[derive(Debug, Message)]
#[rtype(result = "InstanceStatus")]
pub struct GetStatus;

/// Its heartbeats.
#[derive(Debug, Message)]
#[rtype(result = "HeartbeatStatus")]
pub struct GetHeartbeat;

/// Its health.
#[derive(Debug, Message)]
#[rtype(result = "HealthReport")]
pub struct GetHealth;

/// One heartbeat now.
#[derive(Debug, Message)]
#[rtype(result = "Result<PingReport, ApiError>")]
pub struct PingInstance;

/// End it.
#[derive(Message)]
#[rtype(result = "Result<(), ApiError>")]
pub struct Terminate {
    /// Without asking it first.
    pub force: bool,
    /// Who waits.
    pub operation: Handle,
}

/// Heal it now, whatever its state.
#[derive(Message)]
#[rtype(result = "Result<(), ApiError>")]
pub struct Recover(pub Handle);

/// Begin a morph.
#[derive(Message)]
#[rtype(result = "Result<(), ApiError>")]
pub struct Morph {
    /// The plan, made from [`PlanMorph`].
    pub plan: Box<MorphPlan>,
    /// Who waits.
    pub operation: Handle,
}

/// Go on with, or back from, a morph under way.
#[derive(Message)]
#[rtype(result = "Result<(), ApiError>")]
pub struct MorphControl {
    /// What.
    pub kind: CommandKind,
    /// Who waits.
    pub operation: Handle,
}

/// See [`MorphControl`].
#[derive(Clone, Copy, Debug)]
pub enum CommandKind {
    /// Validate.
    Validate,
    /// Commit.
    Commit {
        /// The downtime at which it is still wanted.
        limit: CommitLimit,
    },
    /// Roll back.
    Rollback,
}

/// Its part of what survivors are told of all instances.
#[derive(Debug, Message)]
#[rtype(result = "Option<TopologyEntry>")]
pub struct GetTopologyEntry;

/// Its generation, if that serves and is not in the middle of something.
#[derive(Debug, Message)]
#[rtype(result = "Option<Box<GenerationRow>>")]
pub struct GetSurvivor;

/// The morph under way.
#[derive(Debug, Message)]
#[rtype(result = "Result<MorphStatus, ApiError>")]
pub struct GetMorphStatus;

/// What a new morph starts from; refused when the instance cannot be morphed now.
#[derive(Debug, Message)]
#[rtype(
    result = "Result<(crate::model::rows::InstanceRow, crate::model::rows::GenerationRow), ApiError>"
)]
pub struct PlanMorph;

/// An operation, and whoever waits for the answer whether it was granted.
pub(super) struct Answered {
    operation: Handle,
    answer: Option<oneshot::Sender<Result<(), ApiError>>>,
}

impl Answered {
    /// Of an operation that nobody waits for.
    pub(super) fn unasked(operation: Handle) -> Self {
        let answer = None;
        Self { operation, answer }
    }

    pub(super) fn granted(self) -> Handle {
        if let Some(answer) = self.answer {
            let _ = answer.send(Ok(()));
        }
        self.operation
    }

    pub(super) fn refused(self, error: ApiError) {
        self.operation.fail(error.clone(), None);
        if let Some(answer) = self.answer {
            let _ = answer.send(Err(error));
        }
    }
}

impl Instance {
    /// Why a request cannot be carried out now; `wanted` is what the instance was to be.
    pub(super) fn busy(&self, wanted: &str, doing: Doing) -> ApiError {
        let (doing, hint) = match doing {
            Doing::Spawning => ("it is being started", WAIT),
            Doing::Recovering => ("it is being recovered", WAIT),
            Doing::Terminating => ("it is being terminated", WAIT),
            Doing::Morphing => (
                "a morph is under way",
                "finish it with `kmorphctl morph commit`, or undo it with `kmorphctl morph rollback`",
            ),
            Doing::Capturing => (
                "its memory is being captured",
                "wait until it is over, or end it with `kmorphctl operation cancel`",
            ),
            Doing::NotRunning => {
                let state = self.engine.condition().as_str();
                let text = format!("{} cannot be {wanted}: it is {state}", self.row.name);
                let hint = format!(
                    "an instance must run to be {wanted}; `kmorphctl status` shows why it does not"
                );
                return ApiError::new(ErrorCode::WrongState, text).hint(hint);
            }
        };
        let text = format!("{} cannot be {wanted}: {doing}", self.row.name);
        ApiError::new(ErrorCode::WrongState, text).hint(hint)
    }

    /// Asks the engine for something that has to be in the journal first; the answer comes when it is, or is not.
    fn wish(
        &mut self,
        request: Request,
        operation: Handle,
        ctx: &mut Context<Self>,
    ) -> ResponseFuture<Result<(), ApiError>> {
        let (slot, wanted) = match request {
            Request::Recover => (&mut self.asked.recovery, "recovered"),
            _ => (&mut self.asked.termination, "terminated"),
        };
        if let Err(doing) = self.engine.may(request) {
            let error = self.busy(wanted, doing);
            operation.fail(error.clone(), None);
            return Box::pin(std::future::ready(Err(error)));
        }
        let (answer, written) = oneshot::channel();
        *slot = Some(Answered {
            operation,
            answer: Some(answer),
        });
        self.tell(Event::Asked(request), ctx);
        Box::pin(async move {
            let replaced = |_| ApiError::new(ErrorCode::Busy, "its actor is being replaced");
            written.await.map_err(replaced)?
        })
    }
}

/// What to do about most of what is under way.
const WAIT: &str = "wait until it is over; `kmorphctl status` shows it";

impl Handler<Recover> for Instance {
    type Result = ResponseFuture<Result<(), ApiError>>;

    /// What was granted is in the journal, so that it is done also when the daemon dies.
    fn handle(&mut self, Recover(operation): Recover, ctx: &mut Self::Context) -> Self::Result {
        self.wish(Request::Recover, operation, ctx)
    }
}

impl Handler<Terminate> for Instance {
    type Result = ResponseFuture<Result<(), ApiError>>;

    fn handle(&mut self, request: Terminate, ctx: &mut Self::Context) -> Self::Result {
        let force = request.force;
        self.wish(Request::Terminate { force }, request.operation, ctx)
    }
}

impl Handler<PlanMorph> for Instance {
    type Result = <PlanMorph as Message>::Result;

    fn handle(&mut self, _: PlanMorph, _: &mut Self::Context) -> Self::Result {
        match self.engine.may(Request::Morph) {
            Ok(()) => Ok(((*self.row).clone(), self.generation.clone())),
            Err(doing) => Err(self.busy("morphed", doing)),
        }
    }
}

impl Handler<Morph> for Instance {
    type Result = Result<(), ApiError>;

    fn handle(&mut self, morph: Morph, ctx: &mut Self::Context) -> Self::Result {
        let error = match self.engine.may(Request::Morph) {
            Err(doing) => Some(self.busy("morphed", doing)),
            // It was another generation when the morph was planned.
            Ok(()) if morph.plan.source.generation != self.generation.generation => {
                Some(self.busy("morphed", Doing::Recovering))
            }
            Ok(()) => None,
        };
        if let Some(error) = error {
            morph.operation.fail(error.clone(), None);
            return Err(error);
        }
        self.asked.morph = Some((morph.plan, morph.operation));
        self.tell(Event::Asked(Request::Morph), ctx);
        Ok(())
    }
}

impl Handler<GetMorphStatus> for Instance {
    type Result = ResponseFuture<Result<MorphStatus, ApiError>>;

    fn handle(&mut self, _: GetMorphStatus, _: &mut Self::Context) -> Self::Result {
        let session = match &self.job {
            Job::Morph(session) => Some(session.clone()),
            Job::None | Job::Recovery(_) => None,
        };
        let name = self.row.name.clone();
        Box::pin(async move {
            let none = || {
                let text = format!("{name} has no morph under way");
                ApiError::new(ErrorCode::NotFound, text)
            };
            session
                .ok_or_else(none)?
                .send(GetMorph)
                .await
                .map_err(|_| none())
        })
    }
}

impl Handler<PingInstance> for Instance {
    type Result = ResponseFuture<Result<PingReport, ApiError>>;

    fn handle(&mut self, _: PingInstance, _: &mut Self::Context) -> Self::Result {
        let (watch, name) = (self.watch.clone(), self.row.name.clone());
        let generation = self.generation.generation;
        Box::pin(async move {
            let silent = || {
                let text = format!("{name} did not answer within {PING_TIMEOUT:?}");
                ApiError::new(ErrorCode::Timeout, text)
            };
            let ping = watch.ok_or_else(silent)?.send(Ping(PING_TIMEOUT)).await;
            let (rtt, _) = ping.ok().flatten().ok_or_else(silent)?;
            let rtt_us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
            Ok(PingReport {
                name: name.clone(),
                generation,
                rtt_us,
            })
        })
    }
}
