//! The self-test of captures: it finds a broken dump setup before a real failure does.
//!
//! ```text
//! spawn ─▶ healthy ─▶ policy `required` ─▶ panic ─▶ verdict, fence, capture, respawn ─▶ the vmcore is read ─▶ reported
//!   └──────────────────────── on any failure ──────────────────────────────────────────▶ terminated, vmcores removed
//! ```
//!
//! The instance is an ordinary one and is treated like any other, except that it is thrown away: by this test, or by
//! the next daemon if this one ends before.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::model::requests::SpawnRequest;
use crate::model::{
    Command, DoctorReport, Failure, FailureKind, Operation, OperationKind, OperationResult,
    OperationState, PolicyPatch, RecoveryOutcome, RecoveryRecord, VmcorePolicy,
};
use actix::prelude::*;
use kmorph_backends::contract::PANIC_LINE;
use kmorph_vmcore::Dump;
use kmorph_vmcore::analysis::{AnalysisOptions, CpuReport, Report, analyse};

use crate::instance::{Instance, ProvokePanic, Terminate};
use crate::platform::operations::Handle;
use crate::platform::{ambient, wall_clock};
use crate::services::Services;
use crate::supervisor::{ChangePolicies, Find, GetRecoveries, Spawn};

/// Name of the throw-away instance.
pub(super) const DOCTOR_NAME: &str = "kmorph-doctor";
/// Maximum time for one step: a capture alone may take ten minutes.
const STEP_TIMEOUT: Duration = Duration::from_secs(900);

/// Prefix of the analysis's message that a kernel does not say where its symbols are.
const SYMBOLS_MISSING: &str = "the kernel's symbols: VMCOREINFO has no usable";

/// One self-test.
pub(crate) struct Doctor {
    pub(crate) services: Services,
    pub(crate) fleet: Fleet,
    pub(crate) kernel: PathBuf,
    /// Command-line option that makes the kernel panic when it is provoked.
    pub(crate) cmdline: &'static str,
    pub(crate) operation: Handle,
}

/// The supervisor's functions that a self-test uses.
pub(crate) struct Fleet {
    pub(crate) spawn: Recipient<Spawn>,
    pub(crate) find: Recipient<Find>,
    pub(crate) policies: Recipient<ChangePolicies>,
    pub(crate) recoveries: Recipient<GetRecoveries>,
}

/// The findings in the vmcore.
struct Read {
    release: Option<String>,
    panic: Option<String>,
    cpus: usize,
}

impl Doctor {
    /// Runs the test and ends the operation.
    pub(crate) async fn run(self) -> DoctorReport {
        let mut report = DoctorReport {
            ended_at: String::new(),
            passed: false,
            reason: None,
            kernel_path: self.kernel.display().to_string(),
            kernel_release: None,
            panic: None,
            vmcore_bytes: None,
            cpus: None,
            log_ms: None,
            captured_ms: None,
            recovered_ms: None,
        };
        let tested = self.test(&mut report).await;
        self.operation.step("terminating the throw-away instance");
        let ended = self.throw_away(tested.is_ok()).await;
        report.reason = tested.and(ended).err();
        report.passed = report.reason.is_none();
        report.ended_at = wall_clock::now_rfc3339();
        let result = Some(OperationResult::Doctor(Box::new(report.clone())));
        match &report.reason {
            None => self.operation.succeed(result),
            Some(reason) => {
                let text =
                    format!("a failed instance would not be captured as it should: {reason}");
                let error = Failure::new(FailureKind::Internal, text).hint(Command::SeeSelfTest {
                    instance: DOCTOR_NAME.to_owned(),
                });
                self.operation.fail(error, result);
            }
        }
        report
    }

    async fn test(&self, report: &mut DoctorReport) -> Result<(), String> {
        self.operation.step("starting a throw-away instance");
        self.spawn().await?;
        self.require_vmcore().await?;
        let recoveries = self.recoveries().await?;
        let last = recoveries.last().map_or(0, |record| record.id);
        self.operation.step("having its kernel panic");
        let provoked = self.instance().await?.send(ProvokePanic).await;
        provoked.map_err(|error| error.to_string())??;
        self.operation
            .step("waiting for it to be captured and healed");
        let record = self.recovered(last).await?;
        report.recovered_ms = record.total_ms;
        let vmcore = record.vmcore.unwrap_or_default();
        report.log_ms = vmcore.log_ms;
        report.captured_ms = vmcore.captured_ms;
        report.vmcore_bytes = vmcore.bytes;
        if let Some(error) = vmcore.error.or(vmcore.log_error) {
            return Err(error);
        }
        if record.outcome != RecoveryOutcome::Recovered {
            let reason = record.reason.unwrap_or_default();
            return Err(format!("it was not healed: {reason}"));
        }
        let path = vmcore.path.ok_or("the history names no vmcore")?;
        self.operation.step("reading its vmcore");
        let level = self.services.platform.settings.borrow().vmcore.level;
        let read = ambient::blocking(move || read(Path::new(&path), level)).await;
        let read = read.map_err(|error| error.to_string())??;
        report.kernel_release = read.release;
        report.panic = read.panic;
        report.cpus = u32::try_from(read.cpus).ok();
        Ok(())
    }

