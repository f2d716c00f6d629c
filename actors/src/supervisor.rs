//! The Supervisor actor: the tree of instances, the admission of recoveries, spawning.
//!
//! An Instance actor that panics takes nothing with it but itself: its instance runs on. The
//! supervisor sees its address close, counts it, and makes a new one from the journal, the same way a
//! restarted daemon does.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::join_all;
use kmorph_backends::contract::Observation;
use kmorph_control_api::{
    ApiError, DaemonStatus, ErrorCode, InstanceSummary, MorphRequest, OperationKind, Policy,
    RecoveryRecord, SpawnRequest,
};
use kmorph_launch::{InstanceName, StartMode};
use kmp_proto::message::TopologyEntry;
use slog::{error, info, warn};

use crate::events::Draft;
use crate::generation::read_kernel;
use crate::instance::{
    Beginning, GetSummary, Instance, Morph, PlanMorph, RecoveryGranted, ResumeMorph,
};
use crate::journal::{
    Change, Desired, GenerationPhase, GenerationRow, InstanceRow, InstanceSpec, KernelChoice,
    MorphRow, Snapshot, record,
};
use crate::morph::{DOWNTIME_BUDGET_US, MorphPlan};
use crate::operations::Handle;
use crate::services::Services;
use crate::settings::Settings;
use crate::wall_clock;

/// Instances of one daemon.
pub const INSTANCES_MAX: usize = 4096;
/// Smallest memory of an instance, bytes.
pub const MEMORY_MIN_BYTES: u64 = 16 << 20;
/// How often closed actors are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);

/// The actor.
pub struct Supervisor {
    services: Services,
    instances: BTreeMap<String, Entry>,
    recoveries: Vec<RecoveryRecord>,
    waiting: VecDeque<String>,
    recovering: Vec<String>,
    snapshot: Option<Snapshot>,
    started_at: String,
    backend_detail: String,
    actor_restarts: u64,
    stopping: bool,
}

struct Entry {
    /// `None` while the spawn is being prepared: the name is taken.
    address: Option<Addr<Instance>>,
}

/// Recoveries shown by the API, newest last.
const RECOVERIES_SHOWN: usize = 1000;

/// An instance by its name.
#[derive(Debug, Message)]
#[rtype(result = "Result<Addr<Instance>, ApiError>")]
pub struct Find(pub String);

/// All instances.
#[derive(Debug, Message)]
#[rtype(result = "Vec<InstanceSummary>")]
pub struct List;

/// All instances' names and addresses.
#[derive(Debug, Message)]
#[rtype(result = "Vec<(String, Addr<Instance>)>")]
pub struct Addresses;

/// Spawn an instance; the operation's id.
#[derive(Debug, Message)]
#[rtype(result = "Result<String, ApiError>")]
pub struct Spawn {
    /// What is asked for.
    pub request: SpawnRequest,
    /// The caller.
    pub uid: Option<u32>,
}

/// Morph an instance; the operation's id.
#[derive(Debug, Message)]
#[rtype(result = "Result<String, ApiError>")]
pub struct BeginMorph {
    /// Which.
    pub name: String,
    /// How.
    pub request: MorphRequest,
    /// The caller.
    pub uid: Option<u32>,
}

/// An instance wants to be recovered.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct RequestRecovery(pub String);

/// Its recovery is over, or not needed any more.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct RecoveryDone(pub String);

/// An instance has been terminated.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct InstanceGone(pub String);

/// What survivors are told of all instances.
#[derive(Debug, Message)]
#[rtype(result = "Vec<TopologyEntry>")]
pub struct GetTopology;

/// One instance's part of it.
#[derive(Debug, Message)]
#[rtype(result = "Option<TopologyEntry>")]
pub struct GetTopologyEntry;

/// The daemon's status.
#[derive(Debug, Message)]
#[rtype(result = "DaemonStatus")]
pub struct GetDaemon;

