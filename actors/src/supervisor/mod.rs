//! The Supervisor actor: the tree of instances, the admission of recoveries, spawning.
//!
//! An Instance actor that panics takes down only itself: its instance continues to run. The supervisor sees that its
//! address has closed, counts the panic, and creates a new actor from the journal, as a restarted daemon does.

mod admission;
mod daemon;
mod doctor;
mod lag;
mod messages;
mod policies;
mod restoring;
mod spawning;
mod telling;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::model::shown::InstanceSummary;
use crate::model::{Command, DoctorReport, Failure, FailureKind, RecoveryRecord};
use actix::prelude::*;
use futures_util::future::join_all;
use slog::{error, info, warn};

use crate::generation::release::RELEASE_RETRY;
use crate::instance::{Beginning, GetSummary, GetSurvivor, Instance};
use crate::model::generation::AnyGeneration;
use crate::model::rows::InstanceRow;
use crate::platform::clock;
use crate::platform::events::Draft;
use crate::platform::fleet::{Fleet, FleetNews, GetSurvivors};
use crate::platform::journal::{JournalError, Snapshot};
use crate::platform::wall_clock;
use crate::services::Services;
pub use doctor::BeginDoctor;
use lag::Lag;
pub use messages::{
    Addresses, ApplySettings, Find, FindForNewWork, GetDaemon, GetRecoveries, Know, List, Spawn,
    Stopping,
};
pub use policies::ChangePolicies;
use restoring::{Restored, restore, sweep_leftovers, tidy};
pub use spawning::{INSTANCES_MAX, MEMORY_MIN_BYTES};
use telling::Untold;
pub use telling::{TOPOLOGY_CALM, TOPOLOGY_DELAY_MAX};

/// Maximum number of requests in this actor's mailbox before the senders wait. Messages from instances and recoveries
/// (`do_send`) do not count. They are bounded: each instance sends a handful in its life, and there are at most
/// [`INSTANCES_MAX`].
const SUPERVISOR_MAILBOX: usize = 65_536;
/// Interval between checks for closed actors.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);
/// Pause before the restoration of an instance is retried.
const RESTORE_RETRY: Duration = Duration::from_secs(1);

/// The actor.
pub struct Supervisor {
    services: Services,
    instances: BTreeMap<String, Entry>,
    /// By id.
    recoveries: BTreeMap<u64, RecoveryRecord>,
    waiting: VecDeque<String>,
    recovering: Vec<String>,
    untold: Option<Untold>,
    snapshot: Option<Snapshot>,
    started_at: String,
    backend_detail: String,
    actor_restarts: u64,
    stopping: bool,
    /// True while a self-test runs.
    doctor_runs: bool,
    last_doctor: Option<DoctorReport>,
    lag: Lag,
    /// True while the releases of kept generations are retried.
    releasing: bool,
    /// Held while the daemon queries other holders of the pool.
    looks_besides: Arc<tokio::sync::Mutex<()>>,
    /// Held while a change of policies is under way.
    policy_turn: Arc<tokio::sync::Mutex<()>>,
}

struct Entry {
    /// `None` while the spawn is being prepared: the name is taken.
    address: Option<Addr<Instance>>,
}

impl Supervisor {
    /// Creates an actor that first restores the contents of `snapshot`.
    pub fn new(services: Services, snapshot: Snapshot, backend_detail: String) -> Self {
        let recoveries = snapshot
            .recoveries
            .iter()
            .map(|r| (r.record.id, r.record.clone()))
            .collect();
        Self {
            services,
            instances: BTreeMap::new(),
            recoveries,
            waiting: VecDeque::new(),
            recovering: Vec::new(),
            untold: None,
            last_doctor: snapshot.doctor.clone(),
            snapshot: Some(snapshot),
            started_at: wall_clock::now_rfc3339(),
            backend_detail,
            actor_restarts: 0,
            stopping: false,
            doctor_runs: false,
            lag: Lag::new(SWEEP_INTERVAL),
            releasing: false,
            looks_besides: Arc::default(),
            policy_turn: Arc::default(),
        }
    }

    fn adopt(
        &mut self,
        row: InstanceRow,
        generation: AnyGeneration,
        beginning: Beginning,
        ctx: &mut Context<Self>,
    ) -> Addr<Instance> {
        let services = self.services.clone();
        let fleet = Fleet {
            news: ctx.address().recipient(),
            survivors: ctx.address().recipient(),
        };
        let name = row.name.clone();
        let address = Instance::begin(services, fleet, row, generation, beginning);
        self.instances.insert(
            name,
            Entry {
                address: Some(address.clone()),
            },
        );
        address
    }

