//! Morphs of an instance: start, commands, end.
//!
//! ```text
//! BeginMorph ─▶ may it? ─▶ planned: kernel read, target in the journal ─▶ the engine is asked ─┬▶ begun
//!                  └▶ refused                     (beside the actor)                          └▶ withdrawn, refused
//! ```
//!
//! Planning takes time on a large kernel image or a slow disk, and does not block the instance meanwhile: the engine
//! decides once the plan is ready.

use crate::model::{Command, EventKind, Failure, FailureKind};
use actix::prelude::*;
use kmp_proto::instance::{Doing, Event, Request};
use kmp_proto::message::Side;
use kmp_proto::morph::Outcome;

use super::{BeginMorph, CommandKind, Instance, MorphControl};
use crate::morph::{self, LeftMorph, MorphCommand, MorphNews, MorphOver, MorphSession, Planned};

impl Instance {
    /// Begins the requested morph.
    pub(super) fn begin_morph(&mut self, ctx: &mut Context<Self>) {
        // The request was accepted, so its plan is here.
        let Some(Planned { plan, operation }) = self.asked.morph.take() else {
            return;
        };
        let (means, owner) = (self.services.of_a_morph(), owner(ctx));
        let watch = self.watch.clone();
        let session = MorphSession::begin(means, owner, *plan, watch, operation);
        self.job = Some(Box::new(session));
    }

    /// Resumes a morph that an earlier daemon left.
    pub(super) fn resume_morph(&mut self, left: LeftMorph, ctx: &mut Context<Self>) {
        let (means, owner) = (self.services.of_a_morph(), owner(ctx));
        let session = MorphSession::resume(means, owner, left, self.watch.clone());
        self.job = Some(Box::new(session));
    }

    fn morph_over(&mut self, over: MorphOver, ctx: &mut Context<Self>) {
        self.job = None;
        self.last_morph = Some(match &over.status.reason {
            None => format!("committed: {} serves", over.status.to_kernel),
            Some(reason) => reason.clone(),
        });
        if over.outcome.owner() == Side::Target {
            self.end_watch();
            self.watch = over.watch;
            self.kernel_release = over.status.to_kernel;
            self.generation = over.target.clone();
            crate::capture::proof::begin(&self.services.captures, &self.generation);
        }
        let kept = match &over.outcome {
            Outcome::OperatorActionNeeded { side, why, .. } => {
                // The instance fences it too, when the instance is terminated.
                self.left.push(match side {
                    Side::Source => over.source,
                    Side::Target => over.target.clone(),
                });
                Some((*side, why.clone()))
            }
            _ => None,
        };
        self.tell(Event::MorphOver(over.outcome), ctx);
        if let Some((side, why)) = kept {
            let text = format!("the {} kernel keeps its resources: {why}", side.as_str());
            self.say(EventKind::Morph, text);
        }
    }
}

fn owner(ctx: &Context<Instance>) -> morph::Owner {
    morph::Owner {
        news: ctx.address().recipient(),
        rows: ctx.address().recipient(),
    }
}

impl Handler<BeginMorph> for Instance {
    type Result = ResponseFuture<Result<String, Failure>>;

    fn handle(&mut self, begin: BeginMorph, ctx: &mut Self::Context) -> Self::Result {
        if let Err(doing) = self.engine.may(Request::Morph) {
            let refused = self.busy("morphed", doing);
            return Box::pin(std::future::ready(Err(refused)));
        }
        let means = self.services.of_a_morph();
        let (row, source) = ((*self.row).clone(), self.generation.clone());
        let own = ctx.address().recipient::<Planned>();
        // The task outlives this actor, so that the records of a morph that does not begin are withdrawn.
        Box::pin(async move {
            let planned = morph::plan(&means, row, source, begin.request, begin.uid).await?;
            let (plan, id) = (planned.plan.clone(), planned.operation.id());
            let gone = |_| Failure::new(FailureKind::Busy, "its actor is being replaced");
            let begun = own.send(planned).await.map_err(gone);
            if let Err(error) = begun.and_then(|begun| begun) {
                morph::withdraw(&means, *plan, id, &error).await;
                return Err(error);
            }
            Ok(id)
        })
    }
}

impl Handler<Planned> for Instance {
    type Result = Result<(), Failure>;

    fn handle(&mut self, planned: Planned, ctx: &mut Self::Context) -> Self::Result {
        let refused = match self.engine.may(Request::Morph) {
            Err(doing) => Some(self.busy("morphed", doing)),
            // The morph was planned for another generation.
            Ok(()) if planned.plan.source.generation != self.generation.generation => {
                Some(self.busy("morphed", Doing::Recovering))
            }
            Ok(()) => None,
        };
        if let Some(error) = refused {
            planned.operation.fail(error.clone(), None);
            return Err(error);
        }
        self.asked.morph = Some(planned);
        self.tell(Event::Asked(Request::Morph), ctx);
        Ok(())
    }
}

impl Handler<MorphNews> for Instance {
    type Result = ();

    fn handle(&mut self, news: MorphNews, ctx: &mut Self::Context) {
        match news {
            MorphNews::SourceLeft => drop(self.tell(Event::SourceLeft, ctx)),
            MorphNews::Over(over) => self.morph_over(*over, ctx),
            MorphNews::Gone => self.job_gone(ctx),
        }
    }
}

impl Handler<MorphControl> for Instance {
    type Result = ResponseFuture<Result<(), Failure>>;

    fn handle(&mut self, control: MorphControl, _: &mut Self::Context) -> Self::Result {
        let Some(session) = self.session() else {
            let error = Failure::new(FailureKind::WrongState, self.no_morph()).hint(
                Command::PrepareMorph {
                    instance: self.row.name.clone(),
                },
            );
            control.operation.fail(error.clone(), None);
            return Box::pin(async { Err(error) });
        };
        let operation = control.operation;
        // If the session refuses, the caller receives the refusal.
        let asked = session.send(match control.kind {
            CommandKind::Validate => MorphCommand::Validate(operation),
            CommandKind::Commit { limit } => MorphCommand::Commit { limit, operation },
            CommandKind::Rollback => MorphCommand::Rollback {
                reason: "rolled back by request".to_owned(),
                operation: Some(operation),
            },
        });
        let gone = Failure::new(FailureKind::WrongState, self.no_morph());
        Box::pin(async move { asked.await.unwrap_or(Err(gone)) })
    }
}

impl Instance {
    /// Returns the morph under way.
    pub(super) fn session(&self) -> Option<Addr<MorphSession>> {
        self.job.as_ref()?.session().cloned()
    }

    /// Returns the message that no morph is under way, with the result of the last one.
    pub(super) fn no_morph(&self) -> String {
        let name = &self.row.name;
        match &self.last_morph {
            None => format!("{name} has no morph under way"),
            Some(how) => format!("{name} has no morph under way; the last one was {how}"),
        }
    }
}