/// The recoveries kept.
#[derive(Debug, Message)]
#[rtype(result = "Vec<RecoveryRecord>")]
pub struct GetRecoveries;

/// New settings, already checked; the keys that are now in force.
#[derive(Debug, Message)]
#[rtype(result = "Vec<String>")]
pub struct ApplySettings(pub Box<Settings>);

/// No new work from now on.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Stopping;

impl Supervisor {
    /// An actor that first restores what `snapshot` holds.
    pub fn new(services: Services, snapshot: Snapshot, backend_detail: String) -> Self {
        let recoveries = snapshot
            .recoveries
            .iter()
            .map(|r| r.record.clone())
            .collect();
        Self {
            services,
            instances: BTreeMap::new(),
            recoveries,
            waiting: VecDeque::new(),
            recovering: Vec::new(),
            snapshot: Some(snapshot),
            started_at: wall_clock::now_rfc3339(),
            backend_detail,
            actor_restarts: 0,
            stopping: false,
        }
    }

    fn adopt(
        &mut self,
        row: InstanceRow,
        generation: GenerationRow,
        beginning: Beginning,
        ctx: &mut Context<Self>,
    ) -> Addr<Instance> {
        let (services, own) = (self.services.clone(), ctx.address());
        let name = row.name.clone();
        let address = Instance::begin(services, own, row, generation, beginning);
        self.instances.insert(
            name,
            Entry {
                address: Some(address.clone()),
            },
        );
        address
    }

    fn refuse_while_stopping(&self) -> Result<(), ApiError> {
        if self.stopping {
            let text = "the daemon is stopping and takes no new work";
            return Err(ApiError::new(ErrorCode::Busy, text).hint("start it again first"));
        }
        Ok(())
    }

    fn grant(&mut self) {
        let most = self.services.settings.borrow().recoveries_max;
        while self.recovering.len() < most {
            let Some(name) = self.waiting.pop_front() else {
                return;
            };
            if let Some(address) = self.instances.get(&name).and_then(|e| e.address.clone()) {
                self.recovering.push(name);
                address.do_send(RecoveryGranted);
            }
        }
    }

    /// Replaces Instance actors that have panicked.
    fn sweep(&mut self, ctx: &mut Context<Self>) {
        let dead: Vec<String> = self
            .instances
            .iter()
            .filter(|(_, e)| e.address.as_ref().is_some_and(|a| !a.connected()))
            .map(|(name, _)| name.clone())
            .collect();
        for name in dead {
            self.instances.remove(&name);
            self.recovering.retain(|n| *n != name);
            self.actor_restarts += 1;
            error!(self.services.log, "its actor panicked and is replaced"; "instance" => &name);
            self.services
                .events
                .publish(Draft::daemon(format!("the actor of {name} was replaced")));
            self.restore_one(name, ctx);
        }
        self.grant();
    }

    fn restore_one(&mut self, name: String, ctx: &mut Context<Self>) {
        self.instances.insert(name.clone(), Entry { address: None });
        let services = self.services.clone();
        let load = services.journal.send(crate::journal::Load);
        let work = async move {
            let snapshot = load.await.ok()?.ok()?;
            let row = snapshot.instances.iter().find(|i| i.name == name)?.clone();
            Some(restore(&services, &snapshot, row).await)
        };
        ctx.spawn(work.into_actor(self).map(|restored, act, ctx| {
            if let Some(restored) = restored {
                act.begin_restored(restored, ctx);
            }
        }));
    }

