//! What the journal is told to change, and what it is found to hold at the daemon's start.

use std::sync::Arc;

use crate::model::{DoctorReport, Event, Operation, Policy};

use crate::model::generation::AnyGeneration;
use crate::model::rows::{GenerationRow, InstanceRow, MorphRow, RecoveryRow};

/// Everything in the journal, as read at the daemon's start.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// How often a daemon has started with this journal, this time included.
    pub incarnation: u64,
    /// Instances.
    pub instances: Vec<InstanceRow>,
    /// Generations not yet released.
    pub generations: Vec<AnyGeneration>,
    /// Last generation number used, by instance name, also of instances that are gone.
    pub last_generation: std::collections::BTreeMap<String, u64>,
    /// Recoveries, oldest first.
    pub recoveries: Vec<RecoveryRow>,
    /// Morphs, oldest first.
    pub morphs: Vec<MorphRow>,
    /// Operations, oldest first.
    pub operations: Vec<Operation>,
    /// Newest events, oldest first.
    pub events: Vec<Event>,
    /// The last self-test.
    pub doctor: Option<DoctorReport>,
}

/// One change; a list of them is one transaction.
#[derive(Clone, Debug)]
pub enum Change {
    /// Inserts an instance, or replaces all of it but its policy: whoever writes what became of an
    /// instance may know an older policy.
    Instance(Box<InstanceRow>),
    /// Changes the policy of an instance; nothing when it is gone.
    Policy(String, Box<Policy>),
    /// Removes an instance. Its generation counter stays.
    InstanceGone(String),
    /// Inserts or replaces a generation, all of it but its boot id, and moves the counter of its instance.
    Generation(Box<GenerationRow>),
    /// The boot id of a generation's first HELLO; nothing when the generation is gone.
    Booted(String, u64, [u8; 16]),
    /// Removes a released generation.
    GenerationGone(String, u64),
    /// Inserts or replaces a recovery.
    Recovery(Box<RecoveryRow>),
    /// Inserts or replaces a morph.
    Morph(Box<MorphRow>),
    /// Inserts or replaces the operation of this number, which is encoded already.
    Operation(u64, Arc<str>),
    /// Adds the event with this id, which is encoded already.
    Event(u64, Arc<str>),
    /// Replaces what is remembered of the last self-test.
    Doctor(Box<DoctorReport>),
}
