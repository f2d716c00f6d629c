//! Events, as the journal keeps them.

use serde::{Deserialize, Serialize};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// An instance changed its state.
    InstanceState,
    /// The detector changed its mind: suspicion, relief, verdict.
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
    /// An ended generation could not give its CPUs and memory back, or has given them back.
    Resources,
    /// A step of a capture that was asked for.
    Vmcore,
    /// The daemon itself: started, reloaded, journal trouble, an actor replaced.
    Daemon,
    /// Events older than the stream keeps were asked for; `detail.oldest` is the first there is.
    Gap,
}

/// One event. Its id only grows, also across restarts of the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its id, the stream's `id:` line.
    pub id: u64,
    /// When.
    pub at: String,
    /// What.
    pub kind: EventKind,
    /// The instance concerned.
    pub instance: Option<String>,
    /// Its generation.
    pub generation: Option<u64>,
    /// One line for people.
    pub message: String,
    /// More, for programs.
    pub detail: serde_json::Value,
}