    fn begin_restored(&mut self, restored: Restored, ctx: &mut Context<Self>) {
        let address = self.adopt(restored.row, restored.generation, restored.beginning, ctx);
        if let Some((plan, row)) = restored.morph {
            address.do_send(ResumeMorph { plan, row });
        }
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(65_536);
        ctx.run_interval(SWEEP_INTERVAL, Self::sweep);
        let Some(snapshot) = self.snapshot.take() else {
            return;
        };
        let services = self.services.clone();
        let work = async move {
            let rows = snapshot.instances.clone();
            let all = rows
                .into_iter()
                .map(|row| restore(&services, &snapshot, row));
            let restored = join_all(all).await;
            sweep_leftovers(&services, &snapshot, &restored).await;
            restored
        };
        // Nothing else is handled until everything is restored.
        ctx.wait(work.into_actor(self).map(|all, act, ctx| {
            let count = all.len();
            for restored in all {
                act.begin_restored(restored, ctx);
            }
            act.services.operations.fail_orphans(&[]);
            info!(act.services.log, "restored"; "instances" => count);
        }));
    }
}

/// An instance as found after a restart.
struct Restored {
    row: InstanceRow,
    generation: GenerationRow,
    beginning: Beginning,
    morph: Option<(MorphPlan, MorphRow)>,
}

/// Finds out what exists of an instance: what was observed counts, not what was intended.
async fn restore(services: &Services, snapshot: &Snapshot, row: InstanceRow) -> Restored {
    let of = |number: u64| {
        let mine = snapshot
            .generations
            .iter()
            .filter(|g| g.instance == row.name);
        mine.clone().find(|g| g.generation == number).cloned()
    };
    let mut generation = match of(row.active_generation) {
        Some(generation) => generation,
        // Released before a successor was intended: nothing of it is left.
        None => gone_generation(services, &row, row.active_generation),
    };
    retake(services, &generation);
    let ended = observe(services, &mut generation).await;
    adopt_ports(services, &row, &generation, ended.is_none()).await;
    let beginning = match (&row.desired, ended) {
        (Desired::Resting | Desired::OperatorAction, _) => Beginning::Resting,
        (_, None) => Beginning::Adopted,
        (_, Some(how)) => Beginning::NeedsRecovery {
            evidence: vec![how],
        },
    };
    let morph = snapshot
        .morphs
        .iter()
        .rfind(|m| m.status.instance == row.name && m.phase != "done");
    let morph = match morph {
        Some(morph) => resume_plan(services, &row, morph, &of).await,
        None => None,
    };
    Restored {
        row,
        generation,
        beginning,
        morph,
    }
}

async fn resume_plan(
    services: &Services,
    row: &InstanceRow,
    morph: &MorphRow,
    of: &impl Fn(u64) -> Option<GenerationRow>,
) -> Option<(MorphPlan, MorphRow)> {
    // A side that is not in the journal any more was fenced and released: what is left of it is
    // nothing, and fencing nothing is confirmed at once.
    let side = |number| of(number).unwrap_or_else(|| gone_generation(services, row, number));
    let mut old = side(morph.status.from_generation);
    let mut new = side(morph.status.to_generation);
    for generation in [&mut old, &mut new] {
        retake(services, generation);
        let _ = observe(services, generation).await;
    }
    let plan = MorphPlan {
        instance: row.clone(),
        old,
        new,
        session: morph.status.session,
        kernel: morph.kernel.clone(),
        auto_validate: true,
        auto_commit: false,
        force: false,
        budget: Duration::from_micros(morph.status.downtime_budget_us),
        phase_timeout: seconds(row.policy.morph_timeout_s),
    };
    Some((plan, morph.clone()))
}

/// A generation of which neither journal nor machine has anything left.
fn gone_generation(services: &Services, row: &InstanceRow, generation: u64) -> GenerationRow {
    let run_dir = services
        .settings
        .borrow()
        .run_dir
        .join("instances")
        .join(&row.name);
    GenerationRow {
        instance: row.name.clone(),
        generation,
        phase: GenerationPhase::Fencing,
        kernel: row.spec.kernel.clone(),
        cid: 0,
        cpus: Vec::new(),
        memory_bytes: 0,
        run_dir: run_dir.join(generation.to_string()),
        placement: None,
        certificate: None,
        spawned_at: row.created_at.clone(),
    }
}

