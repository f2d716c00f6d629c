//! Commands for a morph under way, from users and from the daemon.

use crate::model::{Command, Failure, FailureKind, MorphRecord};
use actix::prelude::*;
use kmp_proto::message::Side;
use kmp_proto::morph::{CommitLimit, Event, Stage};

use super::MorphSession;
use crate::platform::fleet::Abandon;
use crate::platform::operations::Handle;

/// A user's command for a morph under way.
#[derive(Message)]
#[rtype(result = "Result<(), Failure>")]
pub enum MorphCommand {
    /// Validate the transferred state.
    Validate(Handle),
    /// Commit the validated morph.
    Commit {
        /// The maximum downtime that the user accepts.
        limit: CommitLimit,
        /// The operation that waits for the result.
        operation: Handle,
    },
    /// Roll back to the source kernel.
    Rollback {
        /// The reason.
        reason: String,
        /// The operation that waits for the result, if any.
        operation: Option<Handle>,
    },
}

/// Reads the record of the morph.
#[derive(Debug, Message)]
#[rtype(result = "MorphRecord")]
pub struct GetMorph;

/// The watch reports that the source generation failed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct SourceFailed(pub String);

impl Handler<Abandon> for MorphSession {
    type Result = ();

    fn handle(&mut self, _: Abandon, ctx: &mut Self::Context) {
        ctx.stop();
    }
}

/// A forced termination of the instance: neither side serves again, in any phase.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Terminated;

impl Handler<Terminated> for MorphSession {
    type Result = ();

    fn handle(&mut self, _: Terminated, ctx: &mut Self::Context) {
        // The morph waits for neither side any more. The side that holds the state stays, and the instance fences it.
        for side in [Side::Source, Side::Target] {
            self.tell(Event::Died(side, "it is being terminated".to_owned()), ctx);
        }
    }
}

impl Handler<SourceFailed> for MorphSession {
    type Result = ();

    fn handle(&mut self, SourceFailed(how): SourceFailed, ctx: &mut Self::Context) {
        self.tell(Event::Died(Side::Source, how), ctx);
    }
}

impl Handler<GetMorph> for MorphSession {
    type Result = MessageResult<GetMorph>;

    fn handle(&mut self, _: GetMorph, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.status.clone())
    }
}

impl Handler<MorphCommand> for MorphSession {
    type Result = Result<(), Failure>;

    fn handle(&mut self, command: MorphCommand, ctx: &mut Self::Context) -> Self::Result {
        let instance = self.plan.instance.name.clone();
        match command {
            MorphCommand::Validate(operation) => {
                operation.step("validating");
                let asked = self.request(Event::ValidationRequested, Some(operation), ctx);
                asked
                    .or_else(|(operation, stage)| refuse(operation, instance, stage, "transferred"))
            }
            MorphCommand::Commit { limit, operation } => {
                operation.step("committing");
                let or_roll_back = false;
                let request = Event::CommitRequested {
                    limit,
                    or_roll_back,
                };
                let planned = self.status.downtime_budget_us;
                if let CommitLimit::Within(budget) = limit {
                    self.status.downtime_budget_us =
                        u64::try_from(budget.as_micros()).unwrap_or(u64::MAX);
                }
                let asked = self.request(request, Some(operation), ctx);
                asked.or_else(|(operation, stage)| {
                    self.status.downtime_budget_us = planned;
                    refuse(operation, instance, stage, "validated")
                })
            }
            MorphCommand::Rollback { reason, operation } => {
                let asked = self.request(Event::RollbackRequested(reason), operation, ctx);
                asked.or_else(|(operation, stage)| {
                    refuse(operation, instance, stage, "before its commit")
                })
            }
        }
    }
}

/// Refuses a command at the wrong moment, and fails the operation that waits.
fn refuse(
    operation: Option<Handle>,
    instance: String,
    stage: Stage,
    wanted: &str,
) -> Result<(), Failure> {
    let state = stage.as_str().replace('_', " ").replace('.', ", ");
    let text = format!("the morph is {state}, not {wanted}");
    let error = Failure::new(FailureKind::WrongState, text).hint(Command::SeeMorph { instance });
    if let Some(operation) = operation {
        operation.fail(error.clone(), None);
    }
    Err(error)
}
