//! Status of instances.

use kmorph_control_api as api;
use kmp_proto::instance::Condition;
use kmp_proto::message::{HeartbeatRsp, PRESSURE_ABSENT};

use super::{each, micros, millis};
use crate::model::shown::{
    HealthView, HeartbeatView, InstanceSummary, InstanceView, KeptGeneration, PingView, PortState,
    PortView,
};

fn state(condition: Condition) -> api::InstanceState {
    use api::InstanceState as State;
    match condition {
        Condition::Starting => State::Starting,
        Condition::Running => State::Running,
        Condition::Degraded => State::Degraded,
        Condition::Unresponsive => State::Unresponsive,
        Condition::Failed => State::Failed,
        Condition::Recovering => State::Recovering,
        Condition::Morphing => State::Morphing,
        Condition::Terminating => State::Terminating,
        Condition::Quarantined => State::Quarantined,
        Condition::OperatorActionNeeded => State::OperatorActionNeeded,
    }
}

impl From<PortView> for api::PublishedAddress {
    fn from(port: PortView) -> Self {
        let (state, reason) = match port.state {
            PortState::Open => (api::PortState::Open, None),
            PortState::Refusing => (api::PortState::Refusing, None),
            PortState::Missing(why) => (api::PortState::Missing, Some(why)),
        };
        Self {
            listen: port.listen.to_string(),
            port: port.port,
            state,
            reason,
        }
    }
}

impl From<KeptGeneration> for api::KeptGeneration {
    fn from(kept: KeptGeneration) -> Self {
        Self {
            instance: kept.instance,
            generation: kept.generation,
            cpus: kept.cpus,
            memory_bytes: kept.memory_bytes,
            reason: kept.reason,
            since: kept.since,
            tries: kept.tries,
        }
    }
}

impl From<InstanceSummary> for api::InstanceSummary {
    fn from(summary: InstanceSummary) -> Self {
        Self {
            name: summary.name,
            state: state(summary.condition),
            generation: summary.generation,
            kernel_release: summary.kernel_release,
            backend: summary.backend.as_str().to_owned(),
            cpus: summary.cpus,
            memory_bytes: summary.memory_bytes,
            last_heartbeat_ms: summary.since_answer.map(millis),
            uptime_s: summary.uptime_s,
            recoveries: summary.recoveries,
            morphs: summary.morphs,
            workload_failures: summary.workload_failures,
            published: each(summary.published),
        }
    }
}

impl From<InstanceView> for api::InstanceStatus {
    fn from(instance: InstanceView) -> Self {
        Self {
            summary: instance.summary.into(),
            reason: instance.reason,
            kernel_path: instance.kernel.path.display().to_string(),
            kernel_sha256: instance.kernel.sha256,
            kernel_cmdline: instance.kernel.cmdline,
            cid: instance.cid,
            processes: instance.processes,
            workload: instance.workload.map(Into::into),
            workload_state: instance.workload_state.to_owned(),
            policy: instance.policy.into(),
            created_at: instance.created_at,
            operation: instance.operation,
            run_dir: instance.run_dir.display().to_string(),
            kept: each(instance.kept),
        }
    }
}

impl From<HeartbeatView> for api::HeartbeatStatus {
    fn from(heartbeat: HeartbeatView) -> Self {
        Self {
            name: heartbeat.name,
            monitored: heartbeat.monitored,
            detector: heartbeat.detector.to_owned(),
            timeout_ms: millis(heartbeat.timeout),
            interval_ms: millis(heartbeat.interval),
            sent: heartbeat.sent,
            answered: heartbeat.answered,
            missed_in_a_row: heartbeat.missed_in_a_row,
            transient_failures: heartbeat.transient_failures,
            last_answer_ms: heartbeat.since_answer.map(millis),
            last_rtt_us: heartbeat.rtt.map(micros),
            smoothed_rtt_us: heartbeat.smoothed_rtt.map(micros),
        }
    }
}

fn pressure(value: u16) -> Option<f64> {
    (value != PRESSURE_ABSENT).then(|| f64::from(value) / 100.0)
}

fn metrics(answer: &HeartbeatRsp) -> api::Metrics {
    api::Metrics {
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

impl From<HealthView> for api::HealthReport {
    fn from(health: HealthView) -> Self {
        const UNKNOWN: &str = "unknown";
        let last = health.last.as_ref();
        Self {
            name: health.name,
            state: state(health.condition),
            health: last.map_or(UNKNOWN, |a| a.fixed.health.as_str()).to_owned(),
            workload_state: last
                .map_or(UNKNOWN, |a| a.fixed.workload.as_str())
                .to_owned(),
            age_ms: health.since_answer.map(millis),
            metrics: last.map(metrics),
            reason: health.reason,
        }
    }
}

impl From<PingView> for api::PingReport {
    fn from(ping: PingView) -> Self {
        Self {
            name: ping.name,
            generation: ping.generation,
            rtt_us: micros(ping.rtt),
        }
    }
}
