//! Captures on request. The rest of the work is in [`crate::capture::by_hand`].
//!
//! The watch ignores the silence of a frozen instance, but not its exit: the instance fails at once, and is healed as
//! soon as its memory has been read. After the freeze, the watch restarts.

use std::path::PathBuf;

use crate::model::{Failure, FailureKind};
use actix::prelude::*;
use kmp_proto::instance::{Event, Request};

use super::Instance;
use crate::capture::Turn;
use crate::capture::by_hand::ByHand;
use crate::platform::operations::Handle;

/// Captures the memory now, in any state.
#[derive(Message)]
#[rtype(result = "Result<(), Failure>")]
pub struct CaptureVmcore {
    /// The file to write; see [`check_output`](crate::capture::by_hand::check_output).
    pub output: PathBuf,
    /// The operation that waits for the result.
    pub operation: Handle,
}

/// A requested capture that can begin.
pub(super) struct Ready {
    request: CaptureVmcore,
    turn: Turn,
}

impl Handler<CaptureVmcore> for Instance {
    type Result = Result<(), Failure>;

    fn handle(&mut self, request: CaptureVmcore, ctx: &mut Self::Context) -> Self::Result {
        let refused = |operation: Handle, error: Failure| {
            operation.fail(error.clone(), None);
            Err(error)
        };
        if let Some(error) = self.uncapturable() {
            return refused(request.operation, error);
        }
        let Some(turn) = self.services.captures.now() else {
            let text = "another memory is being captured, and one is captured at a time";
            let error = Failure::new(FailureKind::Busy, text).hint("try again when it is done");
            return refused(request.operation, error);
        };
        self.asked.capture = Some(Ready { request, turn });
        self.tell(Event::Asked(Request::Capture), ctx);
        Ok(())
    }
}

impl Instance {
    /// Begins the requested capture.
    pub(super) fn begin_capture(&mut self, ctx: &mut Context<Self>) {
        // The request was accepted, so it is here.
        let Some(Ready { request, turn }) = self.asked.capture.take() else {
            return;
        };
        let capture = ByHand {
            captures: self.services.captures.clone(),
            survivors: self.fleet.survivors.clone(),
            row: self.generation.clone(),
            output: request.output,
            turn,
            operation: request.operation,
        };
        let captured = capture.run().into_actor(self).map(move |row, act, ctx| {
            act.generation = row;
            act.tell(Event::CaptureOver, ctx);
        });
        ctx.spawn(captured);
    }
}

/// Makes the kernel panic, for a test.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), String>")]
pub struct ProvokePanic;

impl Handler<ProvokePanic> for Instance {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, _: ProvokePanic, _: &mut Self::Context) -> Self::Result {
        let backend = self.services.backend().clone();
        let placement = self.generation.placement().cloned();
        Box::pin(async move {
            let placement = placement.ok_or("it was never started")?;
            let provoked = backend.provoke_panic(&placement).await;
            provoked.map_err(|error| error.to_string())
        })
    }
}

impl Instance {
    fn uncapturable(&self) -> Option<Failure> {
        let name = &self.row.name;
        if let Some(why) = self.row.spec.backend.uncaptured() {
            let text = format!("the memory of {name} cannot be captured: {}", why.reason);
            return Some(Failure::new(FailureKind::WrongState, text).hint(why.instead));
        }
        if let Err(doing) = self.engine.may(Request::Capture) {
            return Some(self.busy("captured", doing));
        }
        if self.generation.placement().is_none() {
            let text = format!("nothing is left of the memory of {name}");
            return Some(Failure::new(FailureKind::WrongState, text));
        }
        None
    }
}