    async fn spawn(&self) -> Result<(), String> {
        let spawn = Spawn {
            request: SpawnRequest {
                name: DOCTOR_NAME.to_owned(),
                kernel: self.kernel.clone(),
                kernel_cmdline: self.cmdline.to_owned(),
                initramfs: None,
                cpus: 1,
                memory_bytes: None,
                workload: None,
                publish: Vec::new(),
                monitor: true,
                heartbeat_timeout_s: None,
            },
            uid: None,
            throw_away: true,
        };
        let begun = self.fleet.spawn.send(spawn).await;
        let id = begun.map_err(gone)?.map_err(|error| error.message)?;
        self.succeeded(&id).await
    }

    async fn require_vmcore(&self) -> Result<(), String> {
        let patch = PolicyPatch {
            auto_heal: Some(true),
            vmcore: Some(VmcorePolicy::Required),
            ..PolicyPatch::default()
        };
        let change = ChangePolicies([(DOCTOR_NAME.to_owned(), patch)].into());
        let changed = self.fleet.policies.send(change).await.map_err(gone)?;
        changed.map(drop).map_err(|error| error.message)
    }

    async fn instance(&self) -> Result<Addr<Instance>, String> {
        let found = self.fleet.find.send(Find(DOCTOR_NAME.to_owned())).await;
        found.map_err(gone)?.map_err(|error| error.message)
    }

    async fn recoveries(&self) -> Result<Vec<RecoveryRecord>, String> {
        self.fleet
            .recoveries
            .send(GetRecoveries)
            .await
            .map_err(gone)
    }

    /// Returns the first finished recovery of the instance after the recovery `last`.
    async fn recovered(&self, last: u64) -> Result<RecoveryRecord, String> {
        let mut news = self.services.platform.events.watch();
        let look = async {
            loop {
                news.mark_unchanged();
                let all = self.recoveries().await?;
                let own = all.into_iter().find(|record| {
                    record.id > last
                        && record.instance == DOCTOR_NAME
                        && record.outcome != RecoveryOutcome::Running
                });
                match own {
                    Some(record) => return Ok(record),
                    None => news.changed().await.map_err(|error| error.to_string())?,
                }
            }
        };
        let waited = tokio::time::timeout(STEP_TIMEOUT, look).await;
        waited.unwrap_or_else(|_| Err(format!("its panic led to nothing within {STEP_TIMEOUT:?}")))
    }

    /// Terminates the instance and deletes its captures. If the test failed, its vmcores and logs stay.
    async fn throw_away(&self, passed: bool) -> Result<(), String> {
        let Ok(instance) = self.instance().await else {
            return Ok(());
        };
        let operations = &self.services.platform.operations;
        let begun = operations.begin(OperationKind::Terminate, DOCTOR_NAME, None);
        let operation = begun.map_err(|error| error.message)?;
        let id = operation.id();
        let force = true;
        let asked = instance.send(Terminate { force, operation }).await;
        asked.map_err(gone)?.map_err(|error| error.message)?;
        self.succeeded(&id).await?;
        let settings = self.services.platform.settings.borrow().clone();
        let dir = settings.vmcore.dir.join(DOCTOR_NAME);
        if !passed {
            return Ok(());
        }
        let remove = move || {
            let removed = std::fs::remove_dir_all(&dir);
            removed.map_err(|error| format!("removing {dir:?}: {error}"))
        };
        let removed = ambient::blocking(remove).await;
        removed.unwrap_or_else(|gone| Err(gone.to_string()))
    }

