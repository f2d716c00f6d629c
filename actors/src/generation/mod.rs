//! The life of one generation: intend, spawn, fence, release. The journal records each step before the attempt and
//! after the confirmation.
//!
//! ```text
//!  intend ─▶ [Intended] ─▶ spawn ─▶ [Placed] ─▶ … ─▶ [Fencing] ─▶ fence ─▶ [Fenced] ─▶ release ─▶ gone
//! ```

pub(crate) mod freezing;
mod kernel;
pub mod machine;
pub mod release;
pub mod workload;

use crate::model::{Command, Failure, FailureKind, Workload};
use kmorph_backends::contract::{HostListener, Placement, Proof, REGISTERS, SpawnError, SpawnSpec};
use kmorph_backends::key::KEY_FILE;
use kmorph_launch::{InstanceName, PublishedPort, StartMode, WorkloadSpec};
use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod, FenceOrder};
use slog::{info, warn};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::generation::machine::Machine;
use crate::generation::release::Ledger;
use crate::generation::workload::{KV_NAME, complete};
use crate::model::generation::{AnyGeneration, Facts, Fenced, Generation, Intended, Placed};
use crate::model::rows::{GenerationRow, InstanceRow, KernelChoice};
use crate::platform::Platform;
use crate::platform::ambient;
use crate::platform::aside;
use crate::platform::journal::{Change, JournalError, record};
use crate::platform::wall_clock;
use crate::resources::Resources;
use crate::resources::pool::Lease;
use crate::resources::ports::listener_name;

use kernel::read_kernel;
pub(crate) use kernel::{check_boot, choose_kernel};

/// Why a generation did not start, and whether parts of it remain.
struct NotStarted {
    error: Failure,
    remains: bool,
}

impl From<Failure> for NotStarted {
    fn from(error: Failure) -> Self {
        Self {
            error,
            remains: false,
        }
    }
}

/// Returns the failure when the journal cannot be written: all changes stop.
pub fn journal_failure(error: &JournalError) -> Failure {
    Failure::new(FailureKind::JournalUnavailable, error.to_string())
        .hint("nothing was changed; instances go on running")
}

/// A generation whose end could not be confirmed or recorded.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct NotFenced {
    /// The generation.
    pub generation: AnyGeneration,
    /// The reason.
    pub reason: String,
}

/// Spawns, fences and releases generations. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Generations {
    /// Journal, events, configuration.
    pub platform: Platform,
    /// The resources of generations.
    pub resources: Resources,
    /// The machine that runs them.
    pub machine: Machine,
    /// Fenced generations that could not be released yet.
    pub kept: Ledger,
}

impl Generations {
    /// Returns a clone for a morph: its log lines name the session.
    #[must_use]
    pub fn within(&self, session: u64) -> Self {
        Self {
            platform: self.platform.within(session),
            ..self.clone()
        }
    }

    /// Takes a number, a lease and an address for a new generation; `write` writes its row.
    ///
    /// # Errors
    /// When the pool or the journal refuses. Nothing is taken then.
    pub async fn intend<W>(
        &self,
        instance: &str,
        kernel: &KernelChoice,
        cpus: u16,
        memory_bytes: u64,
        write: impl FnOnce(GenerationRow) -> W,
    ) -> Result<Generation<Intended>, Failure>
    where
        W: Future<Output = Result<(), JournalError>>,
    {
        let generation = self
            .resources
            .numbers
            .borrow_mut()
            .next_generation(instance);
        let holder = (instance.to_owned(), generation);
        let lease = self
            .resources
            .pool
            .borrow_mut()
            .take(holder.clone(), cpus, memory_bytes)
            .map_err(|e| {
                let text = format!("the pool cannot give {instance} what it needs: {e}");
                let enlarge = self.machine.backend.kind().enlarging_the_pool();
                let hint = format!("ask for less, terminate an instance, or {enlarge}");
                Failure::new(FailureKind::InsufficientResources, text).hint(hint)
            })?;
        let run_dir = self.platform.settings.borrow().run_dir.clone();
        let cid = self.resources.numbers.borrow_mut().take_cid(holder);
        let intended = Generation::intended(Facts {
            instance: instance.to_owned(),
            generation,
            kernel: kernel.clone(),
            cid,
            cpus: lease.cpus,
            memory_bytes,
            run_dir: run_dir
                .join("instances")
                .join(instance)
                .join(generation.to_string()),
            spawned_at: wall_clock::now_rfc3339(),
            frozen: false,
            boot_id: None,
            ending: false,
        });
        let row = GenerationRow::from(&AnyGeneration::from(intended.clone()));
        if let Err(error) = write(row).await {
            self.forget(&intended);
            return Err(journal_failure(&error));
        }
        Ok(intended)
    }

