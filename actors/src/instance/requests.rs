//! What may be asked of an instance.

use std::time::Duration;

use actix::prelude::*;
use kmorph_control_api::{
    ApiError, ErrorCode, HealthReport, HeartbeatStatus, InstanceState, InstanceStatus,
    InstanceSummary, MorphStatus, PingReport,
};
use kmp_proto::message::FailureCause;
use kmp_proto::morph::CommitLimit;

use super::{Instance, Work};
use crate::generation::journal_failure;
use crate::journal::{Change, Desired, record};
use crate::morph::{GetMorph, MorphPlan};
use crate::operations::Handle;
use crate::watch::Ping;

/// The evidence of a recovery that nothing but a wish caused.
pub(crate) const ASKED_FOR: &str = "asked for by an operator";
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

/// The morph under way.
#[derive(Debug, Message)]
#[rtype(result = "Result<MorphStatus, ApiError>")]
pub struct GetMorphStatus;

/// What a new morph starts from; refused when the instance cannot be morphed now.
#[derive(Debug, Message)]
#[rtype(result = "Result<(crate::journal::InstanceRow, crate::journal::GenerationRow), ApiError>")]
pub struct PlanMorph;

impl Instance {
    /// Why nothing else can begin now.
    pub(super) fn busy(&self, wanted: &str) -> Option<ApiError> {
        let doing = match self.work {
            _ if self.ending.is_some() => "it is being terminated",
            Work::Nothing => return None,
            Work::Asked(_) | Work::Waiting(_) | Work::Queued(_) | Work::Recovering(_) => {
                "it is being recovered"
            }
            Work::Morphing(_) => "a morph is under way",
            Work::Capturing { .. } => "its memory is being captured",
            Work::Terminating => "it is being terminated",
        };
        let text = format!("{} cannot be {wanted}: {doing}", self.row.name);
        let hint = match self.work {
            Work::Morphing(_) => {
                "finish it with `kmorphctl morph commit`, or undo it with \
                                  `kmorphctl morph rollback`"
            }
            Work::Capturing { .. } => {
                "wait until it is over, or end it with `kmorphctl operation cancel`"
            }
            _ => "wait until it is over; `kmorphctl status` shows it",
        };
        Some(ApiError::new(ErrorCode::WrongState, text).hint(hint))
    }
}

impl Handler<Recover> for Instance {
    type Result = ResponseActFuture<Self, Result<(), ApiError>>;

    /// What was granted is in the journal, so that it is done also when the daemon dies.
    fn handle(&mut self, Recover(operation): Recover, _: &mut Self::Context) -> Self::Result {
        if let Some(error) = self.busy("recovered") {
            operation.fail(error.clone(), None);
            return Box::pin(actix::fut::ready(Err(error)));
        }
        let before = std::mem::replace(&mut self.row.desired, Desired::Recover);
        self.work = Work::Asked(before);
        let (journal, row) = (self.services.journal.clone(), self.row.clone());
        let work = async move { record(&journal, vec![Change::Instance(Box::new(row))]).await };
        Box::pin(work.into_actor(self).map(move |written, act, ctx| {
            act.work = Work::Nothing;
            let Err(error) = written else {
                act.begin_recovery(operation, ctx);
                return Ok(());
            };
            if act.row.desired == Desired::Recover {
                act.row.desired = before;
            }
            if before == Desired::Running && act.watch.is_none() {
                // It failed meanwhile: looked at again, that comes to light.
                act.begin_watch(ctx);
            }
            let error = journal_failure(&error);
            operation.fail(error.clone(), None);
            Err(error)
        }))
    }
}

impl Instance {
    fn begin_recovery(&mut self, operation: Handle, ctx: &mut Context<Self>) {
        self.restarts.forgive();
        self.row.reason = None;
        operation.step("recovering");
        self.operation = Some(operation);
        self.end_watch();
        let evidence = vec![ASKED_FOR.to_owned()];
        self.recover_after(Duration::ZERO, true, FailureCause::Operator, evidence, ctx);
    }
}

impl Handler<PlanMorph> for Instance {
    type Result = <PlanMorph as Message>::Result;

    fn handle(&mut self, _: PlanMorph, _: &mut Self::Context) -> Self::Result {
        if let Some(error) = self.busy("morphed") {
            return Err(error);
        }
        if !matches!(self.state, InstanceState::Running | InstanceState::Degraded) {
            let state = super::status::state_name(self.state);
            let text = format!("{} cannot be morphed: it is {state}", self.row.name);
            return Err(ApiError::new(ErrorCode::WrongState, text).hint(
                "an instance must run to be morphed; `kmorphctl status` shows why it does not",
            ));
        }
        Ok((self.row.clone(), self.generation.clone()))
    }
}

impl Handler<Morph> for Instance {
    type Result = Result<(), ApiError>;

    fn handle(&mut self, morph: Morph, ctx: &mut Self::Context) -> Self::Result {
        if let Some(error) = self.busy("morphed") {
            morph.operation.fail(error.clone(), None);
            return Err(error);
        }
        self.begin_morph(*morph.plan, morph.operation, ctx);
        Ok(())
    }
}

impl Handler<GetMorphStatus> for Instance {
    type Result = ResponseFuture<Result<MorphStatus, ApiError>>;

    fn handle(&mut self, _: GetMorphStatus, _: &mut Self::Context) -> Self::Result {
        let session = match &self.work {
            Work::Morphing(session) => Some(session.clone()),
            _ => None,
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
