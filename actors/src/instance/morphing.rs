//! A morph as its instance sees it: its beginning, what is asked of it, its end.

use crate::model::{Command, EventKind, Failure, FailureKind};
use actix::prelude::*;
use kmp_proto::instance::Event;
use kmp_proto::message::Side;
use kmp_proto::morph::Outcome;

use super::{CommandKind, Instance, Job, MorphControl};
use crate::morph::{self, LeftMorph, MorphCommand, MorphNews, MorphOver, MorphSession};

impl Instance {
    /// Begins the morph that was asked for.
    pub(super) fn begin_morph(&mut self, ctx: &mut Context<Self>) {
        // The request was accepted, so its plan is here.
        let Some((plan, operation)) = self.asked.morph.take() else {
            return;
        };
        let (means, owner) = (self.services.of_a_morph(), owner(ctx));
        let watch = self.watch.clone();
        let session = MorphSession::begin(means, owner, *plan, watch, operation);
        self.job = Job::Morph(session);
    }

    /// Goes on with a morph that an earlier daemon left.
    pub(super) fn resume_morph(&mut self, left: LeftMorph, ctx: &mut Context<Self>) {
        let (means, owner) = (self.services.of_a_morph(), owner(ctx));
        let session = MorphSession::resume(means, owner, left, self.watch.clone());
        self.job = Job::Morph(session);
    }

    fn morph_over(&mut self, over: MorphOver, ctx: &mut Context<Self>) {
        self.job = Job::None;
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
                // The instance ends it too, when it is ended.
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
        let Job::Morph(session) = &self.job else {
            let error = Failure::new(FailureKind::WrongState, self.no_morph()).hint(
                Command::PrepareMorph {
                    instance: self.row.name.clone(),
                },
            );
            control.operation.fail(error.clone(), None);
            return Box::pin(async { Err(error) });
        };
        let operation = control.operation;
        // What the session refuses, whoever asks is refused.
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
    /// That no morph is under way, and what became of the last one.
    pub(super) fn no_morph(&self) -> String {
        let name = &self.row.name;
        match &self.last_morph {
            None => format!("{name} has no morph under way"),
            Some(how) => format!("{name} has no morph under way; the last one was {how}"),
        }
    }
}
