//! Restores instances after a restart of the daemon, and cleans up leftovers.

use std::time::Duration;

use kmorph_backends::contract::Observation;
use kmp_proto::instance::{ASKED_FOR, Desired, Failure, Successor};
use kmp_proto::message::FailureCause;
use slog::{info, warn};

use crate::instance::Beginning;
use crate::model::generation::{AnyGeneration, Facts, Generation};
use crate::model::rows::InstanceRow;
use crate::model::{OperationKind, OperationState, RecoveryOutcome, RecoveryRecord};
use crate::morph::{Deaths, LeftMorph, MorphPlan};
use crate::platform::journal::Snapshot;
use crate::services::Services;

/// An instance as found after a restart.
pub(super) struct Restored {
    pub(super) row: InstanceRow,
    pub(super) generation: AnyGeneration,
    pub(super) beginning: Beginning,
}

impl Restored {
    /// Returns the unfinished recovery record that this instance continues.
    pub(super) fn unfinished(&self) -> Option<u64> {
        match &self.beginning {
            Beginning::Adopted { recovery, .. } => recovery.as_ref().map(|record| record.id),
            _ => None,
        }
    }

    /// Returns the fate of recovery records that were under way.
    pub(super) fn fate(&self) -> &'static str {
        match &self.beginning {
            Beginning::NeedsRecovery { .. } => {
                "the daemon ended meanwhile; what was left to do is a recovery of its own"
            }
            Beginning::Adopted { .. } | Beginning::Morphing(_) => {
                "the daemon ended before anything was done; the instance was adopted as it ran"
            }
            Beginning::Spawned(_) | Beginning::Resting { .. } | Beginning::Terminating => {
                "the daemon ended meanwhile"
            }
        }
    }

    /// Returns whether the instance continues with the generation `row`.
    fn keeps(&self, row: &AnyGeneration) -> bool {
        let in_morph = match &self.beginning {
            Beginning::Morphing(left) => {
                [left.plan.source.generation, left.plan.target.generation].contains(&row.generation)
            }
            _ => false,
        };
        self.row.name == row.instance && (self.generation.generation == row.generation || in_morph)
    }
}

/// Determines the state of an instance after a restart: observations count, not intentions.
pub(super) async fn restore(
    services: &Services,
    snapshot: &Snapshot,
    row: InstanceRow,
) -> Restored {
    let of = |number: u64| {
        let mine = snapshot
            .generations
            .iter()
            .filter(|g| g.instance == row.name);
        mine.clone().find(|g| g.generation == number).cloned()
    };
    let in_journal = of(row.active_generation);
    let released = in_journal.is_none();
    // The generation was released before a successor was intended: nothing of it is left.
    let mut generation =
        in_journal.unwrap_or_else(|| gone_generation(services, &row, row.active_generation));
    retake(services, &generation);
    let ended = observe(services, &mut generation).await;
    adopt_ports(services, snapshot, &row).await;
    let beginning = match (&row.desired, ended) {
        // The self-test that used it has ended.
        _ if row.spec.throw_away => Beginning::Terminating,
        (Desired::Terminating, _) => Beginning::Terminating,
        (Desired::Recover, _) => left_recovery(snapshot, &row, ASKED_FOR.to_owned(), &generation),
        (Desired::Resting, ended) if !released => {
            let how = ended.unwrap_or_else(|| "its end had been decided".to_owned());
            left_recovery(snapshot, &row, how, &generation)
        }
        (Desired::Unhealed | Desired::Resting | Desired::OperatorAction, ended) => {
            Beginning::Resting {
                gone: ended.is_some() && !may_run(services, &generation).await,
            }
        }
        (Desired::Running, ended) => {
            match left_morph(services, snapshot, &row, ended.is_none(), &of).await {
                Some(left) => Beginning::Morphing(Box::new(left)),
                None => match ended {
                    None => {
                        let recovery = unfinished(snapshot, &row);
                        let served = recovery.is_none() && !is_spawning(snapshot, &row);
                        Beginning::Adopted { recovery, served }
                    }
                    Some(how) => left_recovery(snapshot, &row, how, &generation),
                },
            }
        }
    };
    Restored {
        row,
        generation,
        beginning,
    }
}

