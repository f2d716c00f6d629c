//! What the supervisor is asked and told.

use crate::model::requests::SpawnRequest;
use crate::model::shown::{DaemonView, InstanceSummary};
use crate::model::{Failure, RecoveryRecord};
use actix::prelude::*;

use crate::instance::Instance;
use crate::model::settings::Settings;

/// An instance by its name.
#[derive(Debug, Message)]
#[rtype(result = "Result<Addr<Instance>, Failure>")]
pub struct Find(pub String);

/// An instance by its name, for work that a daemon about to stop would not finish: refused while it stops.
#[derive(Debug, Message)]
#[rtype(result = "Result<Addr<Instance>, Failure>")]
pub struct FindForNewWork(pub String);

/// Refuses a name of which nothing is known: no instance has it, and none ever had.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), Failure>")]
pub struct Know(pub String);

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
#[rtype(result = "Result<String, Failure>")]
pub struct Spawn {
    /// What is asked for.
    pub request: SpawnRequest,
    /// The caller.
    pub uid: Option<u32>,
    /// See [`InstanceSpec::throw_away`](crate::model::rows::InstanceSpec::throw_away).
    pub throw_away: bool,
}

/// The daemon's status.
#[derive(Debug, Message)]
#[rtype(result = "DaemonView")]
pub struct GetDaemon;

/// The recoveries kept.
#[derive(Debug, Message)]
#[rtype(result = "Vec<RecoveryRecord>")]
pub struct GetRecoveries;

/// New settings, already checked.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct ApplySettings(pub Box<Settings>);

/// No new work from now on.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Stopping;
