//! The daemon itself: status, settings, shutdown.

use std::sync::Arc;
use std::time::Duration;

use crate::model::shown::{DaemonView, PoolUsage};
use actix::prelude::*;
use kmorph_backends::contract::HeldBesides;
use tokio::sync::oneshot;

use super::{ApplySettings, GetDaemon, Stopping, Supervisor};
use crate::platform::wall_clock;

impl Handler<Stopping> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: Stopping, _: &mut Self::Context) {
        self.stopping = true;
    }
}

impl Handler<GetDaemon> for Supervisor {
    type Result = ResponseFuture<DaemonView>;

    fn handle(&mut self, _: GetDaemon, _: &mut Self::Context) -> Self::Result {
        let mut status = self.status();
        let journal = self.services.platform.journal.clone();
        let besides = self.held_besides();
        Box::pin(async move {
            if let Some(besides) = besides.await {
                count_besides(&mut status.pool, besides);
            }
            status.journal_error = crate::platform::journal::failure(&journal).await;
            status
        })
    }
}

/// Maximum time that a status waits for other holders of the pool. After a timeout the status omits them.
const BESIDES_TIMEOUT: Duration = Duration::from_millis(500);

/// Subtracts CPUs and memory held by others from the free ones.
fn count_besides(pool: &mut PoolUsage, besides: HeldBesides) {
    pool.cpus_free.retain(|cpu| !besides.cpus.contains(cpu));
    pool.memory_free_bytes = pool.memory_free_bytes.saturating_sub(besides.memory_bytes);
    pool.cpus_besides = besides.cpus;
    pool.memory_besides_bytes = besides.memory_bytes;
}

impl Supervisor {
    /// Returns the CPUs and memory of the pool that others hold.
    fn held_besides(&self) -> impl Future<Output = Option<HeldBesides>> + use<> {
        let backend = Arc::clone(self.services.backend());
        let run_dir = self
            .services
            .platform
            .settings
            .borrow()
            .run_dir
            .join("instances");
        let counted = self.services.generations.resources.pool.borrow().holders();
        let turn = Arc::clone(&self.looks_besides);
        // One query at a time: if the files block, further callers start no further thread.
        let look = async move {
            let turn = turn.lock_owned().await;
            let (tell, answer) = oneshot::channel();
            actix::spawn(async move {
                let found = backend.held_besides(&run_dir, &counted).await;
                drop(turn);
                let _ = tell.send(found);
            });
            answer.await
        };
        async move {
            let answer = tokio::time::timeout(BESIDES_TIMEOUT, look).await;
            answer.ok()?.ok()?.ok()?
        }
    }

    /// Returns the status, without the journal's own part.
    fn status(&self) -> DaemonView {
        let settings = self.services.platform.settings.borrow();
        DaemonView {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            started_at: self.started_at.clone(),
            uptime_s: wall_clock::seconds_since(&self.started_at),
            backend: self.services.backend().kind(),
            backend_detail: self.backend_detail.clone(),
            config_path: settings.config_path.clone(),
            state_dir: settings.state_dir.clone(),
            run_dir: settings.run_dir.clone(),
            instances: self.instances.len(),
            operations_running: self.services.platform.operations.running(),
            pool: self.services.generations.resources.pool.borrow().usage(),
            kept: self.services.generations.kept.shown(None),
            journal_error: None,
            actor_restarts: self.actor_restarts,
            self_lag: self.lag.longest(),
            stopping: self.stopping,
            can_self_test: self.services.backend().panic_cmdline().is_some(),
            last_doctor: self.last_doctor.clone(),
        }
    }
}

impl Handler<ApplySettings> for Supervisor {
    type Result = ();

    fn handle(&mut self, ApplySettings(new): ApplySettings, _: &mut Self::Context) -> Self::Result {
        let mut old = self.services.platform.settings.borrow_mut();
        let pool = old.pool != new.pool;
        *old = *new;
        if pool {
            self.services
                .generations
                .resources
                .pool
                .borrow_mut()
                .resize(old.pool.clone());
        }
    }
}