fn retake(services: &Services, generation: &GenerationRow) {
    let lease = crate::pool::Lease {
        cpus: generation.cpus.clone(),
        memory_bytes: generation.memory_bytes,
    };
    let holder = (generation.instance.clone(), generation.generation);
    services.pool.borrow_mut().retake(holder, lease);
    services.numbers.borrow_mut().cids.insert(generation.cid);
}

/// Fills in the placement if the journal has none; `Some` says how it ended.
async fn observe(services: &Services, generation: &mut GenerationRow) -> Option<String> {
    if generation.phase >= GenerationPhase::Fencing {
        return Some("its end had been decided".to_owned());
    }
    if generation.placement.is_none() {
        let name: InstanceName = generation.instance.parse().ok()?;
        let found = services
            .backend
            .find(&name, generation.generation, &generation.run_dir)
            .await;
        generation.placement = found.ok().flatten();
    }
    let Some(placement) = &generation.placement else {
        return Some("it was never started".to_owned());
    };
    if placement.host_boot_id != services.host_boot_id {
        return Some("the host was rebooted".to_owned());
    }
    match services.backend.observe(placement).await {
        Ok(Observation::Ended(cause)) => Some(format!("{cause} while no daemon watched")),
        Ok(_) => None,
        Err(error) => {
            warn!(services.log, "it could not be observed"; "instance" => &generation.instance,
                "error" => %error);
            None
        }
    }
}

/// Gets the published sockets back from a running agent, or binds them again.
async fn adopt_ports(
    services: &Services,
    row: &InstanceRow,
    generation: &GenerationRow,
    runs: bool,
) {
    let specs = row.spec.publish.clone();
    if specs.is_empty() {
        return;
    }
    if runs && services.backend.passes_sockets() {
        let path = generation
            .run_dir
            .join(kmorph_backends::contract::HANDOVER_SOCKET);
        let asked =
            tokio::task::spawn_blocking(move || kmorph_launch::handover::ask_listeners(&path));
        match asked.await {
            Ok(Ok(sockets)) if sockets.len() == specs.len() => {
                let sockets = specs.into_iter().zip(sockets).collect();
                services.publisher.borrow_mut().adopt(&row.name, sockets);
                return;
            }
            Ok(Err(error)) => warn!(services.log, "its sockets were not given back";
                "instance" => &row.name, "error" => %error),
            _ => {}
        }
    }
    let bound = services.publisher.borrow_mut().rebind(&row.name, &specs);
    if let Err(error) = bound.and_then(|()| services.forward(&row.name)) {
        warn!(services.log, "a published port could not be bound again"; "instance" => &row.name,
            "error" => %error);
    }
}

/// Fences generations that belong to nothing any more: a spawn or a step that the last daemon did not
/// finish.
async fn sweep_leftovers(services: &Services, snapshot: &Snapshot, restored: &[Restored]) {
    for row in &snapshot.generations {
        let wanted = restored.iter().any(|r| {
            let in_morph = r.morph.as_ref().is_some_and(|(plan, _)| {
                [plan.old.generation, plan.new.generation].contains(&row.generation)
            });
            r.row.name == row.instance && (r.generation.generation == row.generation || in_morph)
        });
        if wanted {
            continue;
        }
        let mut row = row.clone();
        let order = kmp_proto::fence::FenceOrder::new(row.generation);
        retake(services, &row);
        let result = match services.fence(&mut row, order).await {
            Ok(certificate) => services.release(&row, &certificate).await,
            Err(reason) => Err(reason),
        };
        match result {
            Ok(()) => info!(services.log, "a leftover generation was fenced";
                "instance" => &row.instance, "generation" => row.generation),
            Err(reason) => warn!(services.log, "a leftover generation keeps its resources";
                "instance" => &row.instance, "generation" => row.generation, "reason" => reason),
        }
    }
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::from_secs(60))
}

