//! What the actors of one instance tell and ask the whole of them, without knowing who that is.

use crate::model::RecoveryRecord;
use actix::prelude::*;
use kmp_proto::message::RecoverCompleteFixed;

use crate::model::generation::AnyGeneration;

/// Where the actors of one instance turn to.
#[derive(Clone)]
pub struct Fleet {
    /// Hears of them.
    pub news: Recipient<FleetNews>,
    /// Knows the others.
    pub survivors: Recipient<GetSurvivors>,
}

/// What is told.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub enum FleetNews {
    /// An instance waits for its recovery to be admitted.
    RecoveryWanted(String),
    /// Its recovery is over, or not needed any more.
    RecoveryReturned(String),
    /// An instance has been terminated.
    Gone(String),
    /// A recovery to be shown.
    Recovery(Box<RecoveryRecord>),
    /// Survivors are to be told the topology.
    Recovered(Recovered),
}

/// A recovery has ended.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// How it ended.
    pub fixed: RecoverCompleteFixed,
    /// Whose it was.
    pub instance: String,
}

/// Generations that serve and are not in the middle of something, but for those of one instance.
#[derive(Debug, Message)]
#[rtype(result = "Vec<AnyGeneration>")]
pub struct GetSurvivors(pub String);

/// What an instance tells its job when the instance starts over: what the job would have done is done by another.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Abandon;
