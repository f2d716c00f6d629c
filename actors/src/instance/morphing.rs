//! A morph as its instance sees it: its beginning, what is asked of it, its end.

use actix::prelude::*;
use kmorph_control_api::{ApiError, ErrorCode, InstanceState, MorphStatus};
use kmp_proto::message::FailureCause;
use kmp_proto::morph::Outcome;

use super::{CommandKind, Instance, MorphControl, Work};
use crate::journal::{Desired, GenerationRow};
use crate::morph::{MorphCommand, MorphPlan, MorphSession};
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
    /// The new generation.
    pub new: GenerationRow,
    /// Its watch, when it is the instance now.
    pub watch: Option<Addr<Watch>>,
}

/// The old generation is about to be fenced: its end is no failure.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct OldLeft;

/// Goes on with a morph that an earlier daemon left. Sent right after the beginning.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ResumeMorph {
    /// What was planned, with the generations as the journal has them.
    pub plan: MorphPlan,
    /// How far it was.
    pub row: crate::journal::MorphRow,
}

impl Instance {
    pub(super) fn begin_morph(
        &mut self,
        plan: MorphPlan,
        operation: Handle,
        ctx: &mut Context<Self>,
    ) {
        let (services, own) = (self.services.clone(), ctx.address());
        let session = MorphSession::begin(services, own, plan, operation);
        self.work = Work::Morphing(session);
        self.enter(InstanceState::Morphing, None);
    }
}

impl Handler<MorphOver> for Instance {
    type Result = ();

    fn handle(&mut self, over: MorphOver, ctx: &mut Self::Context) {
        self.work = Work::Nothing;
        match over.outcome {
            Outcome::Committed | Outcome::CommittedButFailed(_) => {
                self.end_watch();
                self.row.active_generation = over.new.generation;
                self.row.spec.kernel = over.new.kernel.clone();
                self.row.morphs += 1;
                self.kernel_release = over.status.to_kernel.clone();
                self.generation = over.new;
                self.overload = None;
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
                self.enter(InstanceState::Running, None);
            }
            Outcome::RolledBack(_) => self.enter_running(),
            Outcome::OldFailed(how) => {
                let evidence = vec![how];
                self.enter(InstanceState::Failed, Some(evidence.join("; ")));
                self.heal(FailureCause::KernelDead, evidence, ctx);
            }
            Outcome::OperatorActionNeeded(reason) => {
                self.rest(
                    Desired::OperatorAction,
                    InstanceState::OperatorActionNeeded,
                    Some(reason),
                );
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

impl Handler<ResumeMorph> for Instance {
    type Result = ();

    fn handle(&mut self, resume: ResumeMorph, ctx: &mut Self::Context) {
        let (services, own) = (self.services.clone(), ctx.address());
        if resume.row.committed {
            // The instance is the new generation already; the session still has the old one to end.
            self.row.morphs = self.row.morphs.saturating_sub(1);
        }
        let session = MorphSession::resume(services, own, resume.plan, resume.row);
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
            CommandKind::Commit { force } => MorphCommand::Commit { force, operation },
            CommandKind::Rollback => MorphCommand::Rollback {
                reason: "rolled back by request".to_owned(),
                operation: Some(operation),
            },
        });
        Ok(())
    }
}
