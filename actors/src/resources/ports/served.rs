//! The published ports of all instances: held here, and served on the host where a generation cannot be passed its
//! sockets.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use kmorph_backends::contract::Backend;
use slog::Logger;

use super::Publisher;
use crate::model::generation::AnyGeneration;
use crate::model::shown::PortView;
use crate::platform::events::EventLog;
use crate::resources::forward::{Forwarder, Target};

/// The published ports. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Ports {
    /// The sockets.
    pub publisher: Rc<RefCell<Publisher>>,
    /// Serves them on the host.
    forwarder: Rc<RefCell<Forwarder>>,
    /// Passes generations their sockets, or does not.
    pub(super) backend: Arc<dyn Backend>,
    pub(super) log: Logger,
    pub(super) events: EventLog,
}

impl Ports {
    /// No port, of a machine with this backend.
    pub fn new(backend: Arc<dyn Backend>, log: Logger, events: EventLog) -> Self {
        Self {
            publisher: Rc::default(),
            forwarder: Rc::default(),
            backend,
            log,
            events,
        }
    }

    /// Has the published ports of `instance` served on the host, where the backend cannot be passed
    /// the sockets. To be called when the publisher holds them.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn forward(&self, instance: &str) -> std::io::Result<()> {
        if self.backend.passes_sockets() || self.forwarder.borrow().has(instance) {
            return Ok(());
        }
        let held = self.publisher.borrow_mut().duplicates(instance)?;
        let listeners = held
            .into_iter()
            .map(|listener| (listener.port.port, listener.socket.into()))
            .collect();
        self.forwarder
            .borrow_mut()
            .open(instance, listeners, &self.log)
    }

    /// Lets connections to the published ports of `instance` go to `generation`, or wait.
    pub fn aim(&self, instance: &str, generation: Option<&AnyGeneration>) {
        let target = generation.and_then(|row| {
            let placement = row.placement()?;
            Some(Target {
                generation: row.generation,
                endpoint: placement.endpoint.clone(),
            })
        });
        self.forwarder.borrow().aim(instance, target);
    }

    /// Has the published ports of `instance` refuse connections, until a generation is given them again.
    pub fn refuse(&self, instance: &str) {
        self.forwarder.borrow_mut().close(instance);
        self.publisher.borrow_mut().refuse(instance);
    }

    /// Gives the published ports of `instance` up.
    pub fn unpublish(&self, instance: &str) {
        self.forwarder.borrow_mut().close(instance);
        self.publisher.borrow_mut().close(instance);
    }

    /// See [`Publisher::missing`].
    pub fn missing(&self, instance: &str) -> Option<String> {
        self.publisher.borrow().missing(instance)
    }

    /// See [`Publisher::abandon`].
    pub fn abandon(&self, instance: &str) {
        self.publisher.borrow_mut().abandon(instance);
    }

    /// See [`Publisher::is_abandoned`].
    pub fn is_abandoned(&self, instance: &str) -> bool {
        self.publisher.borrow().is_abandoned(instance)
    }

    /// See [`Publisher::shown`].
    pub fn shown(&self, instance: &str) -> Vec<PortView> {
        self.publisher.borrow().shown(instance)
    }
}
