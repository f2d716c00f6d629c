//! Changes of the journal, and its contents at the daemon's start.

use std::sync::Arc;

use crate::model::{DoctorReport, Event, Operation, Policy};

use crate::model::generation::AnyGeneration;
use crate::model::rows::{GenerationRow, InstanceRow, MorphRow, RecoveryRow};

/// The whole journal, as read at the daemon's start.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Number of daemon starts with this journal, including this one.
    pub incarnation: u64,
    /// Instances.
    pub instances: Vec<InstanceRow>,
    /// Generations not yet released.
    pub generations: Vec<AnyGeneration>,
    /// Last generation number used, by instance name; includes instances that no longer exist.
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

/// One change; a list of changes is one transaction.
#[derive(Clone, Debug)]
pub enum Change {
    /// Inserts an instance, or replaces all of it except its policy: the writer may know an older
    /// policy.
    Instance(Box<InstanceRow>),
    /// Changes the policy of an instance; does nothing if the instance no longer exists.
    Policy(String, Box<Policy>),
    /// Removes an instance. Its generation counter stays.
    InstanceGone(String),
    /// Inserts or replaces a generation, except its boot id, and advances the counter of its instance.
    Generation(Box<GenerationRow>),
    /// Sets the boot id of a generation's first HELLO; does nothing if the generation no longer exists.
    Booted(String, u64, [u8; 16]),
    /// Removes a released generation.
    GenerationGone(String, u64),
    /// Inserts or replaces a recovery.
    Recovery(Box<RecoveryRow>),
    /// Inserts or replaces a morph.
    Morph(Box<MorphRow>),
    /// Inserts or replaces the operation with this number, already encoded.
    Operation(u64, Arc<str>),
    /// Adds the event with this id, already encoded.
    Event(u64, Arc<str>),
    /// Replaces the stored result of the last self-test.
    Doctor(Box<DoctorReport>),
}
