//! The published ports during an instance's life.
//!
//! ```text
//! serves: open ─▶ failed: connections wait ─ hold over ─▶ refused ─▶ a successor is started: open
//!                                        └─ it rests ──▶ refused
//! ```

use actix::prelude::*;
use kmp_proto::instance::Condition;

use super::Instance;
use crate::model::generation::AnyGeneration;
use crate::resources::ports::{PORT_RETRY, Regained};

impl Instance {
    /// Retries missing ports until the daemon has all of them.
    pub(super) fn regain_ports(&mut self, ctx: &mut Context<Self>) {
        if self.services.ports().missing(&self.row.name).is_none() {
            return;
        }
        ctx.run_later(PORT_RETRY, |act, ctx| {
            let (services, name) = (act.services.clone(), act.row.name.clone());
            let holder = [act.generation.clone()];
            let generation = act.generation.generation;
            let work = async move { services.ports().regain(&name, generation, &holder).await };
            ctx.spawn(
                work.into_actor(act)
                    .map(|regained, act, ctx| act.regained(regained, ctx)),
            );
        });
    }

    fn regained(&mut self, regained: Result<Regained, String>, ctx: &mut Context<Self>) {
        // If the process that held them has ended and the instance is not healed, no successor takes its place.
        let rests = matches!(
            self.engine.condition(),
            Condition::Failed | Condition::Quarantined
        );
        if rests && regained == Ok(Regained::Bound) {
            let ports = &self.services.ports();
            ports.refuse(&self.row.name);
        }
        self.regain_ports(ctx);
    }

    /// Holds connections for the successor after a failure, for a limited time.
    pub(super) fn hold_ports(&mut self, ctx: &mut Context<Self>) {
        self.services.ports().abandon(&self.row.name);
        let hold = self.services.platform.settings.borrow().port_hold;
        if let Some(earlier) = self.port_hold.take() {
            ctx.cancel_future(earlier);
        }
        self.port_hold = Some(ctx.run_later(hold, |act, _| {
            act.port_hold = None;
            if act.services.ports().is_abandoned(&act.row.name) {
                act.services.ports().refuse(&act.row.name);
            }
        }));
    }

    /// Makes the ports refuse connections, because the instance rests and no successor will answer. If a process of
    /// the instance may still serve and has the sockets itself, it keeps them.
    pub(super) fn close_unserved_ports(&mut self, ctx: &mut Context<Self>) {
        // The fence was not confirmed: the end of the hold must not cut off a process that may still serve.
        if self.engine.condition() == Condition::OperatorActionNeeded
            && let Some(hold) = self.port_hold.take()
        {
            ctx.cancel_future(hold);
        }
        let may_serve = self.services.backend().passes_sockets() && !self.is_gone();
        if !may_serve {
            self.services.ports().refuse(&self.row.name);
        }
    }

    /// Returns whether the generation is known not to run: fenced, never started, or seen to exit.
    pub(super) fn is_gone(&self) -> bool {
        self.gone || !matches!(self.generation, AnyGeneration::Placed(_))
    }
}