    /// Starts an intended generation. After a failure nothing of it remains, not even its row.
    ///
    /// # Errors
    /// The errors of the backend and of the journal.
    pub async fn spawn(
        &self,
        mut intended: Generation<Intended>,
        instance: &InstanceRow,
        start: StartMode,
        predecessor: Option<Placement>,
    ) -> Result<Generation<Placed>, Failure> {
        let spawned = self.try_spawn(&intended, instance, start, predecessor);
        match spawned.await {
            Ok(placement) => {
                self.note_lease(&mut intended, &placement);
                let placed = intended.placed(placement);
                info!(self.platform.log, "spawned"; "instance" => &placed.instance,
                    "generation" => placed.generation, "kernel" => &placed.kernel.release);
                // A failed write is tolerable: `find` will recover the placement.
                if let Err(error) = self.write(&placed.clone().into()).await {
                    warn!(self.platform.log, "the placement was not recorded"; "instance" => &placed.instance,
                        "generation" => placed.generation, "error" => error);
                }
                Ok(placed)
            }
            Err(NotStarted {
                error,
                remains: true,
            }) => match self.end_remains(intended).await {
                Ok(()) => Err(error),
                Err(reason) => {
                    let text = format!(
                        "{}; what was started may still run: {reason}",
                        error.message
                    );
                    Err(Failure::new(FailureKind::OperatorActionNeeded, text).hint(
                        Command::RecoverAfterEnd {
                            instance: instance.name.clone(),
                        },
                    ))
                }
            },
            Err(NotStarted { error, .. }) => {
                self.remove_run_dir(&intended).await;
                self.forget(&intended);
                let gone = Change::GenerationGone(intended.instance.clone(), intended.generation);
                let _ = record(&self.platform.journal, vec![gone]).await;
                Err(error)
            }
        }
    }

    /// Fences and releases the remains of a generation that did not start.
    ///
    /// # Errors
    /// When the fence could not be confirmed. The row, the resources and the run directory stay for the next daemon.
    async fn end_remains(&self, intended: Generation<Intended>) -> Result<(), String> {
        let facts = Facts::clone(&intended);
        let order = FenceOrder::new(facts.generation);
        let fenced = self.fence(intended.into(), order).await;
        let fenced = fenced.map_err(|not| {
            warn!(self.platform.log, "what is left of a generation that did not start may run";
                "instance" => &facts.instance, "generation" => facts.generation, "reason" => &not.reason);
            not.reason
        })?;
        if let Err(error) = self.release(fenced).await {
            warn!(self.platform.log, "a release was not recorded"; "instance" => &facts.instance,
                "generation" => facts.generation, "error" => error);
        }
        self.remove_run_dir(&facts).await;
        Ok(())
    }

