//! Services that all actors use: the journal, the connections, events, operations, clocks and threads.

pub mod ambient;
pub mod aside;
pub mod clock;
pub mod events;
pub mod fault;
pub mod fleet;
pub mod journal;
pub mod operations;
pub mod transport;
pub mod wall_clock;
pub mod witness;

use std::cell::RefCell;
use std::rc::Rc;

use actix::prelude::*;
use slog::{Logger, o};

use crate::model::settings::Settings;

/// Journal, connections, events, operations, configuration. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Platform {
    /// The log.
    pub log: Logger,
    /// The journal.
    pub journal: Addr<journal::Journal>,
    /// The connections.
    pub transport: transport::TransportHandle,
    /// The event stream.
    pub events: events::EventLog,
    /// Operations under way.
    pub operations: operations::Operations,
    /// The configuration in force.
    pub settings: Rc<RefCell<Settings>>,
}

impl Platform {
    /// Returns a clone for a morph: its log lines name the session.
    #[must_use]
    pub fn within(&self, session: u64) -> Self {
        Self {
            log: self.log.new(o!("session" => session)),
            ..self.clone()
        }
    }
}
