//! Messages to the supervisor.

use crate::model::requests::SpawnRequest;
use crate::model::shown::{DaemonView, InstanceSummary};
use crate::model::{Failure, RecoveryRecord};
use actix::prelude::*;

use crate::instance::Instance;
use crate::model::settings::Settings;

/// Finds an instance by name.
#[derive(Debug, Message)]
#[rtype(result = "Result<Addr<Instance>, Failure>")]
pub struct Find(pub String);

/// Finds an instance by name, for new work; refused while the daemon stops, because the work would not finish.
#[derive(Debug, Message)]
#[rtype(result = "Result<Addr<Instance>, Failure>")]
pub struct FindForNewWork(pub String);

/// Refuses an unknown name: no instance has it or had it.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), Failure>")]
pub struct Know(pub String);

/// Lists all instances.
#[derive(Debug, Message)]
#[rtype(result = "Vec<InstanceSummary>")]
pub struct List;

/// Lists the names and addresses of all instances.
#[derive(Debug, Message)]
#[rtype(result = "Vec<(String, Addr<Instance>)>")]
pub struct Addresses;

/// Spawns an instance. Returns the operation's id.
#[derive(Debug, Message)]
#[rtype(result = "Result<String, Failure>")]
pub struct Spawn {
    /// The request.
    pub request: SpawnRequest,
    /// The caller.
    pub uid: Option<u32>,
    /// See [`InstanceSpec::throw_away`](crate::model::rows::InstanceSpec::throw_away).
    pub throw_away: bool,
}

/// Reads the daemon's status.
#[derive(Debug, Message)]
#[rtype(result = "DaemonView")]
pub struct GetDaemon;

/// Reads the stored recoveries.
#[derive(Debug, Message)]
#[rtype(result = "Vec<RecoveryRecord>")]
pub struct GetRecoveries;

/// Applies new settings that are already checked.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct ApplySettings(pub Box<Settings>);

/// Refuses new work from now on.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Stopping;
