//! Plans a morph: reads the image of the target kernel, and records the target generation together with the morph.
//! Neither runs yet.

use std::time::Duration;

use actix::prelude::*;
use kmp_proto::morph::Phase;

use super::Means;
use crate::generation::{check_boot, choose_kernel};
use crate::model::generation::AnyGeneration;
use crate::model::requests::MorphRequest;
use crate::model::rows::{GenerationRow, InstanceRow, KernelChoice, MorphRow};
use crate::model::{Failure, MorphPhase, MorphRecord, OperationKind};
use crate::platform::journal::{Change, Record, record};
use crate::platform::operations::Handle;
use crate::platform::wall_clock;

/// The parameters of a morph.
#[derive(Clone, Debug)]
pub struct MorphPlan {
    /// The instance.
    pub instance: InstanceRow,
    /// Its active generation.
    pub source: AnyGeneration,
    /// The target generation, recorded and not yet spawned.
    pub target: AnyGeneration,
    /// The session.
    pub session: u64,
    /// The target kernel.
    pub kernel: KernelChoice,
    /// Validate as soon as the morph is prepared.
    pub auto_validate: bool,
    /// Commit as soon as the morph is validated.
    pub auto_commit: bool,
    /// Commit even over the budget.
    pub force: bool,
    /// The budget.
    pub budget: Duration,
    /// Maximum time for one phase.
    pub phase_timeout: Duration,
    /// Maximum wait for a commit, or for a validation, that is not automatic.
    pub expiry: Duration,
}

/// A planned morph that may begin.
#[derive(Message)]
#[rtype(result = "Result<(), Failure>")]
pub struct Planned {
    /// The plan.
    pub plan: Box<MorphPlan>,
    /// The operation that waits for the result.
    pub operation: Handle,
}

/// Plans the morph for `request`, from the active generation `source`. If the morph does not begin, call [`withdraw`]
/// to remove its records.
///
/// # Errors
/// When the request cannot be carried out, or the plan cannot be recorded. No records remain.
pub async fn plan(
    means: &Means,
    instance: InstanceRow,
    source: AnyGeneration,
    request: MorphRequest,
    uid: Option<u32>,
) -> Result<Planned, Failure> {
    let (platform, generations) = (&means.platform, &means.generations);
    check_boot(
        generations.machine.backend.kind(),
        request.kernel_cmdline.as_deref(),
        request.initramfs.as_deref(),
    )?;
    let cmdline = request.kernel_cmdline;
    let cmdline = cmdline.unwrap_or_else(|| source.kernel.cmdline.clone());
    let kernel = choose_kernel(&request.kernel, cmdline, request.initramfs.as_deref()).await?;
    let kind = match request.auto_validate {
        true => OperationKind::Morph,
        false => OperationKind::MorphPrepare,
    };
    let operation = platform.operations.begin(kind, &instance.name, uid)?;
    let id = operation.id();
    let budget = request.downtime_budget_us;
    let budget = budget.map(|micros| Duration::from_micros(u64::from(micros)));
    let session = generations.resources.numbers.borrow_mut().next_session();
    let mut plan = MorphPlan {
        session,
        phase_timeout: instance.policy.morph_timeout(),
        expiry: platform.settings.borrow().morph_expiry,
        instance,
        target: source.clone(),
        source,
        kernel: kernel.clone(),
        auto_validate: request.auto_validate || request.auto_commit,
        auto_commit: request.auto_commit,
        force: request.force,
        budget: budget.unwrap_or_else(|| platform.settings.borrow().downtime_budget),
    };
    // In one transaction with the target generation: the next daemon knows its session, and reuses no session id.
    let mut begun = first_row(&plan, id);
    let write = |generation: GenerationRow| {
        begun.status.to_generation = generation.generation;
        let rows = vec![
            Change::Morph(Box::new(begun)),
            Change::Generation(Box::new(generation)),
        ];
        async { record(&platform.journal, rows).await }
    };
    let (name, spec) = (&plan.instance.name, &plan.instance.spec);
    let intended = generations.intend(name, &kernel, spec.cpus, spec.memory_bytes, write);
    match intended.await {
        Ok(target) => plan.target = target.into(),
        Err(error) => {
            operation.fail(error.clone(), None);
            return Err(error);
        }
    }
    let plan = Box::new(plan);
    Ok(Planned { plan, operation })
}

/// Removes the records that [`plan`] wrote, because other work began first. `operation` is the operation that the plan
/// was made for.
pub async fn withdraw(means: &Means, plan: MorphPlan, operation: String, error: &Failure) {
    let mut refused = first_row(&plan, operation);
    refused.phase = Phase::Done.as_str().to_owned();
    refused.status.phase = MorphPhase::Failed;
    refused.status.reason = Some(error.message.clone());
    let ended = Record(vec![Change::Morph(Box::new(refused))]);
    means.platform.journal.do_send(ended);
    // The target never started.
    means.generations.end_unowned(plan.target).await;
}

/// Returns the row of a morph that was just planned.
fn first_row(plan: &MorphPlan, operation: String) -> MorphRow {
    MorphRow {
        status: first_status(plan, operation),
        phase: Phase::Preparing.as_str().to_owned(),
        committed: false,
        kernel: plan.kernel.clone(),
        estimate_without_overhead_us: None,
    }
}

pub(super) fn first_status(plan: &MorphPlan, operation: String) -> MorphRecord {
    MorphRecord {
        instance: plan.instance.name.clone(),
        session: plan.session,
        operation,
        phase: MorphPhase::Preparing,
        from_generation: plan.source.generation,
        to_generation: plan.target.generation,
        from_kernel: plan.source.kernel.release.clone(),
        to_kernel: plan.kernel.release.clone(),
        provider: None,
        other_providers: Vec::new(),
        mode: None,
        state_bytes: 0,
        sent_bytes: 0,
        rounds: 0,
        checks: Vec::new(),
        downtime_budget_us: u64::try_from(plan.budget.as_micros()).unwrap_or(u64::MAX),
        estimated_downtime_us: None,
        expires_at: None,
        downtime: None,
        reason: None,
        started_at: wall_clock::now_rfc3339(),
        ended_at: None,
    }
}
