//! Handles a failed spawn: the error states the cause, and nothing of the instance remains.
//!
//! ```text
//! spawned ─┬─ first healthy answer, its program runs ─▶ the operation succeeds
//!          └─ its program ended, its kernel or agent failed ─▶ recorded ─▶ fenced ─▶ forgotten ─▶ the operation fails
//! ```
//!
//! The daemon heals only an instance that has served. A failed start is reported at once, and the user has nothing to
//! clean up.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::model::{Failure, FailureKind, guest_text};
use actix::prelude::*;
use kmorph_backends::contract::{BackendKind, PANIC_LINE};
use kmp_proto::instance::{Desired, Event};
use kmp_proto::message::{HealthStatusFixed, WorkloadState};
use slog::warn;

use super::Instance;
use super::ending::end;
use crate::platform::ambient;
use crate::platform::journal::{JournalError, Proposal, Propose};
use crate::platform::operations::Handle;
use crate::watch::CONSOLE_SAID;

/// Bytes at the end of a log that an error may quote from.
const SEARCH_BYTES: u64 = 64 * 1024;
/// Maximum number of quoted lines.
const QUOTE_LINES: usize = 8;
/// Lines of the agent's log about connections: not quoted, because they would crowd out the program's output.
const ABOUT_CONNECTIONS: [&str; 2] = [" DEBG ", " INFO connection ended,"];

impl Instance {
    /// Handles a healthy answer: the instance answers and reports no fault. A program that ended with success is
    /// no fault for its agent, but the spawn has not succeeded.
    pub(super) fn answered(&mut self, release: String, ctx: &mut Context<Self>) {
        if !self.engine.is_spawning() || self.row.spec.workload.is_none() {
            return self.healthy(release, ctx);
        }
        let asked = self.figures().into_actor(self);
        ctx.spawn(asked.map(|figures, act, ctx| {
            let state = figures
                .and_then(|f| f.last)
                .map(|answer| answer.fixed.workload);
            if act.engine.is_spawning() && state == Some(WorkloadState::Exited) {
                let said = act.health.take().map(|health| health.text);
                let text = said.filter(|text| !text.is_empty());
                let text = text.unwrap_or_else(|| "the workload ended by itself".to_owned());
                act.tell(Event::ProgramEnded(text), ctx);
                return;
            }
            act.healthy(release, ctx);
        }));
    }

    /// Fails the spawn if the agent reports that the program has ended.
    pub(super) fn check_spawn(&mut self, ctx: &mut Context<Self>) {
        let said = self.health.as_ref().filter(|h| has_ended(&h.fixed));
        if let Some(text) = said.map(|health| health.text.clone()) {
            self.tell(Event::ProgramEnded(text), ctx);
        }
    }

    /// Ends the spawned instance and fails its operation.
    pub(super) fn give_up_spawn(&mut self, reason: String, ctx: &mut Context<Self>) {
        // A spawn under way has a waiting operation.
        let Some(operation) = self.waiting.take() else {
            return;
        };
        // Record it first: the next daemon continues after a crash.
        let propose = Propose {
            proposal: Proposal::Wish(Desired::Terminating),
            with: Vec::new(),
        };
        self.propose(propose, ctx, move |act, written, ctx| {
            act.end_spawned(reason, operation, written, ctx);
        });
    }

    fn end_spawned(
        &mut self,
        reason: String,
        operation: Handle,
        written: Result<(), JournalError>,
        ctx: &mut Context<Self>,
    ) {
        self.row.drop_reports();
        let (services, ending) = (self.services.clone(), self.ending(true, ctx));
        let (name, run_dir) = (self.row.name.clone(), self.generation.run_dir.clone());
        let work = async move {
            let hint = last_words(services.backend().kind(), run_dir).await;
            // The hint quotes the console already.
            let reason = without_console(reason);
            let (operation, ended) = match written {
                Ok(()) => end(&services, ending, operation).await,
                Err(error) => (Some(operation), Err(error.to_string())),
            };
            let text = format!("{name} did not start: {reason}");
            let error = match &ended {
                Ok(()) => Failure::new(FailureKind::StartFailed, text).hint(hint),
                Err(left) => {
                    let text = format!("{text}; and it could not be removed: {left}");
                    Failure::new(FailureKind::OperatorActionNeeded, text)
                        .hint("when the cause is gone, terminate it")
                }
            };
            (ended, operation, error)
        };
        ctx.spawn(
            work.into_actor(self)
                .map(|(ended, operation, error), act, ctx| {
                    let event = match ended {
                        Ok(()) => Event::Ended,
                        Err(reason) => {
                            warn!(act.log, "a failed spawn was not removed";
                                "generation" => act.generation.generation, "reason" => &reason);
                            Event::NotEnded(reason)
                        }
                    };
                    act.tell(event, ctx);
                    // Last, because the caller may then spawn again under the same name.
                    if let Some(operation) = operation {
                        operation.fail(error, None);
                    }
                }),
        );
    }
}

