//! What is asked of a morph under way, by its users and by the daemon.

use actix::prelude::*;
use kmorph_control_api::{ApiError, ErrorCode, MorphPhase, MorphStatus};
use kmp_proto::message::Side;
use kmp_proto::morph::{CommitLimit, Event};

use super::MorphSession;
use crate::operations::Handle;
use crate::recovery::Abandon;

/// What a user asks of a morph under way.
#[derive(Message)]
#[rtype(result = "Result<(), ApiError>")]
pub enum MorphCommand {
    /// Validate what was transferred.
    Validate(Handle),
    /// Commit what was validated.
    Commit {
        /// The downtime at which it is still wanted.
        limit: CommitLimit,
        /// Who waits.
        operation: Handle,
    },
    /// Go back.
    Rollback {
        /// Why.
        reason: String,
        /// Who waits.
        operation: Option<Handle>,
    },
}

/// Asks where it is.
#[derive(Debug, Message)]
#[rtype(result = "MorphStatus")]
pub struct GetMorph;

/// The old generation failed, says its watch.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct OldFailed(pub String);

impl Handler<Abandon> for MorphSession {
    type Result = ();

    fn handle(&mut self, _: Abandon, ctx: &mut Self::Context) {
        ctx.stop();
    }
}

/// The instance is to end by force: neither side serves again, whatever the phase.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Terminated;

impl Handler<Terminated> for MorphSession {
    type Result = ();

    fn handle(&mut self, _: Terminated, ctx: &mut Self::Context) {
        // Nobody waits any more for an answer of either. The side that has the state stays, and the instance fences it.
        for side in [Side::Old, Side::New] {
            self.tell(Event::Died(side, "it is being terminated".to_owned()), ctx);
        }
    }
}

impl Handler<OldFailed> for MorphSession {
    type Result = ();

    fn handle(&mut self, OldFailed(how): OldFailed, ctx: &mut Self::Context) {
        self.tell(Event::Died(Side::Old, how), ctx);
    }
}

impl Handler<GetMorph> for MorphSession {
    type Result = MessageResult<GetMorph>;

    fn handle(&mut self, _: GetMorph, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.status.clone())
    }
}

impl Handler<MorphCommand> for MorphSession {
    type Result = Result<(), ApiError>;

    fn handle(&mut self, command: MorphCommand, ctx: &mut Self::Context) -> Self::Result {
        let phase = self.status.phase;
        let wrong = |wanted: &str| {
            let text = format!("the morph is {phase:?}, not {wanted}").to_lowercase();
            Err(ApiError::new(ErrorCode::WrongState, text)
                .hint("`kmorphctl morph status` shows where it is"))
        };
        match command {
            MorphCommand::Validate(operation) => match self.held_round.take() {
                Some(event) => {
                    operation.step("validating");
                    self.operation = Some(operation);
                    self.hold_validation = false;
                    self.tell(event, ctx);
                    Ok(())
                }
                None => {
                    let refused = wrong("transferred");
                    if let Err(error) = &refused {
                        operation.fail(error.clone(), None);
                    }
                    refused
                }
            },
            MorphCommand::Commit { limit, operation } => {
                if phase != MorphPhase::Committable {
                    let refused = wrong("validated");
                    if let Err(error) = &refused {
                        operation.fail(error.clone(), None);
                    }
                    return refused;
                }
                operation.step("committing");
                self.operation = Some(operation);
                if let CommitLimit::Within(budget) = limit {
                    self.status.downtime_budget_us =
                        u64::try_from(budget.as_micros()).unwrap_or(u64::MAX);
                }
                let or_roll_back = false;
                self.tell(
                    Event::CommitRequested {
                        limit,
                        or_roll_back,
                    },
                    ctx,
                );
                Ok(())
            }
            MorphCommand::Rollback { reason, operation } => {
                if self.committed {
                    if let Some(operation) = operation {
                        let text = "the morph is committed, it cannot be rolled back";
                        operation.fail(ApiError::new(ErrorCode::WrongState, text), None);
                    }
                    return wrong("before its commit");
                }
                if let Some(operation) = operation
                    && let Some(before) = self.operation.replace(operation)
                {
                    let text = "rolled back by request";
                    before.fail(ApiError::new(ErrorCode::WrongState, text), None);
                }
                self.tell(Event::RollbackRequested(reason), ctx);
                Ok(())
            }
        }
    }
}
