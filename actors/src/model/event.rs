//! Events, as stored in the journal.

use serde::{Deserialize, Serialize};

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// An instance changed its state.
    InstanceState,
    /// The failure detector changed state: suspicion, relief, verdict.
    Detector,
    /// A step of a recovery.
    Recovery,
    /// A step of a morph.
    Morph,
    /// An operation began, advanced or ended.
    Operation,
    /// A policy changed.
    Policy,
    /// A published port was lost or regained.
    Ports,
    /// An ended generation could not return its CPUs and memory, or has returned them.
    Resources,
    /// A step of a capture on request.
    Vmcore,
    /// The daemon itself: started, reloaded, journal error, an actor replaced.
    Daemon,
    /// A client asked for events that the stream no longer keeps; `detail.oldest` is the oldest that it has.
    Gap,
}

/// One event. Ids only grow, also across restarts of the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its id: the `id:` line of the stream.
    pub id: u64,
    /// When it happened.
    pub at: String,
    /// Its kind.
    pub kind: EventKind,
    /// The instance.
    pub instance: Option<String>,
    /// Its generation.
    pub generation: Option<u64>,
    /// One line for people.
    pub message: String,
    /// Details for programs.
    pub detail: serde_json::Value,
}
