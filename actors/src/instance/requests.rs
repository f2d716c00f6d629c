//! Requests to an instance.

use std::time::Duration;

use crate::model::requests::MorphRequest;
use crate::model::shown::{HealthView, HeartbeatView, InstanceSummary, InstanceView, PingView};
use crate::model::{Command, Failure, FailureKind, MorphRecord};
use actix::prelude::*;
use kmp_proto::instance::{Doing, Event, Request};
use kmp_proto::message::TopologyEntry;
use kmp_proto::morph::CommitLimit;
use tokio::sync::oneshot;

use super::Instance;
use crate::model::generation::AnyGeneration;
use crate::morph::GetMorph;
use crate::platform::operations::Handle;
use crate::watch::Ping;

/// Maximum wait for the answer to a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Reads the instance's entry in the list.
#[derive(Debug, Message)]
#[rtype(result = "InstanceSummary")]
pub struct GetSummary;

/// Reads all details.
#[derive(Debug, Message)]
#[rtype(result = "InstanceView")]
pub struct GetStatus;

/// Reads the state of the heartbeats.
#[derive(Debug, Message)]
#[rtype(result = "HeartbeatView")]
pub struct GetHeartbeat;

/// Reads the health.
#[derive(Debug, Message)]
#[rtype(result = "HealthView")]
pub struct GetHealth;

/// Sends one heartbeat now.
#[derive(Debug, Message)]
#[rtype(result = "Result<PingView, Failure>")]
pub struct PingInstance;

/// Terminates the instance.
#[derive(Message)]
#[rtype(result = "Result<(), Failure>")]
pub struct Terminate {
    /// Skip the clean shutdown.
    pub force: bool,
    /// The operation that waits for the result.
    pub operation: Handle,
}

/// Recovers the instance now, in any state.
#[derive(Message)]
#[rtype(result = "Result<(), Failure>")]
pub struct Recover(pub Handle);

/// Begins a morph. Returns the operation's id once the morph has begun, or cannot begin.
#[derive(Debug, Message)]
#[rtype(result = "Result<String, Failure>")]
pub struct BeginMorph {
    /// The parameters.
    pub request: MorphRequest,
    /// The caller.
    pub uid: Option<u32>,
}

/// A command for the morph under way.
#[derive(Message)]
#[rtype(result = "Result<(), Failure>")]
pub struct MorphControl {
    /// The command.
    pub kind: CommandKind,
    /// The operation that waits for the result.
    pub operation: Handle,
}

/// See [`MorphControl`].
#[derive(Clone, Copy, Debug)]
pub enum CommandKind {
    /// Validate.
    Validate,
    /// Commit.
    Commit {
        /// The maximum downtime that the user accepts.
        limit: CommitLimit,
    },
    /// Roll back.
    Rollback,
}

/// Reads the instance's entry in the topology for survivors.
#[derive(Debug, Message)]
#[rtype(result = "Option<TopologyEntry>")]
pub struct GetTopologyEntry;

/// Reads the generation, if it serves and no work on it is under way.
#[derive(Debug, Message)]
#[rtype(result = "Option<Box<AnyGeneration>>")]
pub struct GetSurvivor;

/// Reads the record of the morph.
#[derive(Debug, Message)]
#[rtype(result = "Result<MorphRecord, Failure>")]
pub struct GetMorphStatus;

/// An operation, and the caller that waits for the engine's decision.
pub(super) struct Answered {
    operation: Handle,
    answer: Option<oneshot::Sender<Result<(), Failure>>>,
}

impl Answered {
    /// Returns an operation without a waiting caller.
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

    pub(super) fn refused(self, error: Failure) {
        self.operation.fail(error.clone(), None);
        if let Some(answer) = self.answer {
            let _ = answer.send(Err(error));
        }
    }
}

impl Instance {
    /// Returns why a request is refused now; `wanted` is the refused action.
    pub(super) fn busy(&self, wanted: &str, doing: Doing) -> Failure {
        let instance = self.row.name.clone();
        let (doing, hint) = match doing {
            Doing::Spawning => ("it is being started", Command::WaitForStatus { instance }),
            Doing::Recovering => ("it is being recovered", Command::WaitForStatus { instance }),
            Doing::Terminating => (
                "it is being terminated",
                Command::WaitForStatus { instance },
            ),
            Doing::Morphing => ("a morph is under way", Command::FinishMorph { instance }),
            Doing::Capturing => ("its memory is being captured", Command::WaitOrCancel),
            Doing::NotRunning => {
                let state = self.engine.condition().as_str();
                let text = format!("{} cannot be {wanted}: it is {state}", self.row.name);
                let hint = Command::SeeWhyNotRunning {
                    wanted: wanted.to_owned(),
                    instance,
                };
                return Failure::new(FailureKind::WrongState, text).hint(hint);
            }
        };
        let text = format!("{} cannot be {wanted}: {doing}", self.row.name);
        Failure::new(FailureKind::WrongState, text).hint(hint)
    }

    /// Sends the engine an event that must be durable first. The answer follows the write.
    fn wish(
        &mut self,
        request: Request,
        operation: Handle,
        ctx: &mut Context<Self>,
    ) -> ResponseFuture<Result<(), Failure>> {
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
            let replaced = |_| Failure::new(FailureKind::Busy, "its actor is being replaced");
            written.await.map_err(replaced)?
        })
    }
}

impl Handler<Recover> for Instance {
    type Result = ResponseFuture<Result<(), Failure>>;

    /// The request is in the journal once it is granted, so that it survives a crash of the daemon.
    fn handle(&mut self, Recover(operation): Recover, ctx: &mut Self::Context) -> Self::Result {
        self.wish(Request::Recover, operation, ctx)
    }
}

impl Handler<Terminate> for Instance {
    type Result = ResponseFuture<Result<(), Failure>>;

    fn handle(&mut self, request: Terminate, ctx: &mut Self::Context) -> Self::Result {
        let force = request.force;
        self.wish(Request::Terminate { force }, request.operation, ctx)
    }
}

impl Handler<GetMorphStatus> for Instance {
    type Result = ResponseFuture<Result<MorphRecord, Failure>>;

    fn handle(&mut self, _: GetMorphStatus, _: &mut Self::Context) -> Self::Result {
        let session = self.session();
        let none = Failure::new(FailureKind::NotFound, self.no_morph());
        Box::pin(async move {
            let Some(session) = session else {
                return Err(none);
            };
            session.send(GetMorph).await.map_err(|_| none)
        })
    }
}

impl Handler<PingInstance> for Instance {
    type Result = ResponseFuture<Result<PingView, Failure>>;

    fn handle(&mut self, _: PingInstance, _: &mut Self::Context) -> Self::Result {
        let name = self.row.name.clone();
        let generation = self.generation.generation;
        let Some(watch) = self.watch.clone() else {
            // The generation has no watch, so no heartbeat can be sent.
            let refused = self.busy("pinged", Doing::NotRunning);
            return Box::pin(async { Err(refused) });
        };
        Box::pin(async move {
            let silent = || {
                let text = format!("{name} did not answer within {PING_TIMEOUT:?}");
                Failure::new(FailureKind::Timeout, text)
            };
            let ping = watch.send(Ping(PING_TIMEOUT)).await;
            let (rtt, _) = ping.ok().flatten().ok_or_else(silent)?;
            Ok(PingView {
                name: name.clone(),
                generation,
                rtt,
            })
        })
    }
}