    /// Removes the files that the backend wrote for a generation that it did not start.
    async fn remove_run_dir(&self, row: &Facts) {
        let run_dir = row.run_dir.clone();
        let removed = ambient::blocking(move || {
            tidy_up(&run_dir, false)?;
            // The instance's directory, unless it contains other generations.
            let parent = run_dir.parent().map(std::fs::remove_dir);
            parent
                .unwrap_or(Ok(()))
                .or_else(|error| match error.kind() {
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
                    _ => Err(error),
                })
        });
        if let Ok(Err(error)) = removed.await {
            warn!(self.platform.log, "files of a generation that did not start stay";
                "instance" => &row.instance, "generation" => row.generation,
                "directory" => %row.run_dir.display(), "error" => %error);
        }
    }

    /// Updates the lease from the placement: a backend may choose other CPUs itself.
    fn note_lease(&self, row: &mut Facts, placement: &Placement) {
        row.cpus.clone_from(&placement.cpus);
        row.memory_bytes = placement.memory_bytes;
        let lease = Lease {
            cpus: row.cpus.clone(),
            memory_bytes: row.memory_bytes,
        };
        let holder = (row.instance.clone(), row.generation);
        self.resources.pool.borrow_mut().retake(holder, lease);
    }

    async fn try_spawn(
        &self,
        row: &Facts,
        instance: &InstanceRow,
        start: StartMode,
        predecessor: Option<Placement>,
    ) -> Result<Placement, NotStarted> {
        let kernel = read_kernel(&row.kernel.path, Some(&row.kernel.sha256)).await?;
        let name: InstanceName = row.instance.parse().map_err(|e| {
            Failure::new(
                FailureKind::Internal,
                format!("the journal's instance name: {e}"),
            )
        })?;
        let mut listeners = self.listeners(&row.instance)?;
        if !self.machine.backend.passes_sockets() {
            listeners.clear();
        }
        let workload = match &instance.spec.workload {
            Some(request) => Some(self.workload(complete(request).await?)),
            None => None,
        };
        let port = |port: u16| PublishedPort {
            port,
            name: listener_name(port),
        };
        let spec = SpawnSpec {
            name,
            generation: row.generation,
            kernel,
            cmdline: row.kernel.cmdline.clone(),
            initramfs: row.kernel.initramfs.clone(),
            cpus: row.cpus.clone(),
            memory_bytes: row.memory_bytes,
            workload,
            ports: instance.spec.publish.iter().map(|p| port(p.port)).collect(),
            listeners,
            start,
            predecessor: predecessor.map(Arc::new),
            run_dir: row.run_dir.clone(),
            cid: row.cid,
        };
        self.spawn_aside(spec).await.map_err(|error| {
            let code = match &error {
                SpawnError::Refused(_) => FailureKind::InvalidRequest,
                SpawnError::Unavailable(_) => FailureKind::Unavailable,
                SpawnError::System { .. } | SpawnError::Remains(_) => FailureKind::Internal,
            };
            NotStarted {
                remains: matches!(error, SpawnError::Remains(_)),
                error: Failure::new(code, format!("starting {}: {error}", row.instance)),
            }
        })
    }

    /// Returns the listening published sockets for a new generation.
    fn listeners(&self, instance: &str) -> Result<Vec<HostListener>, Failure> {
        let held = self
            .resources
            .ports
            .publisher
            .borrow_mut()
            .duplicates(instance);
        let forwarded = held.and_then(|held| self.resources.ports.forward(instance).map(|()| held));
        forwarded.map_err(|e| {
            let text = format!("{instance} is not started without its published ports: {e}");
            Failure::new(FailureKind::Unavailable, text)
        })
    }

    /// Starts a process that inherits sockets on another thread, one at a time: its directory may be on a disk.
    async fn spawn_aside(&self, spec: SpawnSpec) -> Result<Placement, SpawnError> {
        if !self.machine.backend.passes_sockets() {
            return self.machine.backend.spawn(spec).await;
        }
        let what = format!("starting {} generation {}", spec.name, spec.generation);
        let backend = Arc::clone(&self.machine.backend);
        let work = async move { backend.spawn(spec).await };
        let gone = |error| SpawnError::System {
            what,
            source: std::io::Error::other(error),
        };
        self.machine.spawn_turn.run(work).await.map_err(gone)?
    }

