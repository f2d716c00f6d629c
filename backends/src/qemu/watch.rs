//! Detects the end of a guest: one task per guest, for all callers.
//!
//! ```text
//!  events.sock ─ GUEST_PANICKED ─▶ its kernel panicked (QEMU has stopped the guest)
//!              ─ SHUTDOWN ───────▶ reset, or ended by itself (QEMU exits next)
//!  pidfd       ─ readable ───────▶ QEMU's own end: a signal, a status
//! ```
//!
//! The first cause is kept: the event says more than the exit that follows it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::console;
use super::qmp::{Event, Qmp};
use super::run_dir;
use crate::contract::{ExitCause, ProcessId};
use crate::process::Exits;

/// Pause before the next attempt at the event socket, which QEMU creates early in its start.
const RETRY_EVERY: Duration = Duration::from_millis(50);

type Key = (i32, u64);
type Seen = watch::Receiver<Option<ExitCause>>;

/// The watched generations.
#[derive(Default)]
pub(super) struct Watches {
    known: Mutex<HashMap<Key, (Seen, AbortHandle)>>,
}

impl Watches {
    /// Completes with the cause once the guest behind this QEMU has ended.
    pub(super) async fn ended(
        &self,
        qemu: &ProcessId,
        run_dir: &Path,
        exits: &Arc<Exits>,
    ) -> ExitCause {
        let mut seen = self.start(qemu, run_dir, exits);
        match seen.wait_for(Option::is_some).await.map(|c| c.clone()) {
            Ok(Some(cause)) => cause,
            // `forget` ended the watch: the generation is released, so the cause is not needed.
            Ok(None) | Err(_) => ExitCause::Exited { status: None },
        }
    }

    /// Returns the cause, if the end was observed.
    pub(super) fn seen(&self, qemu: &ProcessId) -> Option<ExitCause> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (seen, _) = known.get(&key(qemu))?;
        seen.borrow().clone()
    }

    /// Ends the watch of a released generation.
    pub(super) fn forget(&self, qemu: &ProcessId) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, task)) = known.remove(&key(qemu)) {
            task.abort();
        }
    }

    fn start(&self, qemu: &ProcessId, run_dir: &Path, exits: &Arc<Exits>) -> Seen {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = || {
            let (sender, receiver) = watch::channel(None);
            let (qemu, run_dir, exits) = (qemu.clone(), run_dir.to_owned(), Arc::clone(exits));
            let task = tokio::spawn(async move {
                let cause = end_of(&qemu, &run_dir, &exits).await;
                let _ = sender.send(Some(cause));
                // Keep the channel open for later callers.
                sender.closed().await;
            });
            (receiver, task.abort_handle())
        };
        known.entry(key(qemu)).or_insert_with(begin).0.clone()
    }
}

fn key(process: &ProcessId) -> Key {
    (process.pid, process.start_ticks)
}

async fn end_of(qemu: &ProcessId, directory: &Path, exits: &Exits) -> ExitCause {
    let events = directory.join(run_dir::EVENTS);
    let by_event = async {
        loop {
            if let Some(cause) = first_event(&events).await {
                return cause;
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
    };
    tokio::select! {
        biased;
        cause = by_event => cause,
        cause = own_end(qemu, exits) => cause,
        never = keep_logs_bounded(directory) => match never {},
    }
}

/// Waits for QEMU's own end. Exit status 0 is the guest's power-off whose event was missed.
async fn own_end(qemu: &ProcessId, exits: &Exits) -> ExitCause {
    match exits.wait(qemu).await {
        Ok(ExitCause::Exited { status: Some(0) }) => ExitCause::Exited { status: None },
        Ok(cause) => cause,
        // Without a pidfd its end cannot be observed here; its events and the heartbeats will detect it.
        Err(_) => std::future::pending().await,
    }
}

/// Waits for the first event that is an end; `None` if the connection ends without one.
async fn first_event(socket: &Path) -> Option<ExitCause> {
    let mut qmp = Qmp::connect(socket).await.ok()?;
    // Only the status shows a panic before this connection.
    if qmp.status().await.ok()? == "guest-panicked" {
        return Some(ExitCause::KernelPanicked);
    }
    loop {
        if let Some(cause) = cause_of(&qmp.event().await.ok()?) {
            return Some(cause);
        }
    }
}

/// Returns the end that an event reports, if any.
fn cause_of(event: &Event) -> Option<ExitCause> {
    match event.name.as_str() {
        "GUEST_PANICKED" | "GUEST_CRASHLOADED" => Some(ExitCause::KernelPanicked),
        "SHUTDOWN" => match event.data["reason"].as_str() {
            Some("guest-reset") => Some(ExitCause::Reset),
            Some("guest-shutdown") => Some(ExitCause::Exited { status: None }),
            Some("guest-panic") => Some(ExitCause::KernelPanicked),
            // Ended from outside: the exit status shows how.
            _ => None,
        },
        _ => None,
    }
}

async fn keep_logs_bounded(directory: &Path) -> Infallible {
    loop {
        tokio::time::sleep(console::LOOK_EVERY).await;
        for log in run_dir::LOGS {
            // If the rotation fails, the next check repeats it.
            let _ = console::bound(&directory.join(log));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_event_says_how_the_kernel_ended() {
        let event = |name: &str, reason: &str| Event {
            name: name.to_owned(),
            data: json!({ "reason": reason }),
        };
        let cause = |name, reason| cause_of(&event(name, reason));
        assert_eq!(cause("GUEST_PANICKED", ""), Some(ExitCause::KernelPanicked));
        assert_eq!(cause("SHUTDOWN", "guest-reset"), Some(ExitCause::Reset));
        assert_eq!(
            cause("SHUTDOWN", "guest-shutdown"),
            Some(ExitCause::Exited { status: None })
        );
        assert_eq!(cause("SHUTDOWN", "host-signal"), None);
        assert_eq!(cause("RTC_CHANGE", ""), None);
    }
}