    fn refuse_while_stopping(&self) -> Result<(), Failure> {
        if self.stopping {
            let text = "the daemon is stopping and takes no new work";
            return Err(Failure::new(FailureKind::Busy, text).hint("start it again first"));
        }
        Ok(())
    }

    /// Replaces Instance actors that panicked.
    fn sweep(&mut self, ctx: &mut Context<Self>) {
        crate::platform::fault::point("supervisor");
        self.lag.fired(clock::now());
        self.replace_transport();
        let dead: Vec<String> = self
            .instances
            .iter()
            .filter(|(_, e)| e.address.as_ref().is_some_and(|a| !a.connected()))
            .map(|(name, _)| name.clone())
            .collect();
        for name in dead {
            self.instances.remove(&name);
            self.recovering.retain(|n| *n != name);
            self.waiting.retain(|n| *n != name);
            self.actor_restarts += 1;
            error!(self.services.platform.log, "its actor panicked and is replaced"; "instance" => &name,
                "generation" => self.newest_generation(&name));
            self.services
                .platform
                .events
                .publish(Draft::daemon(format!("the actor of {name} was replaced")));
            self.restore_one(name, ctx);
        }
        self.grant();
    }

    /// Returns the last generation number of `name`: once the actor is gone, only the supervisor knows it.
    fn newest_generation(&self, name: &str) -> Option<u64> {
        let numbers = self.services.generations.resources.numbers.borrow();
        numbers.generations.get(name).copied()
    }

    /// Replaces a Transport that panicked; the watches attach to the new one with their next probe.
    fn replace_transport(&mut self) {
        if self
            .services
            .platform
            .transport
            .replace_if_gone(&self.services.platform.log)
        {
            self.actor_restarts += 1;
            error!(
                self.services.platform.log,
                "the transport actor panicked and is replaced"
            );
            let text = "the transport actor was replaced: connections are made again";
            self.services.platform.events.publish(Draft::daemon(text));
        }
    }

    /// Creates an actor for `name` from the journal, as soon as the journal can be read.
    fn restore_one(&mut self, name: String, ctx: &mut Context<Self>) {
        self.instances.insert(name.clone(), Entry { address: None });
        let services = self.services.clone();
        let load = services
            .platform
            .journal
            .send(crate::platform::journal::Load);
        let wanted = name.clone();
        let work = async move {
            let mut snapshot = load.await.unwrap_or(Err(JournalError::Gone))?;
            snapshot.generations.retain(|g| g.instance == wanted);
            let row = snapshot.instances.iter().find(|i| i.name == wanted);
            let restored = match row.cloned() {
                Some(row) => Some(restore(&services, &snapshot, row).await),
                None => None,
            };
            // Fence the leftovers of a job that ended with the instance's actor.
            sweep_leftovers(&services, &snapshot, restored.as_slice()).await;
            Ok(restored)
        };
        let then =
            move |restored: Result<_, JournalError>, act: &mut Self, ctx: &mut Context<_>| {
                match restored {
                    Ok(Some(restored)) => {
                        act.begin_restored(restored, "it ended by a fault in kmorphd", ctx);
                    }
                    // The instance was terminated in the meantime.
                    Ok(None) => {
                        act.instances.remove(&name);
                        act.give_up_recoveries(|r| r.instance == name, "it was terminated");
                    }
                    Err(error) => {
                        warn!(act.services.platform.log, "unwatched until the journal can be read";
                        "instance" => &name, "generation" => act.newest_generation(&name),
                        "error" => %error);
                        ctx.run_later(RESTORE_RETRY, |act, ctx| act.restore_one(name, ctx));
                    }
                }
            };
        ctx.spawn(work.into_actor(self).map(then));
    }

    /// Retries the release of kept generations.
    fn release_kept(&mut self, ctx: &mut Context<Self>) {
        if std::mem::replace(&mut self.releasing, true) {
            return;
        }
        let services = self.services.clone();
        let work = async move { services.generations.release_kept().await };
        ctx.spawn(
            work.into_actor(self)
                .map(|(), act, _| act.releasing = false),
        );
    }