impl Handler<Find> for Supervisor {
    type Result = Result<Addr<Instance>, ApiError>;

    fn handle(&mut self, Find(name): Find, _: &mut Self::Context) -> Self::Result {
        match self.instances.get(&name) {
            Some(Entry {
                address: Some(address),
            }) => Ok(address.clone()),
            Some(Entry { address: None }) => {
                let text = format!("{name} is just being set up");
                Err(ApiError::new(ErrorCode::Busy, text).hint("try again in a moment"))
            }
            None => {
                let name: String = name.chars().take(80).collect();
                let text = format!("there is no instance {name:?}");
                Err(ApiError::new(ErrorCode::NotFound, text).hint("`kmorphctl list` shows all"))
            }
        }
    }
}

impl Handler<Addresses> for Supervisor {
    type Result = MessageResult<Addresses>;

    fn handle(&mut self, _: Addresses, _: &mut Self::Context) -> Self::Result {
        let all = self.instances.iter();
        MessageResult(
            all.filter_map(|(n, e)| Some((n.clone(), e.address.clone()?)))
                .collect(),
        )
    }
}

impl Handler<List> for Supervisor {
    type Result = ResponseFuture<Vec<InstanceSummary>>;

    fn handle(&mut self, _: List, _: &mut Self::Context) -> Self::Result {
        let all: Vec<_> = self
            .instances
            .values()
            .filter_map(|e| e.address.clone())
            .collect();
        Box::pin(async move {
            let asked = join_all(all.iter().map(|a| a.send(GetSummary))).await;
            asked.into_iter().filter_map(Result::ok).collect()
        })
    }
}

impl Handler<GetTopology> for Supervisor {
    type Result = ResponseFuture<Vec<TopologyEntry>>;

    fn handle(&mut self, _: GetTopology, _: &mut Self::Context) -> Self::Result {
        let all: Vec<_> = self
            .instances
            .values()
            .filter_map(|e| e.address.clone())
            .collect();
        Box::pin(async move {
            let asked = join_all(all.iter().map(|a| a.send(GetTopologyEntry))).await;
            asked
                .into_iter()
                .filter_map(|entry| entry.ok().flatten())
                .collect()
        })
    }
}

impl Handler<RequestRecovery> for Supervisor {
    type Result = ();

    fn handle(&mut self, RequestRecovery(name): RequestRecovery, _: &mut Self::Context) {
        if !self.waiting.contains(&name) {
            self.waiting.push_back(name);
        }
        self.grant();
    }
}

impl Handler<RecoveryDone> for Supervisor {
    type Result = ();

    fn handle(&mut self, RecoveryDone(name): RecoveryDone, _: &mut Self::Context) {
        self.recovering.retain(|n| *n != name);
        self.grant();
    }
}

/// A recovery to be shown.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct NoteRecovery(pub RecoveryRecord);

impl Handler<NoteRecovery> for Supervisor {
    type Result = ();

    fn handle(&mut self, NoteRecovery(record): NoteRecovery, _: &mut Self::Context) {
        self.recoveries.retain(|r| r.id != record.id);
        if self.recoveries.len() >= RECOVERIES_SHOWN {
            self.recoveries.remove(0);
        }
        self.recoveries.push(record);
    }
}

impl Handler<GetRecoveries> for Supervisor {
    type Result = MessageResult<GetRecoveries>;

    fn handle(&mut self, _: GetRecoveries, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.recoveries.clone())
    }
}

impl Handler<InstanceGone> for Supervisor {
    type Result = ();

    fn handle(&mut self, InstanceGone(name): InstanceGone, _: &mut Self::Context) {
        self.instances.remove(&name);
        self.waiting.retain(|n| *n != name);
        self.recovering.retain(|n| *n != name);
    }
}