/// Returns the evidence of a failure without the console line, which is the last one.
fn without_console(mut reason: String) -> String {
    if let Some(at) = reason.find(&format!("; {CONSOLE_SAID}")) {
        reason.truncate(at);
    }
    reason
}

/// Returns whether the program has ended at least once.
fn has_ended(said: &HealthStatusFixed) -> bool {
    matches!(said.workload, WorkloadState::Failed | WorkloadState::Exited) || said.restarts > 0
}

/// Returns the hint for a failed spawn: the end of the instance's log, which is removed with the instance.
async fn last_words(kind: BackendKind, run_dir: std::path::PathBuf) -> String {
    let log = match kind.start_log() {
        Ok(log) => log,
        Err(instead) => return instead.to_owned(),
    };
    let read = ambient::blocking(move || tail(&run_dir.join(log))).await;
    match read.ok().and_then(Result::ok).filter(|l| !l.is_empty()) {
        Some(lines) => format!("its {log} ended with:\n{}", lines.join("\n")),
        None => format!("its {log} is empty"),
    }
}

/// Returns the last lines of a log, without control characters.
fn tail(log: &Path) -> std::io::Result<Vec<String>> {
    let mut file = std::fs::File::options()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOFOLLOW)
        .open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(SEARCH_BYTES)))?;
    let mut end = Vec::new();
    file.take(SEARCH_BYTES).read_to_end(&mut end)?;
    let text = String::from_utf8_lossy(&end);
    let mut lines: Vec<_> = text
        .lines()
        .filter(|line| !ABOUT_CONNECTIONS.iter().any(|words| line.contains(words)))
        .collect();
    if lines.len() > QUOTE_LINES && length > SEARCH_BYTES {
        // The first line is incomplete.
        lines.remove(0);
    }
    // The lines after a kernel's panic line are a trace.
    if let Some(panic) = lines.iter().rposition(|line| line.contains(PANIC_LINE)) {
        lines.truncate(panic + 1);
    }
    let shown = lines.iter().skip(lines.len().saturating_sub(QUOTE_LINES));
    Ok(shown
        .map(|line| format!("    {}", guest_text::line(line)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_quoted_without_what_steers_a_terminal() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("agent.log");
        let numbers: String = (0..QUOTE_LINES).map(|n| format!("{n}\n")).collect();
        std::fs::write(&log, format!("{numbers}\u{1b}[2Jlast\n")).unwrap();
        let lines = tail(&log).unwrap();
        assert_eq!(lines.len(), QUOTE_LINES);
        assert_eq!(lines[0], "    1");
        assert_eq!(lines[QUOTE_LINES - 1], "    \\u{1b}[2Jlast");
        let ended =
            "Nov 30 06:00:00.000 INFO connection ended, reason: end of file, channel: heartbeat\n";
        std::fs::write(&log, format!("the cause\n{}", ended.repeat(6))).unwrap();
        assert_eq!(tail(&log).unwrap(), ["    the cause"]);
        std::fs::write(&log, vec![b'x'; 10_000]).unwrap();
        assert!(tail(&log).unwrap()[0].len() < 600);
        let panic = "[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs";
        let trace = "[    1.1]  entry_SYSCALL_64+0x68\n".repeat(100);
        std::fs::write(&log, format!("before\n{panic}\n{trace}")).unwrap();
        let panic = format!("    {panic}");
        assert_eq!(tail(&log).unwrap(), ["    before", panic.as_str()]);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&log, &link).unwrap();
        assert!(tail(&link).is_err());
    }
}
