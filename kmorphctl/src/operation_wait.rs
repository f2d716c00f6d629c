//! Follows an operation to its end.
//!
//! The daemon does the work whether or not a client waits: Ctrl-C, a time limit or a broken connection end only the
//! waiting, and the error message says how to resume it.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use kmorph_control_api::address::{path, query};
use kmorph_control_api::{OPERATION_WAIT_MAX_MS, Operation, OperationKind, OperationState};

use crate::cli::WaitArgs;
use crate::client::{Answer, Client};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;

/// Interval between spinner updates.
const SPINNER_TICK: Duration = Duration::from_millis(100);
/// Minimum wait requested from the daemon: a shorter one would mean constant requests.
const WAIT_MIN_MS: u64 = 10;

/// Returns an operation's kind, for people.
pub(crate) fn kind_name(kind: OperationKind) -> &'static str {
    match kind {
        OperationKind::Spawn => "spawn",
        OperationKind::Terminate => "terminate",
        OperationKind::Recover => "recover",
        OperationKind::MorphPrepare => "morph prepare",
        OperationKind::MorphValidate => "morph validate",
        OperationKind::MorphCommit => "morph commit",
        OperationKind::MorphRollback => "morph rollback",
        OperationKind::Morph => "morph",
        OperationKind::VmcoreCapture => "vmcore capture",
        OperationKind::Doctor => "self-test",
    }
}

/// Returns an operation's state, for people.
pub(crate) fn state_name(state: OperationState) -> &'static str {
    match state {
        OperationState::Running => "running",
        OperationState::Succeeded => "succeeded",
        OperationState::Failed => "failed",
        OperationState::Cancelled => "cancelled",
    }
}

/// Waits as requested and returns the operation: finished successfully, or still in progress with `--no-wait`.
///
/// # Errors
/// If it failed or was cancelled (JSON output shows it all the same), or if the wait ended first.
pub(crate) async fn finish(
    client: &Client,
    out: &mut Output,
    begun: Answer<Operation>,
    wait: WaitArgs,
) -> Result<Answer<Operation>, Failure> {
    if wait.no_wait {
        return Ok(begun);
    }
    let ended = follow(client, out, begun, wait.wait_timeout).await?;
    match failure_of(&ended.value) {
        None => Ok(ended),
        Some(failure) => {
            if out.is_json() {
                out.json(&ended.raw)?;
            }
            Err(failure)
        }
    }
}

fn failure_of(operation: &Operation) -> Option<Failure> {
    let what = format!(
        "{} of {} ({})",
        kind_name(operation.kind),
        operation.instance,
        operation.id
    );
    match operation.state {
        OperationState::Running | OperationState::Succeeded => None,
        OperationState::Cancelled => {
            let text = format!("the {what} was cancelled and undone");
            Some(Failure::new(Exit::OperationFailed, text))
        }
        OperationState::Failed => Some(match operation.error.clone() {
            Some(mut error) => {
                error.message = format!("the {what} failed: {}", error.message);
                Failure::operation(error)
            }
            None => Failure::new(Exit::OperationFailed, format!("the {what} failed")),
        }),
    }
}

/// Waits until the operation ends, successfully or not.
async fn follow(
    client: &Client,
    out: &Output,
    begun: Answer<Operation>,
    limit_s: Option<f64>,
) -> Result<Answer<Operation>, Failure> {
    let id = begun.value.id.clone();
    let what = format!(
        "{} of {}",
        kind_name(begun.value.kind),
        begun.value.instance
    );
    let bar = Progress::new(out.shows_progress() && !begun.value.is_over());
    let stopped = |exit, why: &str| {
        let text = format!("stopped waiting for the {what} ({why}); operation {id} continues");
        let hint = format!("`kmorphctl operation watch {id}` resumes waiting");
        Failure::new(exit, text).hint(hint)
    };
    tokio::select! {
        ended = poll(client, begun, &bar) => {
            bar.clear();
            ended.map_err(|failure| lost(failure, &what, &id))
        }
        _ = tokio::signal::ctrl_c() => {
            bar.clear();
            Err(stopped(Exit::Interrupted, "Ctrl-C"))
        }
        () = limit(limit_s) => {
            bar.clear();
            Err(stopped(Exit::TimedOut, "--wait-timeout"))
        }
    }
}

async fn limit(seconds: Option<f64>) {
    match seconds {
        Some(seconds) => tokio::time::sleep(Duration::from_secs_f64(seconds)).await,
        None => std::future::pending().await,
    }
}

fn lost(mut failure: Failure, what: &str, id: &str) -> Failure {
    failure.message = format!("while waiting for the {what}: {}", failure.message);
    if matches!(failure.exit, Exit::Unreachable | Exit::TimedOut) {
        failure.next_step = Some(format!(
            "the operation continues, or the daemon finishes or undoes it at its next start; then run \
             `kmorphctl operation watch {id}`"
        ));
    }
    failure
}

/// Polls until the operation ends. The daemon delays each answer until something changes.
async fn poll(
    client: &Client,
    begun: Answer<Operation>,
    bar: &Progress,
) -> Result<Answer<Operation>, Failure> {
    let mut now = begun;
    while !now.value.is_over() {
        bar.show(&now.value);
        let seen = now.value.revision;
        let asked = Instant::now();
        let pairs = [
            ("wait_ms", Some(OPERATION_WAIT_MAX_MS.to_string())),
            ("seen", Some(seen.to_string())),
        ];
        let address = path(&["operations", &now.value.id]) + &query(&pairs);
        let wait = Duration::from_millis(OPERATION_WAIT_MAX_MS);
        now = client.get_waiting(&address, wait).await?;
        let too_soon = asked.elapsed() < Duration::from_millis(WAIT_MIN_MS);
        if !now.value.is_over() && now.value.revision == seen && too_soon {
            tokio::time::sleep(Duration::from_millis(WAIT_MIN_MS)).await;
        }
    }
    Ok(now)
}

/// The progress display on the terminal, if any.
struct Progress(Option<ProgressBar>);

impl Progress {
    fn new(shown: bool) -> Self {
        Self(shown.then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(SPINNER_TICK);
            bar
        }))
    }

    fn show(&self, operation: &Operation) {
        let Some(bar) = &self.0 else { return };
        let progress = &operation.progress;
        let template = match (progress.total, progress.unit.as_str()) {
            (0, _) => "{spinner} {msg} ({elapsed})",
            (_, "bytes") => {
                "{spinner} {msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} ({elapsed})"
            }
            _ => "{spinner} {msg} [{bar:30}] {pos}/{len} ({elapsed})",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        if progress.total > 0 {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        }
        let mut text = format!("{} {}", kind_name(operation.kind), operation.instance);
        // An operation has no step before its first one.
        if !progress.step.is_empty() {
            text.push_str(": ");
            text.push_str(&progress.step);
        }
        bar.set_message(crate::output::printable(&text));
    }

    fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