impl Handler<Stopping> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: Stopping, _: &mut Self::Context) {
        self.stopping = true;
    }
}

impl Handler<GetDaemon> for Supervisor {
    type Result = MessageResult<GetDaemon>;

    fn handle(&mut self, _: GetDaemon, _: &mut Self::Context) -> Self::Result {
        let settings = self.services.settings.borrow();
        MessageResult(DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at: self.started_at.clone(),
            uptime_s: wall_clock::seconds_since(&self.started_at),
            backend: self.services.backend.kind().as_str().to_owned(),
            backend_detail: self.backend_detail.clone(),
            config_path: settings
                .config_path
                .as_ref()
                .map(|p| p.display().to_string()),
            state_dir: settings.state_dir.display().to_string(),
            run_dir: settings.run_dir.display().to_string(),
            instances: u32::try_from(self.instances.len()).unwrap_or(u32::MAX),
            operations_running: u32::try_from(self.services.operations.running())
                .unwrap_or(u32::MAX),
            pool: self.services.pool.borrow().usage(),
            journal_ok: self.services.journal.connected(),
            journal_error: None,
            actor_restarts: self.actor_restarts,
            self_lag_ms: 0,
            stopping: self.stopping,
        })
    }
}

impl Handler<ApplySettings> for Supervisor {
    type Result = MessageResult<ApplySettings>;

    fn handle(&mut self, ApplySettings(new): ApplySettings, _: &mut Self::Context) -> Self::Result {
        let mut changed = Vec::new();
        let mut old = self.services.settings.borrow_mut();
        let mut note = |key: &str, differs: bool| {
            if differs {
                changed.push(key.to_owned());
            }
        };
        note(
            "defaults.heartbeat_timeout_s, defaults.auto_heal, defaults.morph_timeout_s",
            old.default_policy != new.default_policy,
        );
        note(
            "defaults.memory_mib",
            old.default_memory_bytes != new.default_memory_bytes,
        );
        note(
            "limits.start_timeout_s",
            old.start_timeout != new.start_timeout,
        );
        note(
            "limits.stop_timeout_s",
            old.stop_timeout != new.stop_timeout,
        );
        note(
            "limits.recoveries",
            old.recoveries_max != new.recoveries_max,
        );
        let pool = (&old.pool_cpus, old.pool_cpus_shared, old.pool_memory_bytes)
            != (&new.pool_cpus, new.pool_cpus_shared, new.pool_memory_bytes);
        note("pool", pool);
        note("control.group", old.control_group != new.control_group);
        *old = *new;
        if pool {
            let (cpus, shared) = (old.pool_cpus.clone(), old.pool_cpus_shared);
            self.services
                .pool
                .borrow_mut()
                .resize(cpus, shared, old.pool_memory_bytes);
        }
        MessageResult(changed)
    }
}

impl Handler<Spawn> for Supervisor {
    type Result = ResponseActFuture<Self, Result<String, ApiError>>;

    fn handle(&mut self, spawn: Spawn, _: &mut Self::Context) -> Self::Result {
        let begun = self.begin_spawn(&spawn);
        let (services, request) = (self.services.clone(), spawn.request);
        let name = request.name.clone();
        let mine = begun.is_ok();
        let work = async move {
            let operation = begun?;
            let id = operation.id();
            match prepare_spawn(&services, &request, &operation).await {
                Ok((row, generation)) => Ok((id, row, generation, operation)),
                Err(error) => {
                    operation.fail(error.clone(), None);
                    Err(error)
                }
            }
        };
        Box::pin(
            work.into_actor(self)
                .map(move |result, act, ctx| match result {
                    Ok((id, row, generation, operation)) => {
                        act.start_spawned(row, generation, operation, ctx);
                        Ok(id)
                    }
                    Err(error) => {
                        if mine {
                            act.instances.remove(&name);
                            act.services.unpublish(&name);
                        }
                        Err(error)
                    }
                }),
        )
    }
}