/// Returns the recovery that started the running generation, if the last daemon ended before the generation was
/// healthy.
fn unfinished(snapshot: &Snapshot, row: &InstanceRow) -> Option<Box<RecoveryRecord>> {
    let mut records = snapshot.recoveries.iter().map(|r| &r.record);
    let record =
        records.rfind(|r| r.instance == row.name && r.outcome == RecoveryOutcome::Running)?;
    let succeeded = record.failed_generation < row.active_generation;
    succeeded.then(|| Box::new(record.clone()))
}

/// Returns whether the instance's spawn was under way when the last daemon ended, so that it was not healthy yet.
fn is_spawning(snapshot: &Snapshot, row: &InstanceRow) -> bool {
    snapshot.operations.iter().any(|operation| {
        let spawn = operation.kind == OperationKind::Spawn && operation.instance == row.name;
        spawn && operation.state == OperationState::Running
    })
}

/// Returns the recovery that an instance needs: the remainder of one that was under way when the last daemon ended,
/// or a new one with the cause `how`.
fn left_recovery(
    snapshot: &Snapshot,
    row: &InstanceRow,
    how: String,
    generation: &AnyGeneration,
) -> Beginning {
    let begun = snapshot.recoveries.iter().map(|r| &r.record).rfind(|r| {
        let same = r.instance == row.name && r.failed_generation == generation.generation;
        // After a workload restart by its agent, a generation is recorded as its own successor.
        same && r.new_generation.is_none()
    });
    let known = |name: &str| {
        FailureCause::ALL
            .iter()
            .find(|c| c.as_str() == name)
            .copied()
    };
    // The policy captures a kernel's memory only for certain causes.
    let found = begun.and_then(|record| known(&record.cause));
    let never_ran = matches!(generation, AnyGeneration::Intended(_)) && !generation.ending;
    let (cause, decided) = match row.desired {
        Desired::Recover => (Some(FailureCause::Operator), Some(Successor::Asked)),
        Desired::Resting => (found, Some(Successor::None)),
        // A generation that never ran has not failed.
        _ if never_ran => (found, Some(Successor::ByPolicy)),
        _ => (found, None),
    };
    let decided_before = row
        .reason
        .clone()
        .filter(|_| row.desired == Desired::Resting);
    Beginning::NeedsRecovery {
        failure: Failure {
            // An earlier decision keeps its evidence: a restart adds none.
            evidence: vec![decided_before.unwrap_or(how)],
            cause: cause.unwrap_or(FailureCause::KernelDead),
        },
        decided,
    }
}

/// Returns the morph that the last daemon left. `runs` is true if the active generation runs.
async fn left_morph(
    services: &Services,
    snapshot: &Snapshot,
    row: &InstanceRow,
    runs: bool,
    of: &impl Fn(u64) -> Option<AnyGeneration>,
) -> Option<LeftMorph> {
    let morphs = snapshot.morphs.iter();
    let mine = morphs.filter(|morph| morph.status.instance == row.name);
    let newest = mine.clone().map(|morph| morph.status.session).max();
    let morph = mine.rev().find(|morph| {
        // A morph without a written end is over anyway if the instance is another generation by now.
        let owner = match morph.committed {
            true => morph.status.to_generation,
            false => morph.status.from_generation,
        };
        // The agents know nothing of a session that another one followed.
        let runs = runs && newest == Some(morph.status.session);
        owner == row.active_generation && morph.is_left(runs)
    })?;
    // A side that is no longer in the journal was fenced and released: nothing of it is left, and its fence is
    // confirmed at once.
    let side = |number| of(number).unwrap_or_else(|| gone_generation(services, row, number));
    let mut source = side(morph.status.from_generation);
    let mut target = side(morph.status.to_generation);
    retake(services, &source);
    retake(services, &target);
    let deaths = Deaths {
        source: observe(services, &mut source).await,
        target: observe(services, &mut target).await,
    };
    let plan = MorphPlan {
        instance: row.clone(),
        source,
        target,
        session: morph.status.session,
        kernel: morph.kernel.clone(),
        auto_validate: true,
        auto_commit: false,
        force: false,
        budget: Duration::from_micros(morph.status.downtime_budget_us),
        phase_timeout: row.policy.morph_timeout(),
        expiry: services.platform.settings.borrow().morph_expiry,
    };
    Some(LeftMorph {
        plan,
        row: morph.clone(),
        deaths,
    })
}

