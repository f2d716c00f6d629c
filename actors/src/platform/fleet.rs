//! Messages from the actors of one instance to the supervisor, which the actors do not know by type.

use crate::model::RecoveryRecord;
use actix::prelude::*;
use kmp_proto::message::RecoverCompleteFixed;

use crate::model::generation::AnyGeneration;

/// Recipients of the messages.
#[derive(Clone)]
pub struct Fleet {
    /// Receives the news.
    pub news: Recipient<FleetNews>,
    /// Knows the other instances.
    pub survivors: Recipient<GetSurvivors>,
}

/// News about an instance.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub enum FleetNews {
    /// An instance waits for its recovery to be admitted.
    RecoveryWanted(String),
    /// The recovery is over, or no longer needed.
    RecoveryReturned(String),
    /// An instance has been terminated.
    Gone(String),
    /// A recovery to show.
    Recovery(Box<RecoveryRecord>),
    /// The topology to report to survivors.
    Recovered(Recovered),
}

/// A recovery has ended.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// The result.
    pub fixed: RecoverCompleteFixed,
    /// The recovered instance.
    pub instance: String,
}

/// Requests the generations that serve and have no work under way, except those of one instance.
#[derive(Debug, Message)]
#[rtype(result = "Vec<AnyGeneration>")]
pub struct GetSurvivors(pub String);

/// Tells a job that its instance starts over: another job does the remaining work.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Abandon;