impl Supervisor {
    /// What can be refused at once; takes the name.
    fn begin_spawn(&mut self, spawn: &Spawn) -> Result<Handle, ApiError> {
        self.refuse_while_stopping()?;
        let invalid = |text: String| ApiError::new(ErrorCode::InvalidRequest, text);
        let request = &spawn.request;
        let name: InstanceName = request.name.parse().map_err(|e| invalid(format!("{e}")))?;
        if self.instances.contains_key(name.as_str()) {
            let text = format!("there is an instance {name} already");
            return Err(ApiError::new(ErrorCode::AlreadyExists, text)
                .hint("choose another name, or terminate it first"));
        }
        if self.instances.len() >= INSTANCES_MAX {
            let text = format!("there are {INSTANCES_MAX} instances, the most one daemon takes");
            return Err(ApiError::new(ErrorCode::InsufficientResources, text));
        }
        if request.cpus == 0 {
            return Err(invalid("an instance needs at least one CPU".to_owned()));
        }
        if request
            .memory_bytes
            .is_some_and(|bytes| bytes < MEMORY_MIN_BYTES)
        {
            return Err(invalid(format!(
                "an instance needs at least {MEMORY_MIN_BYTES} bytes"
            )));
        }
        let services = &self.services;
        let handle = services
            .operations
            .begin(OperationKind::Spawn, name.as_str(), spawn.uid)?;
        self.instances
            .insert(request.name.clone(), Entry { address: None });
        Ok(handle)
    }

    /// Starts what was written down; the caller has its operation id already.
    fn start_spawned(
        &mut self,
        row: InstanceRow,
        generation: GenerationRow,
        operation: Handle,
        ctx: &mut Context<Self>,
    ) {
        let services = self.services.clone();
        let (name, instance) = (row.name.clone(), row.clone());
        let work = async move {
            operation.step("starting");
            let spawned = services
                .spawn(generation, &instance, StartMode::Fresh, None)
                .await;
            if spawned.is_err() {
                let gone = Change::InstanceGone(instance.name.clone());
                let _ = record(&services.journal, vec![gone]).await;
            }
            (spawned, operation)
        };
        ctx.spawn(
            work.into_actor(self)
                .map(move |(spawned, operation), act, ctx| match spawned {
                    Ok(generation) => {
                        act.adopt(row, generation, Beginning::Spawned(operation), ctx);
                    }
                    Err(error) => {
                        act.instances.remove(&name);
                        act.services.unpublish(&name);
                        operation.fail(error, None);
                    }
                }),
        );
    }
}

/// Checks the kernel, binds the ports, takes the lease, and writes it all down.
async fn prepare_spawn(
    services: &Services,
    request: &SpawnRequest,
    operation: &Handle,
) -> Result<(InstanceRow, GenerationRow), ApiError> {
    operation.step("reading the kernel image");
    let kernel = choose_kernel(
        &request.kernel,
        request.kernel_cmdline.clone(),
        request.initramfs.as_deref(),
    )
    .await?;
    let mut policy = services.settings.borrow().default_policy.clone();
    if let Some(timeout) = request.heartbeat_timeout_s {
        policy.heartbeat_timeout_s = timeout;
    }
    check_policy(&policy)?;
    let memory_bytes = request
        .memory_bytes
        .unwrap_or(services.settings.borrow().default_memory_bytes);
    let publish = services
        .publisher
        .borrow_mut()
        .bind(&request.name, &request.publish)?;
    services.forward(&request.name).map_err(|e| {
        let text = format!("forwarding the published ports of {}: {e}", request.name);
        ApiError::new(ErrorCode::Unavailable, text)
    })?;
    let mut row = InstanceRow {
        name: request.name.clone(),
        spec: InstanceSpec {
            kernel: kernel.clone(),
            cpus: request.cpus,
            memory_bytes,
            workload: request.workload.clone(),
            publish,
            monitor: request.monitor,
            backend: services.backend.kind(),
        },
        policy,
        desired: Desired::Running,
        reason: None,
        created_at: wall_clock::now_rfc3339(),
        active_generation: 0,
        recoveries: 0,
        morphs: 0,
    };
    let written = row.clone();
    let with_number = move |generation| {
        let row = InstanceRow {
            active_generation: generation,
            ..written
        };
        vec![Change::Instance(Box::new(row))]
    };
    let generation = services
        .intend(
            &request.name,
            &kernel,
            request.cpus,
            memory_bytes,
            with_number,
        )
        .await?;
    row.active_generation = generation.generation;
    Ok((row, generation))
}

