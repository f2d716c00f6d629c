//! Beginning a morph: the kernel is read and the target generation written down before the instance is
//! told.

use std::time::Duration;

use crate::model::{Failure, FailureKind, MorphPhase, OperationKind};
use actix::prelude::*;

use super::spawning::{check_boot, choose_kernel};
use super::{BeginMorph, Find, Supervisor};
use crate::instance::{Morph, PlanMorph};
use crate::model::rows::GenerationRow;
use crate::morph::{MorphPlan, first_row};
use crate::platform::journal::{Change, Record, record};

impl Handler<BeginMorph> for Supervisor {
    type Result = ResponseFuture<Result<String, Failure>>;

    fn handle(&mut self, begin: BeginMorph, ctx: &mut Self::Context) -> Self::Result {
        let found = self.refuse_while_stopping();
        let (services, own) = (self.services.clone(), ctx.address());
        Box::pin(async move {
            found?;
            let gone = |_| Failure::new(FailureKind::Busy, "its actor is being replaced");
            let instance = own.send(Find(begin.name.clone())).await.map_err(gone)??;
            let (row, source) = instance.send(PlanMorph).await.map_err(gone)??;
            let request = begin.request;
            check_boot(
                services.backend().kind(),
                request.kernel_cmdline.as_deref(),
                request.initramfs.as_deref(),
            )?;
            let cmdline = request
                .kernel_cmdline
                .unwrap_or_else(|| source.kernel.cmdline.clone());
            let kernel =
                choose_kernel(&request.kernel, cmdline, request.initramfs.as_deref()).await?;
            let kind = if request.auto_validate {
                OperationKind::Morph
            } else {
                OperationKind::MorphPrepare
            };
            let (cpus, memory) = (row.spec.cpus, row.spec.memory_bytes);
            let operation = services
                .platform
                .operations
                .begin(kind, &row.name, begin.uid)?;
            let id = operation.id();
            let budget = match request.downtime_budget_us {
                Some(micros) => Duration::from_micros(u64::from(micros)),
                None => services.platform.settings.borrow().downtime_budget,
            };
            let mut plan = MorphPlan {
                session: services
                    .generations
                    .resources
                    .numbers
                    .borrow_mut()
                    .next_session(),
                phase_timeout: seconds(row.policy.morph_timeout_s),
                expiry: services.platform.settings.borrow().morph_expiry,
                instance: row,
                target: source.clone(),
                source,
                kernel: kernel.clone(),
                auto_validate: request.auto_validate || request.auto_commit,
                auto_commit: request.auto_commit,
                force: request.force,
                budget,
            };
            // With its target generation: the next daemon knows which session that belongs to, and gives no number twice.
            let mut begun = first_row(&plan, id.clone());
            let write = |generation: GenerationRow| {
                begun.status.to_generation = generation.generation;
                let rows = vec![
                    Change::Morph(Box::new(begun)),
                    Change::Generation(Box::new(generation)),
                ];
                async { record(&services.platform.journal, rows).await }
            };
            let name = plan.instance.name.clone();
            let intended = services
                .generations
                .intend(&name, &kernel, cpus, memory, write);
            let target = match intended.await {
                Ok(target) => target,
                Err(error) => {
                    operation.fail(error.clone(), None);
                    return Err(error);
                }
            };
            plan.target = target.clone().into();
            let mut refused = first_row(&plan, id.clone());
            let asked = instance
                .send(Morph {
                    plan: Box::new(plan),
                    operation,
                })
                .await;
            if let Err(error) = asked.map_err(gone).and_then(|begun| begun) {
                // Another morph was quicker: what was intended here was never started.
                refused.phase = "done".to_owned();
                refused.status.phase = MorphPhase::Failed;
                refused.status.reason = Some(error.message.clone());
                let ended = Change::Morph(Box::new(refused));
                services.platform.journal.do_send(Record(vec![ended]));
                services.generations.end_unowned(target.into()).await;
                return Err(error);
            }
            Ok(id)
        })
    }
}

pub(super) fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::from_secs(60))
}
