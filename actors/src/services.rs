//! Services that an instance's actor passes to its jobs; each job gets only those that it uses.

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

/// Services of the supervisor and of the instances' actors. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Services {
    /// Journal, connections, events, operations, configuration.
    pub platform: Platform,
    /// Spawns, fences and releases generations.
    pub generations: Generations,
    /// Captures memory.
    pub captures: Captures,
    /// Learned overheads of commits on this machine.
    pub downtimes: Rc<RefCell<Downtimes>>,
}

impl Services {
    /// Returns the published ports.
    pub(crate) fn ports(&self) -> &Ports {
        &self.generations.resources.ports
    }

    /// Returns the backend that runs the generations.
    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        &self.generations.machine.backend
    }

    /// Returns the services for a morph.
    pub(crate) fn of_a_morph(&self) -> morph::Means {
        morph::Means {
            platform: self.platform.clone(),
            generations: self.generations.clone(),
            downtimes: Rc::clone(&self.downtimes),
        }
    }

    /// Returns the services for a recovery.
    pub(crate) fn of_a_recovery(&self) -> recovery::Means {
        recovery::Means {
            platform: self.platform.clone(),
            generations: self.generations.clone(),
            captures: self.captures.clone(),
        }
    }
}
