//! The instance's end: accepts connections and identifies them.
//!
//! Bounds: [`PENDING_MAX`] connections may be between accept and HELLO, each for at most its
//! deadlines; the oldest gives way to a newcomer, so that a flood of silent connections never keeps
//! the daemon out. What is identified is handed over through a queue of [`IDENTIFIED_MAX`].

use std::collections::VecDeque;

use kmp_proto::message::Hello;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::connection::{Connection, HELLO_TIMEOUT, welcome};
use crate::link::{Accepted, Listener, accept_line};

/// Connections that may be between accept and HELLO.
pub const PENDING_MAX: usize = 64;
/// Identified connections that may wait to be taken.
pub const IDENTIFIED_MAX: usize = 8;
/// Pause after accept failed for lack of descriptors or memory.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Accepts on `listener` for as long as the receiver lives, and yields identified connections.
/// Refusals are told to `report`, at most once for each connection.
pub fn serve(
    listener: Listener,
    identity: Hello,
    report: impl Fn(&str) + Send + Sync + Clone + 'static,
) -> mpsc::Receiver<Connection> {
    let (sender, receiver) = mpsc::channel(IDENTIFIED_MAX);
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
                    report(&format!("accepting a connection: {error}"));
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
            let (identity, sender, report) = (identity.clone(), sender.clone(), report.clone());
            let task = tokio::spawn(async move {
                match identify(accepted, &identity).await {
                    Ok(connection) => {
                        let _ = sender.send(connection).await;
                    }
                    Err(reason) => report(&reason),
                }
            });
            pending.push_back(task.abort_handle());
        }
    });
    receiver
}

async fn identify(accepted: Accepted, identity: &Hello) -> Result<Connection, String> {
    let link = tokio::time::timeout(HELLO_TIMEOUT, accept_line(accepted))
        .await
        .map_err(|_| format!("a connection asked for no port within {HELLO_TIMEOUT:?}"))?
        .map_err(|error| format!("a connection was refused: {error}"))?;
    welcome(link, identity)
        .await
        .map_err(|error| format!("a connection was refused: {error}"))
}