/// Returns a generation without any remainder in the journal or on the machine.
fn gone_generation(services: &Services, row: &InstanceRow, generation: u64) -> AnyGeneration {
    let run_dir = services
        .platform
        .settings
        .borrow()
        .run_dir
        .join("instances")
        .join(&row.name);
    let facts = Facts {
        instance: row.name.clone(),
        generation,
        kernel: row.spec.kernel.clone(),
        cid: 0,
        cpus: Vec::new(),
        memory_bytes: 0,
        run_dir: run_dir.join(generation.to_string()),
        spawned_at: row.created_at.clone(),
        frozen: false,
        boot_id: None,
        ending: true,
    };
    Generation::intended(facts).into()
}

fn retake(services: &Services, generation: &Facts) {
    let lease = crate::resources::pool::Lease {
        cpus: generation.cpus.clone(),
        memory_bytes: generation.memory_bytes,
    };
    let holder = (generation.instance.clone(), generation.generation);
    let mut numbers = services.generations.resources.numbers.borrow_mut();
    numbers.cids.insert(generation.cid, holder.clone());
    services
        .generations
        .resources
        .pool
        .borrow_mut()
        .retake(holder, lease);
}

/// Fills in the placement if the journal has none. `Some` says how the generation ended.
async fn observe(services: &Services, generation: &mut AnyGeneration) -> Option<String> {
    if generation.ending || generation.certificate().is_some() {
        return Some("its end had been decided".to_owned());
    }
    if let AnyGeneration::Intended(_) = generation {
        let found = services.generations.find(generation).await.ok().flatten();
        *generation = generation.clone().found(found);
    }
    let Some(placement) = generation.placement().cloned() else {
        return Some("it was never started".to_owned());
    };
    if placement.host_boot_id != services.generations.machine.host_boot_id {
        return Some("the host was rebooted".to_owned());
    }
    if generation.frozen {
        // The last daemon ended during a capture of its memory. If the resume fails, the watch finds the instance
        // silent.
        let _ = services.generations.thaw(generation).await;
    }
    let observed = services.backend().observe(&placement);
    match observed.await {
        Ok(Observation::Ended(cause)) => Some(format!("{cause} while no daemon watched")),
        Ok(_) => None,
        Err(error) => {
            warn!(services.platform.log, "it could not be observed"; "instance" => &generation.instance,
                "generation" => generation.generation, "error" => %error);
            None
        }
    }
}

/// Returns whether an ending generation may still run because its fence was not confirmed.
async fn may_run(services: &Services, generation: &AnyGeneration) -> bool {
    let AnyGeneration::Placed(placed) = generation else {
        return false;
    };
    let placement = placed.placement();
    if placement.host_boot_id != services.generations.machine.host_boot_id {
        return false;
    }
    let observed = services.backend().observe(placement).await;
    !matches!(observed, Ok(Observation::Ended(_)))
}

/// Takes the published sockets of an instance back. Any running generation may hold them, including one that is about
/// to be fenced. The instance keeps retrying the missing ports.
async fn adopt_ports(services: &Services, snapshot: &Snapshot, row: &InstanceRow) {
    services
        .ports()
        .publisher
        .borrow_mut()
        .expect(&row.name, &row.spec.publish);
    let generations = snapshot.generations.iter();
    let holders: Vec<_> = generations
        .filter(|g| g.instance == row.name)
        .cloned()
        .collect();
    // Missing ports are already logged and reported.
    let _ = services
        .ports()
        .regain(&row.name, row.active_generation, &holders)
        .await;
}

/// Fences orphaned generations: leftovers of a spawn or of a step that the last daemon did not finish.
pub(super) async fn sweep_leftovers(
    services: &Services,
    snapshot: &Snapshot,
    restored: &[Restored],
) {
    for generation in &snapshot.generations {
        let wanted = restored.iter().any(|r| r.keeps(generation));
        if wanted {
            continue;
        }
        retake(services, generation);
        if let AnyGeneration::Fenced(fenced) = generation {
            // Retry at once; the daemon answers requests in the meantime.
            let reason = "its release was not finished before the daemon ended";
            services.generations.keep(fenced.clone(), reason);
            continue;
        }
        services.generations.end_unowned(generation.clone()).await;
    }
}

/// Removes the records of generations of which nothing is left.
pub(super) async fn tidy(services: &Services) {
    let run_dir = services.platform.settings.borrow().run_dir.clone();
    let backend = std::sync::Arc::clone(services.backend());
    match backend.tidy(&run_dir.join("instances")).await {
        Ok(done) => {
            for line in done {
                info!(services.platform.log, "{}", line);
            }
        }
        Err(error) => {
            warn!(services.platform.log, "records of earlier generations stay"; "error" => %error)
        }
    }
}
