//! Captures on request: of an instance that runs, that hangs, or that failed and was not healed.
//!
//! ```text
//! asked ─▶ frozen ─▶ registers ─▶ kernel's log is reported ─▶ memory read ─▶ resumed ─▶ synced, verified, renamed
//!             │                                                  │
//!             └──────────── failed, or cancelled ◀───────────────┘ the file is gone, or marked as incomplete
//!                                    └▶ resumed
//! ```
//!
//! An instance that executes nothing anyway, because its kernel panicked or was stopped, is neither frozen nor
//! resumed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::model::{
    CaptureReport, Command, EventKind, Failure, FailureKind, OperationResult, Progress,
};
use actix::Recipient;
use kmorph_vmcore::writer::{WriteError, partial_path};
use kmp_proto::time::Instant;
use slog::warn;

use super::{Capture, CaptureError, Captures, Dumped, KernelLog, Target, Turn, begin_into};
use crate::model::generation::AnyGeneration;
use crate::platform::ambient;
use crate::platform::clock;
use crate::platform::events::Draft;
use crate::platform::fleet::GetSurvivors;
use crate::platform::operations::Handle;

/// Interval between progress updates of an operation.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Checks whether a dump can be written to `path`.
///
/// # Errors
/// When the file exists already, or its directory does not exist.
pub async fn check_output(path: &Path) -> Result<(), Failure> {
    let invalid = |text: String| Err(Failure::new(FailureKind::InvalidRequest, text));
    if !path.is_absolute() {
        return invalid(format!("output: {path:?} is not an absolute path"));
    }
    if path.file_name().is_none() {
        return invalid(format!("output: {path:?} names no file"));
    }
    let output = path.to_owned();
    if ambient::io(move || std::fs::symlink_metadata(output))
        .await
        .is_ok()
    {
        let text = format!("{path:?} exists already, and is not overwritten");
        return Err(Failure::new(FailureKind::AlreadyExists, text).hint("name another file"));
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    let named = directory.to_owned();
    match ambient::io(move || std::fs::metadata(named)).await {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => invalid(format!("output: {directory:?} is not a directory")),
        Err(error) => invalid(format!("output: the directory {directory:?}: {error}")),
    }
}

/// A capture on request.
pub(crate) struct ByHand {
    pub(crate) captures: Captures,
    pub(crate) survivors: Recipient<GetSurvivors>,
    pub(crate) row: AnyGeneration,
    pub(crate) output: PathBuf,
    pub(crate) turn: Turn,
    pub(crate) operation: Handle,
}

/// The result, without the generation's row.
enum End {
    Done(Dumped),
    Failed(CaptureError),
    Cancelled,
}

/// The state of a capture under way.
struct Under {
    begun: Instant,
    frozen_since: Option<Instant>,
    frozen: Option<Duration>,
    not_resumed: Option<String>,
    log: Option<Result<KernelLog, String>>,
}

impl ByHand {
    /// Runs the capture and ends the operation. Returns the generation's row in its new state.
    pub(crate) async fn run(self) -> AnyGeneration {
        let Self {
            captures,
            survivors: others,
            mut row,
            output,
            turn,
            operation,
        } = self;
        let mut under = Under {
            begun: clock::now(),
            frozen_since: None,
            frozen: None,
            not_resumed: None,
            log: None,
        };
        operation.step("freezing");
        // The daemon alone reads an instance that will be resumed: lending memory takes longer than a freeze may.
        let ask = GetSurvivors(row.instance.clone());
        let survivors = match row.certificate() {
            Some(_) => others.send(ask).await.unwrap_or_default(),
            None => Vec::new(),
        };
        let end = match captures.generations.freeze(&mut row).await {
            Err(error) => End::Failed(error.into()),
            Ok(since) => {
                under.frozen_since = since;
                let end = under
                    .capture(
                        &captures,
                        &mut row,
                        survivors,
                        output.clone(),
                        turn,
                        &operation,
                    )
                    .await;
                under.thaw(&captures, &mut row).await;
                end
            }
        };
        under.tell(&captures, &row, end, &output, operation);
        row
    }
}

impl Under {
    async fn capture(
        &mut self,
        captures: &Captures,
        row: &mut AnyGeneration,
        survivors: Vec<AnyGeneration>,
        output: PathBuf,
        turn: Turn,
        operation: &Handle,
    ) -> End {
        if row.certificate().is_none() {
            captures.generations.save_registers(row).await;
        }
        let target = Target::File(output.clone());
        let begun = begin_into(captures, row, survivors, target, turn).await;
        let Capture {
            mut log,
            read,
            mut dumping,
        } = match begun {
            Ok(capture) => capture,
            Err(error) => return End::Failed(error),
        };
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        let (mut log_awaited, mut reads) = (true, true);
        let end = loop {
            tokio::select! {
                // In this order: progress is reported before the end.
                biased;
                told = &mut log, if log_awaited => {
                    log_awaited = false;
                    self.log_read(captures, row, told.ok());
                }
                () = read.notified(), if reads => {
                    reads = false;
                    self.thaw(captures, row).await;
                    operation.step("syncing and verifying");
                }
                () = operation.cancelled() => break End::Cancelled,
                dumped = dumping.done() => match dumped {
                    Ok(dumped) => break End::Done(dumped),
                    Err(error) => break End::Failed(error),
                },
                _ = tick.tick(), if reads => {
                    let (done, total) = dumping.progress();
                    let step = "reading its memory".to_owned();
                    operation.progress(Progress { step, done, total, unit: "bytes".to_owned() });
                }
            }
        };
        if let End::Cancelled = end {
            // Resume without waiting for the thread to end.
            self.thaw(captures, row).await;
            match dumping.stop().await {
                Some(Ok(dumped)) => return End::Done(dumped),
                Some(Err(_)) => remove_partial(captures, row, &output).await,
                None => {}
            }
        }
        end
    }

    async fn thaw(&mut self, captures: &Captures, row: &mut AnyGeneration) {
        let Some(since) = self.frozen_since.take() else {
            return;
        };
        self.not_resumed = captures.generations.thaw(row).await.err();
        self.frozen = Some(clock::now() - since);
    }

    fn log_read(
        &mut self,
        captures: &Captures,
        row: &AnyGeneration,
        log: Option<Result<KernelLog, String>>,
    ) {
        let draft =
            |text: String| Draft::of(EventKind::Vmcore, &row.instance, row.generation, text);
        match &log {
            Some(Ok(log)) => {
                let end = log.panic.as_deref().unwrap_or("it says of no panic");
                let tail = serde_json::json!({ "kernel_log_tail": log.tail });
                let said = draft(format!("its kernel's log: {end}"));
                captures.platform.events.publish(said.with(tail));
            }
            Some(Err(reason)) => {
                let text = format!("its kernel's log could not be read: {reason}");
                captures.platform.events.publish(draft(text));
            }
            None => {}
        }
        self.log = log;
    }

    /// Reports to the operation and to the event stream.
    fn tell(
        self,
        captures: &Captures,
        row: &AnyGeneration,
        end: End,
        output: &Path,
        operation: Handle,
    ) {
        let path = output.display().to_string();
        let said = match &end {
            End::Done(_) => format!("captured: {path}"),
            End::Failed(error) => format!("not captured: {error}"),
            End::Cancelled => format!("the capture into {path} was cancelled"),
        };
        captures.platform.events.publish(Draft::of(
            EventKind::Vmcore,
            &row.instance,
            row.generation,
            said,
        ));
        let report = match end {
            End::Cancelled => return operation.undone(None),
            End::Failed(error) => return operation.fail(refusal(&row.instance, &error), None),
            End::Done(dumped) => self.report(row, dumped, path),
        };
        let written = report.path.clone();
        let result = Some(OperationResult::Capture(Box::new(report)));
        match self.not_resumed {
            None => operation.succeed(result),
            Some(reason) => {
                let text = format!(
                    "{} is written, but {} stands still: it could not be resumed: {reason}",
                    written, row.instance
                );
                let error = Failure::new(FailureKind::Internal, text).hint(Command::SeeHealing {
                    instance: row.instance.clone(),
                });
                operation.fail(error, result);
            }
        }
    }

    fn report(&self, row: &AnyGeneration, dumped: Dumped, path: String) -> CaptureReport {
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let (log, log_error) = match self.log.clone() {
            Some(Ok(log)) => (Some(log), None),
            Some(Err(reason)) => (None, Some(reason)),
            None => (None, None),
        };
        CaptureReport {
            name: row.instance.clone(),
            generation: row.generation,
            path,
            bytes: dumped.bytes,
            not_filtered: dumped.not_filtered,
            read_by: dumped.read_by,
            panic: log.and_then(|log| log.panic),
            log_error,
            frozen_ms: self.frozen.map(millis),
            total_ms: millis(clock::now() - self.begun),
        }
    }
}

/// Removes the partial file of a cancelled capture.
async fn remove_partial(captures: &Captures, row: &AnyGeneration, output: &Path) {
    let partial = partial_path(output);
    let file = partial.clone();
    if let Err(error) = ambient::io(move || std::fs::remove_file(file)).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        warn!(captures.platform.log, "a cancelled capture has left its file"; "instance" => &row.instance,
            "generation" => row.generation, "file" => ?partial, "error" => %error);
    }
}

fn refusal(instance: &str, error: &CaptureError) -> Failure {
    let code = match error {
        CaptureError::Journal(_) => FailureKind::JournalUnavailable,
        CaptureError::Memory(_) => FailureKind::WrongState,
        CaptureError::Write(WriteError::Exists { .. }) => FailureKind::AlreadyExists,
        CaptureError::Write(WriteError::NoRoom { .. } | WriteError::Create { .. }) => {
            FailureKind::Unavailable
        }
        CaptureError::TimedOut => FailureKind::Timeout,
        _ => FailureKind::Internal,
    };
    Failure::new(
        code,
        format!("the memory of {instance} was not captured: {error}"),
    )
}