    /// Looks for a started generation, by its run directory.
    ///
    /// # Errors
    /// The errors of the backend.
    pub async fn find(&self, row: &Facts) -> Result<Option<Placement>, String> {
        let name: InstanceName = row.instance.parse().map_err(|e| format!("{e}"))?;
        let (backend, row) = (Arc::clone(&self.machine.backend), row.clone());
        let work = async move { backend.find(&name, row.generation, &row.run_dir).await };
        let found = self.machine.spawn_turn.run(work).await;
        found.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }

    fn workload(&self, request: Workload) -> WorkloadSpec {
        // A guest image contains the program at the same path as the host.
        let program = match request.program.as_str() {
            KV_NAME => self.platform.settings.borrow().kv_program.clone(),
            path => path.into(),
        };
        WorkloadSpec {
            program,
            args: request.args,
            env: request.env,
            restart: kmorph_launch::WorkloadRestart::default(),
        }
    }

    /// Stops a generation for good and records the certificate.
    ///
    /// # Errors
    /// When its end could not be confirmed or recorded.
    pub async fn fence(
        &self,
        mut generation: AnyGeneration,
        order: FenceOrder,
    ) -> Result<Generation<Fenced>, NotFenced> {
        if let AnyGeneration::Fenced(fenced) = generation {
            return Ok(fenced);
        }
        if generation.generation != order.generation() {
            let reason = format!("the order is for generation {}", order.generation());
            return Err(NotFenced { generation, reason });
        }
        generation.ending = true;
        if let Err(reason) = self.write(&generation).await {
            return Err(NotFenced { generation, reason });
        }
        if let AnyGeneration::Intended(_) = generation {
            match self.find(&generation).await {
                Ok(found) => generation = generation.found(found),
                Err(reason) => return Err(NotFenced { generation, reason }),
            }
        }
        let (certificate, proof) = match self.carry_out(generation.placement(), order).await {
            Ok(done) => done,
            Err(reason) => return Err(NotFenced { generation, reason }),
        };
        let proof = proof.map(Proof::as_str);
        let fenced = generation
            .clone()
            .fenced(certificate, proof.map(str::to_owned));
        // Without a certificate in the journal, this daemon and the next one fence it again.
        if let Err(reason) = self.write(&fenced.clone().into()).await {
            return Err(NotFenced { generation, reason });
        }
        info!(self.platform.log, "fenced"; "instance" => &fenced.instance,
            "generation" => fenced.generation,
            "confirmed" => fenced.certificate().confirmation().as_str(),
            "proof" => proof.unwrap_or("nothing ran"));
        Ok(fenced)
    }

    /// Keeps the memory of a generation that is about to be fenced until it is captured, even across a restart of the
    /// daemon. Logs a failure.
    pub async fn keep_memory(&self, row: &AnyGeneration) {
        let Some(placement) = row.placement() else {
            return;
        };
        if let Err(error) = self.machine.backend.keep_memory(placement).await {
            warn!(self.platform.log, "its memory is lost when the daemon ends before it is captured";
                "instance" => &row.instance, "generation" => row.generation, "reason" => %error);
        }
    }

