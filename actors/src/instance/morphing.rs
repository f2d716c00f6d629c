//! A morph as its instance sees it: its beginning, what is asked of it, its end.

use actix::prelude::*;
use kmorph_control_api::{ApiError, ErrorCode, EventKind, InstanceState, MorphStatus};
use kmp_proto::message::FailureCause;
use kmp_proto::morph::Outcome;

use super::{CommandKind, Ending, Instance, MorphControl, Work};
use crate::journal::{Desired, GenerationRow};
use crate::morph::{LeftMorph, MorphCommand, MorphPlan, MorphSession};
use crate::operations::Handle;
use crate::watch::{EndWatch, SetOwner, Watch};

/// A morph has ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MorphOver {
    /// How.
    pub outcome: Outcome,
    /// Its last status.
    pub status: MorphStatus,
    /// Whether the commit record is durable: then the new generation is the instance.
    pub committed: bool,
    /// The new generation.
    pub new: GenerationRow,
    /// Its watch, when it is the instance now.
    pub watch: Option<Addr<Watch>>,
}

/// The old generation is about to be fenced: its end is no failure.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct OldLeft;

impl Instance {
    pub(super) fn begin_morph(
        &mut self,
        plan: MorphPlan,
        operation: Handle,
        ctx: &mut Context<Self>,
    ) {
        let (services, own) = (self.services.clone(), ctx.address());
        let session = MorphSession::begin(services, own, plan, self.watch.clone(), operation);
        self.work = Work::Morphing(session);
        self.enter(InstanceState::Morphing, None);
    }
}

impl Handler<MorphOver> for Instance {
    type Result = ();

    fn handle(&mut self, over: MorphOver, ctx: &mut Self::Context) {
        self.work = Work::Nothing;
        if let Some(Ending::After(request)) = self.ending.take() {
            if over.committed {
                self.end_watch();
                self.row.active_generation = over.new.generation;
                self.generation = over.new;
            }
            if let Some(watch) = over.watch {
                watch.do_send(EndWatch);
            }
            return self.end_after_work(request, ctx);
        }
        match over.outcome {
            Outcome::OperatorActionNeeded(reason) if !over.committed => {
                self.rest(
                    Desired::OperatorAction,
                    InstanceState::OperatorActionNeeded,
                    Some(reason),
                );
            }
            Outcome::Committed
            | Outcome::CommittedButFailed(_)
            | Outcome::OperatorActionNeeded(_) => {
                self.end_watch();
                self.row.active_generation = over.new.generation;
                self.row.spec.kernel = over.new.kernel.clone();
                self.row.morphs += 1;
                self.kernel_release = over.status.to_kernel.clone();
                self.generation = over.new;
                crate::vmcore::proof::begin(&self.services, &self.generation);
                // The new kernel's watch tells what its agent has said so far.
                (self.health, self.overload) = (None, None);
                if let Outcome::CommittedButFailed(how) = over.outcome {
                    if let Some(watch) = over.watch {
                        watch.do_send(EndWatch);
                    }
                    let evidence = vec![how];
                    self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                    return self.heal(FailureCause::KernelDead, evidence, ctx);
                }
                match over.watch {
                    Some(watch) => {
                        watch.do_send(SetOwner(ctx.address().recipient()));
                        self.watch = Some(watch);
                    }
                    None => self.begin_watch(ctx),
                }
                self.enter_running();
                if let Outcome::OperatorActionNeeded(reason) = over.outcome {
                    // The new kernel has the state and serves: it is the instance, whatever the old one still is.
                    let text = format!("the old kernel keeps its resources: {reason}");
                    self.say(EventKind::Morph, text);
                }
            }
            Outcome::RolledBack(_) => self.enter_running(),
            Outcome::OldFailed(how) => {
                let evidence = vec![how];
                self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                self.heal(FailureCause::KernelDead, evidence, ctx);
            }
        }
    }
}

impl Handler<OldLeft> for Instance {
    type Result = ();

    fn handle(&mut self, _: OldLeft, _: &mut Self::Context) {
        self.end_watch();
    }
}

impl Instance {
    /// Goes on with a morph that an earlier daemon left. One watch for each generation: until the commit record the
    /// instance watches the old one, after it the session watches the new one, and hands that watch over at its end.
    pub(super) fn resume_morph(&mut self, left: LeftMorph, ctx: &mut Context<Self>) {
        if left.row.committed {
            // The instance is the new generation already; the session still has the old one to end.
            self.row.morphs = self.row.morphs.saturating_sub(1);
        } else if left.deaths.old.is_none() {
            self.begin_watch(ctx);
        }
        let (services, own) = (self.services.clone(), ctx.address());
        let session = MorphSession::resume(services, own, left, self.watch.clone());
        self.work = Work::Morphing(session);
        self.enter(
            InstanceState::Morphing,
            Some("finishing what was under way".to_owned()),
        );
    }
}

impl Handler<MorphControl> for Instance {
    type Result = Result<(), ApiError>;

    fn handle(&mut self, control: MorphControl, _: &mut Self::Context) -> Self::Result {
        let Work::Morphing(session) = &self.work else {
            let text = format!("{} has no morph under way", self.row.name);
            let error = ApiError::new(ErrorCode::WrongState, text)
                .hint("begin one with `kmorphctl morph prepare`");
            control.operation.fail(error.clone(), None);
            return Err(error);
        };
        let operation = control.operation;
        session.do_send(match control.kind {
            CommandKind::Validate => MorphCommand::Validate(operation),
            CommandKind::Commit { limit } => MorphCommand::Commit { limit, operation },
            CommandKind::Rollback => MorphCommand::Rollback {
                reason: "rolled back by request".to_owned(),
                operation: Some(operation),
            },
        });
        Ok(())
    }
}
