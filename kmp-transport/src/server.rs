//! The instance's end: accepts connections and identifies them.
//!
//! Bounds: at most [`PENDING_MAX`] connections may be between accept and HELLO, each until its deadline; a new
//! connection evicts the oldest, so that a flood of silent connections never keeps the daemon out. Identified
//! connections are handed over through a queue of [`IDENTIFIED_MAX`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::connection::{Connection, HELLO_TIMEOUT, welcome};
use crate::link::{Accepted, Listener, accept_line};
use crate::speaker::Speaker;

/// Connections that may be between accept and HELLO.
pub const PENDING_MAX: usize = 64;
/// Identified connections that may wait to be taken.
pub const IDENTIFIED_MAX: usize = 8;
/// Pause after accept failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Refusals that are reported in one [`REPORT_WINDOW`]; the rest are counted.
pub const REPORTS_MAX: u32 = 10;
/// See [`REPORTS_MAX`].
pub const REPORT_WINDOW: Duration = Duration::from_secs(10);

/// Keeps whoever connects a hundred thousand times from filling the log.
struct Reports<R> {
    report: R,
    window: Mutex<Window>,
}

struct Window {
    began: Instant,
    told: u32,
    kept_back: u64,
}

impl<R: Fn(&str)> Reports<R> {
    fn new(report: R) -> Self {
        let window = Mutex::new(Window {
            began: Instant::now(),
            told: 0,
            kept_back: 0,
        });
        Self { report, window }
    }

    fn tell(&self, text: &str) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.elapsed() >= REPORT_WINDOW {
            if window.kept_back > 0 {
                (self.report)(&format!("{} more were refused", window.kept_back));
            }
            *window = Window {
                began: Instant::now(),
                told: 0,
                kept_back: 0,
            };
        }
        if window.told < REPORTS_MAX {
            window.told += 1;
            (self.report)(text);
        } else {
            window.kept_back += 1;
        }
    }
}

/// Accepts on `listener` until the receiver is dropped, and yields identified connections. Reports refusals to
/// `report`, at most [`REPORTS_MAX`] per [`REPORT_WINDOW`].
pub fn serve(
    listener: Listener,
    identity: impl Into<Speaker>,
    report: impl Fn(&str) + Send + Sync + 'static,
) -> mpsc::Receiver<Connection> {
    let (sender, receiver) = mpsc::channel(IDENTIFIED_MAX);
    let identity = identity.into();
    let reports = Arc::new(Reports::new(report));
    tokio::spawn(async move {
        let mut pending = VecDeque::<AbortHandle>::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let accepted = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    reports.tell(&format!("accepting a connection: {error}"));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            pending.retain(|task| !task.is_finished());
            if pending.len() == PENDING_MAX
                && let Some(oldest) = pending.pop_front()
            {
                oldest.abort();
            }
            let (identity, sender) = (identity.clone(), sender.clone());
            let reports = Arc::clone(&reports);
            let task = tokio::spawn(async move {
                match identify(accepted, &identity).await {
                    Ok(connection) => {
                        let _ = sender.send(connection).await;
                    }
                    Err(reason) => reports.tell(&reason),
                }
            });
            pending.push_back(task.abort_handle());
        }
    });
    receiver
}

/// Under one deadline: whoever takes its time for the line has less for HELLO.
async fn identify(accepted: Accepted, identity: &Speaker) -> Result<Connection, String> {
    let refused = |error: &dyn std::fmt::Display| format!("a connection was refused: {error}");
    let identified = async {
        let link = accept_line(accepted)
            .await
            .map_err(|error| refused(&error))?;
        let welcomed = welcome(link, identity).await;
        welcomed.map_err(|error| refused(&error))
    };
    let identified = tokio::time::timeout(HELLO_TIMEOUT, identified).await;
    identified.unwrap_or_else(|_| {
        Err(format!(
            "a connection sent no HELLO within {HELLO_TIMEOUT:?}"
        ))
    })
}
