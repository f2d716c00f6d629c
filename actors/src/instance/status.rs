//! What an instance shows of itself.

use std::collections::BTreeMap;
use std::time::Duration;

use actix::prelude::*;
use kmorph_control_api::{
    HealthReport, HeartbeatStatus, InstanceState, InstanceStatus, InstanceSummary, Metrics,
};
use kmp_proto::instance::Condition;
use kmp_proto::message::{HeartbeatRsp, PRESSURE_ABSENT, TopologyEntry};

use super::Instance;
use super::requests::{
    GetHealth, GetHeartbeat, GetStatus, GetSummary, GetSurvivor, GetTopologyEntry,
};
use crate::platform::wall_clock;
use crate::watch::{GetFigures, WatchFigures};

/// What the API calls a condition.
pub(super) fn state_of(condition: Condition) -> InstanceState {
    match condition {
        Condition::Starting => InstanceState::Starting,
        Condition::Running => InstanceState::Running,
        Condition::Degraded => InstanceState::Degraded,
        Condition::Unresponsive => InstanceState::Unresponsive,
        Condition::Failed => InstanceState::Failed,
        Condition::Recovering => InstanceState::Recovering,
        Condition::Morphing => InstanceState::Morphing,
        Condition::Terminating => InstanceState::Terminating,
        Condition::Quarantined => InstanceState::Quarantined,
        Condition::OperatorActionNeeded => InstanceState::OperatorActionNeeded,
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn pressure(value: u16) -> Option<f64> {
    (value != PRESSURE_ABSENT).then(|| f64::from(value) / 100.0)
}

fn metrics(answer: &HeartbeatRsp) -> Metrics {
    Metrics {
        cpu_count: answer.fixed.cpu_count,
        cpu_busy_percent: f64::from(answer.fixed.cpu_busy_permille) / 10.0,
        cpu_pressure_percent: pressure(answer.fixed.pressure_cpu),
        memory_total_bytes: answer.fixed.memory_total_kib.saturating_mul(1024),
        memory_available_bytes: answer.fixed.memory_available_kib.saturating_mul(1024),
        memory_pressure_percent: pressure(answer.fixed.pressure_memory),
        io_read_bytes: answer.fixed.io_read_bytes,
        io_write_bytes: answer.fixed.io_write_bytes,
        io_pressure_percent: pressure(answer.fixed.pressure_io),
    }
}

impl Instance {
    pub(super) fn figures(&self) -> impl Future<Output = Option<WatchFigures>> + 'static + use<> {
        let watch = self.watch.clone();
        async move { watch?.send(GetFigures).await.ok() }
    }

    fn summary(&self, figures: Option<&WatchFigures>) -> InstanceSummary {
        let release = figures
            .map(|f| f.kernel_release.clone())
            .filter(|r| !r.is_empty());
        // Of what is gone nothing runs: no kernel, and for no time.
        let runs = !self.is_gone();
        let kernel_release = release.unwrap_or_else(|| self.kernel_release.clone());
        InstanceSummary {
            name: self.row.name.clone(),
            state: state_of(self.engine.condition()),
            generation: self.generation.generation,
            kernel_release: if runs { kernel_release } else { String::new() },
            backend: self.row.spec.backend.as_str().to_owned(),
            cpus: self.generation.cpus.clone(),
            memory_bytes: self.generation.memory_bytes,
            last_heartbeat_ms: figures.and_then(|f| f.since_answer).map(millis),
            uptime_s: runs.then(|| wall_clock::seconds_since(&self.generation.spawned_at)),
            recoveries: self.row.recoveries,
            morphs: self.row.morphs,
            workload_failures: self.row.workload_failures,
            published: self.services.publisher.borrow().shown(&self.row.name),
        }
    }

    fn status(&self, figures: Option<&WatchFigures>) -> InstanceStatus {
        let processes: BTreeMap<String, i32> = self
            .generation
            .placement
            .iter()
            .filter(|_| !self.is_gone())
            .flat_map(|p| &p.processes)
            .map(|p| (p.role.clone(), p.pid))
            .collect();
        InstanceStatus {
            summary: self.summary(figures),
            reason: self.engine.reason().map(str::to_owned),
            kernel_path: self.generation.kernel.path.display().to_string(),
            kernel_sha256: self.generation.kernel.sha256.clone(),
            kernel_cmdline: self.generation.kernel.cmdline.clone(),
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
            run_dir: self.generation.run_dir.display().to_string(),
            kept: self.services.kept.shown(Some(&self.row.name)),
        }
    }
}

fn workload_state(figures: Option<&WatchFigures>) -> String {
    figures
        .and_then(|f| f.last)
        .map_or("unknown", |a| a.fixed.workload.as_str())
        .to_owned()
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
    type Result = ResponseActFuture<Self, InstanceStatus>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        Box::pin(
            self.figures()
                .into_actor(self)
                .map(|f, act, _| act.status(f.as_ref())),
        )
    }
}

impl Handler<GetHeartbeat> for Instance {
    type Result = ResponseActFuture<Self, HeartbeatStatus>;

    fn handle(&mut self, _: GetHeartbeat, _: &mut Self::Context) -> Self::Result {
        Box::pin(self.figures().into_actor(self).map(|figures, act, _| {
            let config = figures.as_ref().map(|f| f.config);
            let counters = figures.as_ref().map(|f| f.counters).unwrap_or_default();
            HeartbeatStatus {
                name: act.row.name.clone(),
                monitored: act.row.spec.monitor,
                detector: figures.as_ref().map_or("failed", |f| f.phase).to_owned(),
                timeout_ms: config.map_or(0, |c| millis(c.timeout)),
                interval_ms: config.map_or(0, |c| millis(c.interval)),
                sent: counters.sent,
                answered: counters.answered,
                missed_in_a_row: figures.as_ref().map_or(0, |f| {
                    u32::try_from(f.missed.saturating_sub(1)).unwrap_or(u32::MAX)
                }),
                transient_failures: counters.transient_failures,
                last_answer_ms: figures.as_ref().and_then(|f| f.since_answer).map(millis),
                last_rtt_us: figures.as_ref().and_then(|f| f.rtt).map(micros),
                smoothed_rtt_us: figures.as_ref().and_then(|f| f.smoothed_rtt).map(micros),
            }
        }))
    }
}

impl Handler<GetHealth> for Instance {
    type Result = ResponseActFuture<Self, HealthReport>;

    fn handle(&mut self, _: GetHealth, _: &mut Self::Context) -> Self::Result {
        Box::pin(self.figures().into_actor(self).map(|figures, act, _| {
            let last = figures.as_ref().and_then(|f| f.last);
            let said = act
                .health
                .as_ref()
                .map(|h| h.text.clone())
                .filter(|t| !t.is_empty());
            HealthReport {
                name: act.row.name.clone(),
                state: state_of(act.engine.condition()),
                health: last
                    .map_or("unknown", |a| a.fixed.health.as_str())
                    .to_owned(),
                workload_state: workload_state(figures.as_ref()),
                age_ms: figures.as_ref().and_then(|f| f.since_answer).map(millis),
                metrics: last.as_ref().map(metrics),
                reason: act.engine.reason().map(str::to_owned).or(said),
            }
        }))
    }
}

impl Handler<GetTopologyEntry> for Instance {
    type Result = MessageResult<GetTopologyEntry>;

    fn handle(&mut self, _: GetTopologyEntry, _: &mut Self::Context) -> Self::Result {
        // What is being ended is watched no more.
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
