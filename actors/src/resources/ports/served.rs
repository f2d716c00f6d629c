//! The published ports of all instances. If a generation cannot inherit the sockets, the daemon forwards the ports on
//! the host.

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
    /// Forwards connections on the host.
    forwarder: Rc<RefCell<Forwarder>>,
    /// Determines whether generations inherit the sockets.
    pub(super) backend: Arc<dyn Backend>,
    pub(super) log: Logger,
    pub(super) events: EventLog,
}

impl Ports {
    /// Starts without ports, on a machine with this backend.
    pub fn new(backend: Arc<dyn Backend>, log: Logger, events: EventLog) -> Self {
        Self {
            publisher: Rc::default(),
            forwarder: Rc::default(),
            backend,
            log,
            events,
        }
    }

    /// Forwards the published ports of `instance` on the host if the backend cannot pass the sockets. Call this once
    /// the publisher holds them.
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

    /// Directs connections to the published ports of `instance` to `generation`; without one they wait.
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

    /// Makes the published ports of `instance` refuse connections until a generation receives them again.
    pub fn refuse(&self, instance: &str) {
        self.forwarder.borrow_mut().close(instance);
        self.publisher.borrow_mut().refuse(instance);
    }

    /// Closes the published ports of `instance`.
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
