//! What an instance's actor hands on to its jobs, to each what it uses.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use kmorph_backends::contract::Backend;

use crate::capture::Captures;
use crate::generation::Generations;
use crate::morph::{self, Downtimes};
use crate::platform::Platform;
use crate::recovery;
use crate::resources::ports::Ports;

/// What the supervisor and the instances' actors have. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Services {
    /// Journal, connections, events, operations, configuration.
    pub platform: Platform,
    /// Spawns, fences and releases generations.
    pub generations: Generations,
    /// Captures memory.
    pub captures: Captures,
    /// What commits take on this machine.
    pub downtimes: Rc<RefCell<Downtimes>>,
}

impl Services {
    /// The published ports.
    pub(crate) fn ports(&self) -> &Ports {
        &self.generations.resources.ports
    }

    /// Where generations run.
    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        &self.generations.machine.backend
    }

    /// What a morph uses.
    pub(crate) fn of_a_morph(&self) -> morph::Means {
        morph::Means {
            platform: self.platform.clone(),
            generations: self.generations.clone(),
            downtimes: Rc::clone(&self.downtimes),
        }
    }

    /// What a recovery uses.
    pub(crate) fn of_a_recovery(&self) -> recovery::Means {
        recovery::Means {
            platform: self.platform.clone(),
            generations: self.generations.clone(),
            captures: self.captures.clone(),
        }
    }
}