fn check_policy(policy: &Policy) -> Result<(), ApiError> {
    match policy.fault() {
        Some((key, fault)) => Err(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("{key}: {fault}"),
        )),
        None => Ok(()),
    }
}

async fn choose_kernel(
    path: &str,
    cmdline: String,
    initramfs: Option<&str>,
) -> Result<KernelChoice, ApiError> {
    let path = std::path::PathBuf::from(path);
    if !path.is_absolute() {
        let text = format!("the kernel path {path:?} is not absolute");
        return Err(ApiError::new(ErrorCode::InvalidRequest, text));
    }
    let image = read_kernel(&path, None).await?;
    Ok(KernelChoice {
        path,
        release: image.release().to_owned(),
        sha256: image.sha256().to_owned(),
        cmdline,
        initramfs: initramfs.map(Into::into),
    })
}

impl Handler<BeginMorph> for Supervisor {
    type Result = ResponseFuture<Result<String, ApiError>>;

    fn handle(&mut self, begin: BeginMorph, ctx: &mut Self::Context) -> Self::Result {
        let found = self.refuse_while_stopping();
        let (services, own) = (self.services.clone(), ctx.address());
        Box::pin(async move {
            found?;
            let gone = |_| ApiError::new(ErrorCode::Busy, "its actor is being replaced");
            let instance = own.send(Find(begin.name.clone())).await.map_err(gone)??;
            let (row, old) = instance.send(PlanMorph).await.map_err(gone)??;
            let request = begin.request;
            let cmdline = request
                .kernel_cmdline
                .unwrap_or_else(|| old.kernel.cmdline.clone());
            let kernel =
                choose_kernel(&request.kernel, cmdline, request.initramfs.as_deref()).await?;
            let kind = if request.auto_validate {
                OperationKind::Morph
            } else {
                OperationKind::MorphPrepare
            };
            let (cpus, memory) = (row.spec.cpus, row.spec.memory_bytes);
            let new = services
                .intend(&row.name, &kernel, cpus, memory, |_| Vec::new())
                .await?;
            let operation = services.operations.begin(kind, &row.name, begin.uid)?;
            let id = operation.id();
            let micros = request.downtime_budget_us.unwrap_or(DOWNTIME_BUDGET_US);
            let plan = MorphPlan {
                session: services.numbers.borrow_mut().next_session(),
                phase_timeout: seconds(row.policy.morph_timeout_s),
                instance: row,
                old,
                new: new.clone(),
                kernel,
                auto_validate: request.auto_validate || request.auto_commit,
                auto_commit: request.auto_commit,
                force: request.force,
                budget: Duration::from_micros(u64::from(micros)),
            };
            let asked = instance
                .send(Morph {
                    plan: Box::new(plan),
                    operation,
                })
                .await;
            if let Err(error) = asked.map_err(gone).and_then(|begun| begun) {
                // Another morph was quicker: what was intended here was never started.
                let mut new = new;
                let order = kmp_proto::fence::FenceOrder::new(new.generation);
                if let Ok(certificate) = services.fence(&mut new, order).await {
                    let _ = services.release(&new, &certificate).await;
                }
                return Err(error);
            }
            Ok(id)
        })
    }
}
