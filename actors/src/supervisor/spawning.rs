//! Spawns instances: checks the request, records the instance, starts it.

use crate::model::requests::SpawnRequest;
use crate::model::{Failure, FailureKind, OperationKind};
use actix::prelude::*;
use kmorph_launch::{InstanceName, StartMode};

use super::{Entry, Spawn, Supervisor};
use crate::generation::workload::{check_program, check_workload, complete};
use crate::generation::{check_boot, choose_kernel};
use crate::instance::Beginning;
use crate::model::capability::check_policy;
use crate::model::generation::{Generation, Intended};
use crate::model::rows::{GenerationRow, InstanceRow, InstanceSpec, WorkloadRestarts};
use crate::platform::journal::{Change, record};
use crate::platform::operations::Handle;
use crate::platform::wall_clock;
use crate::services::Services;

/// Maximum number of instances of one daemon.
pub const INSTANCES_MAX: usize = 2048;
/// Minimum memory of an instance, bytes.
pub const MEMORY_MIN_BYTES: u64 = 16 << 20;

impl Handler<Spawn> for Supervisor {
    type Result = ResponseActFuture<Self, Result<String, Failure>>;

    fn handle(&mut self, spawn: Spawn, _: &mut Self::Context) -> Self::Result {
        let begun = self.begin_spawn(&spawn);
        let (services, request, throw_away) =
            (self.services.clone(), spawn.request, spawn.throw_away);
        let name = request.name.clone();
        let mine = begun.is_ok();
        let work = async move {
            let operation = begun?;
            let id = operation.id();
            match prepare_spawn(&services, &request, throw_away, &operation).await {
                Ok((row, generation)) => Ok((id, row, generation, operation)),
                Err(error) => {
                    operation.fail(error.clone(), None);
                    Err(error)
                }
            }
        };
        Box::pin(
            work.into_actor(self)
                .map(move |result, act, ctx| match result {
                    Ok((id, row, generation, operation)) => {
                        act.start_spawned(row, generation, operation, ctx);
                        Ok(id)
                    }
                    Err(error) => {
                        if mine {
                            act.instances.remove(&name);
                            act.services.ports().unpublish(&name);
                        }
                        Err(error)
                    }
                }),
        )
    }
}

impl Supervisor {
    /// Performs the immediate checks and takes the name.
    fn begin_spawn(&mut self, spawn: &Spawn) -> Result<Handle, Failure> {
        self.refuse_while_stopping()?;
        let invalid = |text: String| Failure::new(FailureKind::InvalidRequest, text);
        let request = &spawn.request;
        let name: InstanceName = request.name.parse().map_err(|e| invalid(format!("{e}")))?;
        if self.instances.contains_key(name.as_str()) {
            let text = format!("there is an instance {name} already");
            return Err(Failure::new(FailureKind::AlreadyExists, text)
                .hint("choose another name, or terminate it first"));
        }
        if self.instances.len() >= INSTANCES_MAX {
            let text = format!("there are {INSTANCES_MAX} instances, the most one daemon takes");
            return Err(Failure::new(FailureKind::InsufficientResources, text));
        }
        if request.cpus == 0 {
            return Err(invalid("an instance needs at least one CPU".to_owned()));
        }
        if request
            .memory_bytes
            .is_some_and(|bytes| bytes < MEMORY_MIN_BYTES)
        {
            return Err(invalid(format!(
                "an instance needs at least {} MiB of memory",
                MEMORY_MIN_BYTES >> 20
            )));
        }
        request.workload.as_ref().map_or(Ok(()), check_workload)?;
        let services = &self.services;
        let handle =
            services
                .platform
                .operations
                .begin(OperationKind::Spawn, name.as_str(), spawn.uid)?;
        self.instances
            .insert(request.name.clone(), Entry { address: None });
        Ok(handle)
    }

    /// Starts a recorded instance; the caller already has the operation id.
    fn start_spawned(
        &mut self,
        row: InstanceRow,
        generation: Generation<Intended>,
        operation: Handle,
        ctx: &mut Context<Self>,
    ) {
        let services = self.services.clone();
        let (name, instance) = (row.name.clone(), row.clone());
        let work = async move {
            operation.step("starting");
            let spawned = services
                .generations
                .spawn(generation, &instance, StartMode::Fresh, None)
                .await;
            if spawned.is_err() {
                let gone = Change::InstanceGone(instance.name.clone());
                let _ = record(&services.platform.journal, vec![gone]).await;
            }
            (spawned, operation)
        };
        ctx.spawn(
            work.into_actor(self)
                .map(move |(spawned, operation), act, ctx| match spawned {
                    Ok(generation) => {
                        act.adopt(row, generation.into(), Beginning::Spawned(operation), ctx);
                    }
                    Err(error) => {
                        act.instances.remove(&name);
                        act.services.ports().unpublish(&name);
                        operation.fail(error, None);
                    }
                }),
        );
    }
}

/// Checks the kernel, binds the ports, takes the lease, and records the instance.
async fn prepare_spawn(
    services: &Services,
    request: &SpawnRequest,
    throw_away: bool,
    operation: &Handle,
) -> Result<(InstanceRow, Generation<Intended>), Failure> {
    check_boot(
        services.backend().kind(),
        Some(&request.kernel_cmdline),
        request.initramfs.as_deref(),
    )?;
    if let Some(workload) = &request.workload {
        if request.initramfs.is_none() {
            check_program(workload).await?;
        }
        // The workload's environment file is read again at each start.
        complete(workload).await?;
    }
    operation.step("reading the kernel image");
    let kernel = choose_kernel(
        &request.kernel,
        request.kernel_cmdline.clone(),
        request.initramfs.as_deref(),
    )
    .await?;
    let mut policy = services.platform.settings.borrow().default_policy.clone();
    if let Some(timeout) = request.heartbeat_timeout_s {
        policy.heartbeat_timeout_s = timeout;
    }
    check_policy(services.backend().kind(), "", &policy)?;
    let memory_bytes = request
        .memory_bytes
        .unwrap_or(services.platform.settings.borrow().default_memory_bytes);
    let publish = services
        .ports()
        .publisher
        .borrow_mut()
        .bind(&request.name, &request.publish)?;
    services.ports().forward(&request.name).map_err(|e| {
        let text = format!("forwarding the published ports of {}: {e}", request.name);
        Failure::new(FailureKind::Unavailable, text)
    })?;
    let mut row = InstanceRow {
        name: request.name.clone(),
        spec: InstanceSpec {
            kernel: kernel.clone(),
            cpus: request.cpus,
            memory_bytes,
            workload: request.workload.clone(),
            publish,
            monitor: request.monitor,
            backend: services.backend().kind(),
            throw_away,
        },
        policy,
        desired: kmp_proto::instance::Desired::Running,
        reason: None,
        created_at: wall_clock::now_rfc3339(),
        active_generation: 0,
        recoveries: 0,
        morphs: 0,
        workload_failures: 0,
        workload_restarts: WorkloadRestarts::default(),
    };
    let written = row.clone();
    let write = move |generation: GenerationRow| {
        let row = InstanceRow {
            active_generation: generation.generation,
            ..written
        };
        let rows = vec![
            Change::Instance(Box::new(row)),
            Change::Generation(Box::new(generation)),
        ];
        async move { record(&services.platform.journal, rows).await }
    };
    let generation = services
        .generations
        .intend(&request.name, &kernel, request.cpus, memory_bytes, write)
        .await?;
    row.active_generation = generation.generation;
    Ok((row, generation))
}
