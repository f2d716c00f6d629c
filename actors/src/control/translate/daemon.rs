//! The daemon's own status.

use kmorph_control_api as api;

use super::{each, millis};
use crate::model::shown::{DaemonView, PoolUsage};

impl From<PoolUsage> for api::PoolUsage {
    fn from(pool: PoolUsage) -> Self {
        Self {
            cpus: pool.cpus,
            cpus_free: pool.cpus_free,
            cpus_shared: pool.cpus_shared,
            memory_bytes: pool.memory_bytes,
            memory_free_bytes: pool.memory_free_bytes,
            cpus_besides: pool.cpus_besides,
            memory_besides_bytes: pool.memory_besides_bytes,
        }
    }
}

impl From<DaemonView> for api::DaemonStatus {
    fn from(daemon: DaemonView) -> Self {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            version: daemon.version.to_owned(),
            pid: daemon.pid,
            started_at: daemon.started_at,
            uptime_s: daemon.uptime_s,
            backend: daemon.backend.as_str().to_owned(),
            backend_detail: daemon.backend_detail,
            config_path: daemon.config_path.map(|path| path.display().to_string()),
            state_dir: daemon.state_dir.display().to_string(),
            run_dir: daemon.run_dir.display().to_string(),
            instances: count(daemon.instances),
            operations_running: count(daemon.operations_running),
            pool: daemon.pool.into(),
            kept: each(daemon.kept),
            journal_ok: daemon.journal_error.is_none(),
            journal_error: daemon.journal_error,
            actor_restarts: daemon.actor_restarts,
            self_lag_ms: millis(daemon.self_lag),
            stopping: daemon.stopping,
            can_self_test: daemon.can_self_test,
            last_doctor: daemon.last_doctor.map(Into::into),
        }
    }
}
