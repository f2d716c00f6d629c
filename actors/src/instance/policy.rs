//! The policy of an instance. The supervisor records it (`supervisor/policies.rs`); this module applies it.

use crate::model::{EventKind, Policy};
use actix::prelude::*;
use kmp_proto::instance::Event;

use super::Instance;
use crate::watch::{Reconfigure, detector_config};

/// Reads the current policy.
#[derive(Debug, Message)]
#[rtype(result = "Policy")]
pub struct GetPolicy;

/// Applies a policy that is in the journal.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct ApplyPolicy(pub Policy);

impl Handler<GetPolicy> for Instance {
    type Result = MessageResult<GetPolicy>;

    fn handle(&mut self, _: GetPolicy, _: &mut Self::Context) -> Self::Result {
        crate::platform::fault::point("instance");
        MessageResult(self.row.policy.clone())
    }
}

impl Handler<ApplyPolicy> for Instance {
    type Result = ();

    fn handle(&mut self, ApplyPolicy(policy): ApplyPolicy, ctx: &mut Self::Context) {
        self.row.amend(|row| row.policy = policy.clone());
        let auto_heal = policy.auto_heal;
        self.tell(Event::Policy { auto_heal }, ctx);
        if let Some(watch) = &self.watch {
            let config = detector_config(&self.services.platform.settings.borrow(), &self.row);
            watch.do_send(Reconfigure(config));
        }
        let text = format!(
            "policy: heartbeat timeout {} s, auto-heal {}, morph timeout {} s, vmcore {}, stuck CPU {}",
            policy.heartbeat_timeout_s,
            policy.auto_heal,
            policy.morph_timeout_s,
            policy.vmcore.as_str(),
            policy.stuck_cpu.as_str()
        );
        self.say(EventKind::Policy, text);
    }
}
