//! Schedules topology reports to survivors: one report covers all recoveries that end together.

use std::time::Duration;

use actix::prelude::*;
use futures_util::future::join_all;
use kmp_proto::message::{RecoverComplete, TopologyEntry};
use kmp_proto::time::Instant;

use super::Supervisor;
use crate::instance::GetTopologyEntry;
use crate::platform::clock;
use crate::platform::fleet::Recovered;
use crate::platform::transport::Topology;

/// Time without the end of a recovery after which survivors are told.
pub const TOPOLOGY_CALM: Duration = Duration::from_millis(100);
/// Maximum delay of a report after the end of a recovery.
pub const TOPOLOGY_DELAY_MAX: Duration = Duration::from_secs(2);

/// Ends of recoveries that were not reported to survivors yet.
pub(super) struct Untold {
    newest: Recovered,
    /// End of the first unreported recovery.
    since: Instant,
    timer: SpawnHandle,
}

impl Supervisor {
    /// Schedules a topology report after the end of a recovery.
    pub(super) fn tell_later(&mut self, newest: Recovered, ctx: &mut Context<Self>) {
        let now = clock::now();
        let earlier = self.untold.take();
        let since = earlier.as_ref().map_or(now, |untold| untold.since);
        if let Some(earlier) = earlier {
            ctx.cancel_future(earlier.timer);
        }
        let left = TOPOLOGY_DELAY_MAX.saturating_sub(now - since);
        let timer = ctx.run_later(left.min(TOPOLOGY_CALM), Self::tell_survivors);
        self.untold = Some(Untold {
            newest,
            since,
            timer,
        });
    }
}

impl Supervisor {
    fn tell_survivors(&mut self, ctx: &mut Context<Self>) {
        let Some(untold) = self.untold.take() else {
            return;
        };
        let Recovered { fixed, instance } = untold.newest;
        let all = self.running();
        let work = async move {
            let asked = join_all(all.iter().map(|a| a.send(GetTopologyEntry))).await;
            let entries = asked.into_iter().filter_map(|entry| entry.ok().flatten());
            entries.collect::<Vec<TopologyEntry>>()
        };
        ctx.spawn(work.into_actor(self).map(move |topology, act, _| {
            let told = RecoverComplete {
                fixed,
                instance,
                topology,
            };
            act.services
                .platform
                .transport
                .address()
                .do_send(Topology(told));
        }));
    }
}