    /// Saves the registers of a generation's CPUs for its vmcore, if possible: they change when it runs on, and a
    /// fence destroys them. A vmcore without registers is still useful, so a failure is only logged.
    pub async fn save_registers(&self, row: &AnyGeneration) {
        let Some(placement) = row.placement() else {
            return;
        };
        // Registers from an earlier capture are stale.
        let earlier = row.run_dir.join(REGISTERS);
        let _ = ambient::io(move || std::fs::remove_file(earlier)).await;
        let saved = tokio::time::timeout(
            REGISTERS_TIMEOUT,
            self.machine.backend.save_registers(placement),
        );
        let reason = match saved.await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("it took longer than {REGISTERS_TIMEOUT:?}"),
        };
        warn!(self.platform.log, "no registers for the vmcore"; "instance" => &row.instance,
            "generation" => row.generation, "reason" => reason);
    }

    async fn write(&self, generation: &AnyGeneration) -> Result<(), String> {
        let change = Change::Generation(Box::new(generation.into()));
        record(&self.platform.journal, vec![change])
            .await
            .map_err(|e| e.to_string())
    }

    async fn carry_out(
        &self,
        placement: Option<&Placement>,
        order: FenceOrder,
    ) -> Result<(FenceCertificate, Option<Proof>), String> {
        let now = wall_clock::now_unix_ns();
        let Some(placement) = placement else {
            let never = order.confirm(FenceMethod::NeverStarted, Confirmation::NothingFound, now);
            return Ok((never, None));
        };
        if placement.host_boot_id != self.machine.host_boot_id {
            let (method, seen) = (FenceMethod::HostRebooted, Confirmation::OtherHostBoot);
            let other = order.confirm(method, seen, now);
            return Ok((other, Some(Proof::HostRebooted)));
        }
        let (backend, placement) = (Arc::clone(&self.machine.backend), placement.clone());
        let fenced = aside::run(async move { backend.fence(&placement, order).await }).await;
        fenced
            .map_err(|e| e.to_string())?
            .map(|fenced| (fenced.certificate, Some(fenced.proof)))
            .map_err(|unconfirmed| unconfirmed.to_string())
    }

    /// Frees the lease and the address of a generation.
    pub(crate) fn forget(&self, row: &Facts) {
        let holder = (row.instance.clone(), row.generation);
        self.resources.pool.borrow_mut().give_back(&holder);
        self.resources
            .numbers
            .borrow_mut()
            .give_cid_back(row.cid, &holder);
    }
}

/// Maximum time that a fence waits for the CPU registers.
const REGISTERS_TIMEOUT: Duration = Duration::from_secs(1);

/// Number of ended generations per instance whose logs are kept.
pub const LOGS_KEPT: usize = 3;

/// Removes the leftovers in `run_dir` of a generation that never started, and all but the last [`LOGS_KEPT`] ended
/// generations next to it. A generation that may run has its agent's key there, with every backend.
pub(crate) fn tidy_up(run_dir: &Path, started: bool) -> std::io::Result<()> {
    if !started && run_dir.exists() {
        std::fs::remove_dir_all(run_dir)?;
    }
    let Some(parent) = run_dir.parent().filter(|p| p.exists()) else {
        return Ok(());
    };
    let mut ended = Vec::new();
    for entry in std::fs::read_dir(parent)? {
        let path = entry?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        if let Some(number) = number
            && !path.join(KEY_FILE).try_exists()?
        {
            ended.push((std::cmp::Reverse::<u64>(number), path));
        }
    }
    ended.sort();
    for (_, path) in ended.into_iter().skip(LOGS_KEPT) {
        std::fs::remove_dir_all(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_run_stays_however_many_came_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let of = |generation: usize| dir.path().join(generation.to_string());
        for generation in 1..=7 {
            std::fs::create_dir(of(generation)).unwrap();
            std::fs::write(of(generation).join("console.log"), "").unwrap();
        }
        // A guest: its agent reads the configuration from the guest's image.
        std::fs::write(of(1).join(KEY_FILE), "").unwrap();
        tidy_up(&of(7), true).unwrap();
        let left: Vec<_> = (1..=7)
            .filter(|generation| of(*generation).exists())
            .collect();
        assert_eq!(left, [1, 5, 6, 7]);
        tidy_up(&of(7), false).unwrap();
        let left: Vec<_> = (1..=7)
            .filter(|generation| of(*generation).exists())
            .collect();
        assert_eq!(left, [1, 5, 6]);
    }
}
