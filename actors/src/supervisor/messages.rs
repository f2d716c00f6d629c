//! What the supervisor is asked and told.

use actix::prelude::*;
use kmorph_control_api::{
    ApiError, DaemonStatus, InstanceSummary, MorphRequest, RecoveryRecord, SpawnRequest,
};
use kmp_proto::message::TopologyEntry;

use crate::instance::Instance;
use crate::journal::GenerationRow;
use crate::settings::Settings;

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
    /// See [`InstanceSpec::throw_away`](crate::journal::InstanceSpec::throw_away).
    pub throw_away: bool,
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

/// An instance's part of what survivors are told of all of them.
#[derive(Debug, Message)]
#[rtype(result = "Option<TopologyEntry>")]
pub struct GetTopologyEntry;

/// Generations that serve and are not in the middle of something, but for those of one instance.
#[derive(Debug, Message)]
#[rtype(result = "Vec<GenerationRow>")]
pub struct GetSurvivors(pub String);

/// The instance's generation, if it is one of them.
#[derive(Debug, Message)]
#[rtype(result = "Option<Box<GenerationRow>>")]
pub struct GetSurvivor;

/// The daemon's status.
#[derive(Debug, Message)]
#[rtype(result = "DaemonStatus")]
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
