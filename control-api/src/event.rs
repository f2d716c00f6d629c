//! The event stream.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The state of an instance changed.
    InstanceState,
    /// The detector changed its assessment: suspicion, relief, verdict.
    Detector,
    /// A step of a recovery.
    Recovery,
    /// A step of a morph.
    Morph,
    /// An operation started, advanced or ended.
    Operation,
    /// A policy changed.
    Policy,
    /// A published port was lost or regained.
    Ports,
    /// The CPUs and memory of an ended generation could not be released, or have been released.
    Resources,
    /// A step of a requested capture.
    Vmcore,
    /// The daemon itself: started, reloaded, journal problems, an actor replaced.
    Daemon,
    /// The client asked for events older than those kept; `detail.oldest` is the first one available.
    Gap,
}

/// One event. Ids only grow, also across restarts of the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Id of the event, as in the stream's `id:` line.
    pub id: u64,
    /// Time of the event.
    pub at: String,
    /// Kind of the event.
    pub kind: EventKind,
    /// The instance, if the event is about one.
    pub instance: Option<String>,
    /// Its generation.
    pub generation: Option<u64>,
    /// One line for people.
    pub message: String,
    /// Details for programs.
    #[schema(value_type = Object)]
    pub detail: serde_json::Value,
}
