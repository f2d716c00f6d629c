//! The status of an instance.

use std::collections::BTreeMap;
use std::time::Duration;

use actix::prelude::*;
use kmp_proto::message::TopologyEntry;

use super::Instance;
use super::requests::{
    GetHealth, GetHeartbeat, GetStatus, GetSummary, GetSurvivor, GetTopologyEntry,
};
use crate::model::shown::{HealthView, HeartbeatView, InstanceSummary, InstanceView};
use crate::platform::{clock, wall_clock};
use crate::watch::{GetFigures, WatchFigures};

impl Instance {
    pub(super) fn figures(&self) -> impl Future<Output = Option<WatchFigures>> + 'static + use<> {
        let watch = self.watch.clone();
        async move { watch?.send(GetFigures).await.ok() }
    }

    /// Returns the time since the last answer. For an instance that has failed and is no longer watched: time since
    /// it last was known to answer.
    fn since_answer(&self, figures: Option<&WatchFigures>) -> Option<Duration> {
        let now = figures.and_then(|f| f.since_answer);
        let before = || {
            let (failed, silence) = self.answered_until?;
            Some((clock::now() - failed).saturating_add(silence))
        };
        now.or_else(before)
    }

    fn summary(&self, figures: Option<&WatchFigures>) -> InstanceSummary {
        let release = figures
            .map(|f| f.kernel_release.clone())
            .filter(|r| !r.is_empty());
        // No kernel runs in a generation that is gone, and it has no uptime.
        let runs = !self.is_gone();
        let kernel_release = release.unwrap_or_else(|| self.kernel_release.clone());
        InstanceSummary {
            name: self.row.name.clone(),
            condition: self.engine.condition(),
            generation: self.generation.generation,
            kernel_release: if runs { kernel_release } else { String::new() },
            backend: self.row.spec.backend,
            cpus: self.generation.cpus.clone(),
            memory_bytes: self.generation.memory_bytes,
            since_answer: self.since_answer(figures),
            uptime_s: runs.then(|| wall_clock::seconds_since(&self.generation.spawned_at)),
            recoveries: self.row.recoveries,
            morphs: self.row.morphs,
            workload_failures: self.row.workload_failures,
            published: self.services.ports().shown(&self.row.name),
        }
    }

    fn status(&self, figures: Option<&WatchFigures>) -> InstanceView {
        let processes: BTreeMap<String, i32> = self
            .generation
            .placement()
            .iter()
            .filter(|_| !self.is_gone())
            .flat_map(|p| &p.processes)
            .map(|p| (p.role.clone(), p.pid))
            .collect();
        InstanceView {
            summary: self.summary(figures),
            reason: self.engine.reason().map(str::to_owned),
            kernel: self.generation.kernel.clone(),
            cid: self.generation.cid,
            processes,
            workload: self.row.spec.workload.clone(),
            workload_state: workload_state(figures),
            policy: self.row.policy.clone(),
            created_at: self.row.created_at.clone(),
            operation: self
                .waiting
                .as_ref()
                .map(crate::platform::operations::Handle::id),
            run_dir: self.generation.run_dir.clone(),
            kept: self.services.generations.kept.shown(Some(&self.row.name)),
        }
    }
}

fn workload_state(figures: Option<&WatchFigures>) -> &'static str {
    let last = figures.and_then(|figures| figures.last);
    last.map_or("unknown", |answer| answer.fixed.workload.as_str())
}

impl Handler<GetSummary> for Instance {
    type Result = ResponseActFuture<Self, InstanceSummary>;

    fn handle(&mut self, _: GetSummary, _: &mut Self::Context) -> Self::Result {
        Box::pin(
            self.figures()
                .into_actor(self)
                .map(|f, act, _| act.summary(f.as_ref())),
        )
    }
}

impl Handler<GetStatus> for Instance {
    type Result = ResponseActFuture<Self, InstanceView>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        Box::pin(
            self.figures()
                .into_actor(self)
                .map(|f, act, _| act.status(f.as_ref())),
        )
    }
}

impl Handler<GetHeartbeat> for Instance {
    type Result = ResponseActFuture<Self, HeartbeatView>;

    fn handle(&mut self, _: GetHeartbeat, _: &mut Self::Context) -> Self::Result {
        Box::pin(self.figures().into_actor(self).map(|figures, act, _| {
            let config = figures.as_ref().map(|f| f.config);
            let counters = figures.as_ref().map(|f| f.counters).unwrap_or_default();
            HeartbeatView {
                name: act.row.name.clone(),
                monitored: act.row.spec.monitor,
                detector: figures.as_ref().map_or("failed", |f| f.phase),
                timeout: config.map_or(Duration::ZERO, |c| c.timeout),
                interval: config.map_or(Duration::ZERO, |c| c.interval),
                sent: counters.sent,
                answered: counters.answered,
                missed_in_a_row: figures.as_ref().map_or(0, |f| {
                    u32::try_from(f.missed.saturating_sub(1)).unwrap_or(u32::MAX)
                }),
                transient_failures: counters.transient_failures,
                since_answer: act.since_answer(figures.as_ref()),
                rtt: figures.as_ref().and_then(|f| f.rtt),
                smoothed_rtt: figures.as_ref().and_then(|f| f.smoothed_rtt),
            }
        }))
    }
}

impl Handler<GetHealth> for Instance {
    type Result = ResponseActFuture<Self, HealthView>;

    fn handle(&mut self, _: GetHealth, _: &mut Self::Context) -> Self::Result {
        Box::pin(self.figures().into_actor(self).map(|figures, act, _| {
            let said = act
                .health
                .as_ref()
                .map(|h| h.text.clone())
                .filter(|t| !t.is_empty());
            HealthView {
                name: act.row.name.clone(),
                condition: act.engine.condition(),
                since_answer: act.since_answer(figures.as_ref()),
                last: figures.as_ref().and_then(|f| f.last),
                reason: act.engine.reason().map(str::to_owned).or(said),
            }
        }))
    }
}

impl Handler<GetTopologyEntry> for Instance {
    type Result = MessageResult<GetTopologyEntry>;

    fn handle(&mut self, _: GetTopologyEntry, _: &mut Self::Context) -> Self::Result {
        // An instance that is being terminated has no watch.
        let runs = self.watch.is_some();
        MessageResult(runs.then(|| TopologyEntry {
            name: self.row.name.clone(),
            generation: self.generation.generation,
            memory_kib: self.generation.memory_bytes / 1024,
            cid: u64::from(self.generation.cid),
            cpus: self.generation.cpus.clone(),
        }))
    }
}

impl Handler<GetSurvivor> for Instance {
    type Result = MessageResult<GetSurvivor>;

    fn handle(&mut self, _: GetSurvivor, _: &mut Self::Context) -> Self::Result {
        let well = self.engine.is_well();
        MessageResult(well.then(|| Box::new(self.generation.clone())))
    }
}