    /// Starts the actor of a restored instance; ends its abandoned recoveries with the reason `why`.
    fn begin_restored(&mut self, restored: Restored, why: &str, ctx: &mut Context<Self>) {
        let (name, goes_on) = (restored.row.name.clone(), restored.unfinished());
        let given_up = |r: &RecoveryRecord| r.instance == name && Some(r.id) != goes_on;
        self.give_up_recoveries(given_up, why);
        self.adopt(restored.row, restored.generation, restored.beginning, ctx);
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(SUPERVISOR_MAILBOX);
        ctx.run_interval(SWEEP_INTERVAL, Self::sweep);
        ctx.run_interval(RELEASE_RETRY, Self::release_kept);
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
            tidy(&services).await;
            restored
        };
        // Handle no messages until everything is restored.
        ctx.wait(work.into_actor(self).map(|all, act, ctx| {
            let count = all.len();
            for restored in all {
                let why = restored.fate();
                act.begin_restored(restored, why, ctx);
            }
            act.services.platform.operations.fail_orphans();
            // Instances that no longer exist.
            let names: BTreeSet<String> = act.instances.keys().cloned().collect();
            act.give_up_recoveries(
                |r| !names.contains(&r.instance),
                "the daemon ended meanwhile",
            );
            act.drop_oldest_recoveries();
            info!(act.services.platform.log, "restored"; "instances" => count);
            act.release_kept(ctx);
        }));
    }
}

impl Handler<Find> for Supervisor {
    type Result = Result<Addr<Instance>, Failure>;

    fn handle(&mut self, Find(name): Find, _: &mut Self::Context) -> Self::Result {
        self.find(&name)
    }
}

impl Handler<FindForNewWork> for Supervisor {
    type Result = Result<Addr<Instance>, Failure>;

    fn handle(
        &mut self,
        FindForNewWork(name): FindForNewWork,
        _: &mut Self::Context,
    ) -> Self::Result {
        self.refuse_while_stopping()?;
        self.find(&name)
    }
}

impl Handler<Know> for Supervisor {
    type Result = Result<(), Failure>;

    fn handle(&mut self, Know(name): Know, _: &mut Self::Context) -> Self::Result {
        match self.newest_generation(&name) {
            Some(_) => Ok(()),
            None => self.find(&name).map(drop),
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

impl Supervisor {
    fn find(&self, name: &str) -> Result<Addr<Instance>, Failure> {
        match self.instances.get(name) {
            Some(Entry {
                address: Some(address),
            }) => Ok(address.clone()),
            Some(Entry { address: None }) => {
                let text = format!("{name} is just being set up");
                Err(Failure::new(FailureKind::Busy, text).hint("try again in a moment"))
            }
            None => {
                let name: String = name.chars().take(80).collect();
                let text = format!("there is no instance {name:?}");
                Err(Failure::new(FailureKind::NotFound, text).hint(Command::ListInstances))
            }
        }
    }

    /// Returns the instances that have an actor; a spawn that is still being prepared has none.
    fn running(&self) -> Vec<Addr<Instance>> {
        let entries = self.instances.values();
        entries.filter_map(|e| e.address.clone()).collect()
    }
}

impl Handler<List> for Supervisor {
    type Result = ResponseFuture<Vec<InstanceSummary>>;

    fn handle(&mut self, _: List, _: &mut Self::Context) -> Self::Result {
        let all = self.running();
        Box::pin(async move {
            let asked = join_all(all.iter().map(|a| a.send(GetSummary))).await;
            asked.into_iter().filter_map(Result::ok).collect()
        })
    }
}

impl Handler<GetSurvivors> for Supervisor {
    type Result = ResponseFuture<Vec<AnyGeneration>>;

    fn handle(&mut self, GetSurvivors(of): GetSurvivors, _: &mut Self::Context) -> Self::Result {
        let others = self.instances.iter().filter(|(name, _)| **name != of);
        let others: Vec<_> = others.filter_map(|(_, e)| e.address.clone()).collect();
        Box::pin(async move {
            let asked = join_all(others.iter().map(|a| a.send(GetSurvivor))).await;
            let survivors = asked.into_iter().filter_map(|row| row.ok().flatten());
            survivors.map(|row| *row).collect()
        })
    }
}

impl Handler<FleetNews> for Supervisor {
    type Result = ();

    fn handle(&mut self, news: FleetNews, ctx: &mut Self::Context) {
        match news {
            FleetNews::RecoveryWanted(name) => self.recovery_wanted(name),
            FleetNews::RecoveryReturned(name) => self.recovery_returned(&name),
            FleetNews::Gone(name) => {
                self.instances.remove(&name);
                self.waiting.retain(|n| *n != name);
                self.recovering.retain(|n| *n != name);
            }
            FleetNews::Recovery(record) => self.note_recovery(*record),
            FleetNews::Recovered(recovered) => self.tell_later(recovered, ctx),
        }
    }
}