    /// Waits for the end of an operation.
    async fn succeeded(&self, id: &str) -> Result<(), String> {
        let operations = &self.services.platform.operations;
        let mut news = operations.watch();
        let look = async {
            loop {
                news.mark_unchanged();
                let now: Operation = operations.get(id).map_err(|error| error.message)?;
                match (now.state, now.error) {
                    (OperationState::Succeeded, _) => return Ok(()),
                    (OperationState::Running, _) => {
                        news.changed().await.map_err(|error| error.to_string())?;
                    }
                    (_, Some(error)) => return Err(error.message),
                    (_, None) => return Err(format!("operation {id} was cancelled")),
                }
            }
        };
        let waited = tokio::time::timeout(STEP_TIMEOUT, look).await;
        waited.unwrap_or_else(|_| Err(format!("operation {id} took longer than {STEP_TIMEOUT:?}")))
    }
}

fn gone(error: MailboxError) -> String {
    format!("its actor is gone: {error}")
}

/// Reads a vmcore as an operator would. `level` is the dump level of the capture.
fn read(path: &Path, level: u32) -> Result<Read, String> {
    let opened = Dump::open(path).map_err(|error| format!("opening {path:?}: {error}"))?;
    let dump = opened.map_err(|error| format!("reading {path:?}: {error}"))?;
    let report = analyse(&dump, AnalysisOptions { scan: true });
    let report = report.map_err(|error| format!("reading {path:?}: {error}"))?;
    if !report.file.complete || report.file.checksum != "holds" {
        return Err(format!(
            "{path:?} is not complete, or its checksum does not hold"
        ));
    }
    let Some(log) = &report.log else {
        return Err(format!(
            "{path:?} has no log: {}",
            report.problems.join("; ")
        ));
    };
    if !log.text.contains(PANIC_LINE) {
        return Err(format!("the log in {path:?} does not tell of the panic"));
    }
    if report.cpus.is_empty() {
        return Err(format!("{path:?} has the registers of no CPU"));
    }
    if let Some(reason) = unread(&report, level) {
        return Err(format!("{path:?} could not be read whole: {reason}"));
    }
    Ok(Read {
        release: report.kernel.and_then(|kernel| kernel.release),
        panic: report.crash.panic,
        cpus: report.cpus.len(),
    })
}

/// Returns the first gap in the vmcore of a panicked kernel: the pages left out at `level`, the use of its
/// pages, or the positions of its CPUs.
fn unread(report: &Report, level: u32) -> Option<String> {
    let problems = || report.problems.join("; ");
    if report.memory.kinds.is_none() {
        return Some(format!("what its pages are used for: {}", problems()));
    }
    let done = report.file.level.unwrap_or(0);
    if done < level {
        return Some(format!("level {done} was left out, and not {level}"));
    }
    // A kernel before Linux 6.0 does not say where its symbols are.
    let says_not = |problem: &String| problem.starts_with(SYMBOLS_MISSING);
    let unnamed = |cpu: &&CpuReport| cpu.mode == "kernel" && cpu.at.is_none();
    match report.cpus.iter().find(unnamed) {
        Some(cpu) if !report.problems.iter().any(says_not) => Some(format!(
            "CPU {} is at a place that no symbol names: {}",
            cpu.index,
            problems()
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use kmorph_vmcore::kernel::pages::PageCounts;

    use super::*;

    /// Returns the report on a real dump. The dump is too small for page descriptions and symbols: this function adds
    /// them.
    fn golden() -> Report {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../vmcore/tests/golden/linux-6.12.kdump-lzo"
        );
        let dump = Dump::open(Path::new(path)).unwrap().unwrap();
        let mut report = analyse(&dump, AnalysisOptions::default()).unwrap();
        report.memory.kinds = Some(PageCounts::default());
        report.cpus[0].at = Some("panic+0x1".to_owned());
        report.problems.clear();
        report
    }

    #[test]
    fn a_vmcore_that_tells_less_than_it_should_fails_the_test() {
        let report = golden();
        let level = report.file.level.unwrap();
        assert_eq!(unread(&report, level), None, "{:?}", report.problems);
        let why = unread(&report, level + 32).unwrap();
        assert!(why.contains("was left out"), "{why}");

        let mut unnamed = golden();
        unnamed.cpus[0].at = None;
        unnamed.cpus[0].mode = "kernel";
        let why = unread(&unnamed, level).unwrap();
        assert!(why.contains("no symbol names"), "{why}");
        unnamed.problems = vec![format!("{SYMBOLS_MISSING} SYMBOL(kallsyms_names)")];
        assert_eq!(unread(&unnamed, level), None);

        let mut unknown = golden();
        unknown.memory.kinds = None;
        let why = unread(&unknown, level).unwrap();
        assert!(why.contains("pages are used for"), "{why}");
    }
}
