//! The instance's program: starts, supervises and queries it.
//!
//! ```text
//!              registered, or alive for PLAIN_AFTER
//!  [Starting] ─────────────▶ [Running] ⇄ [Frozen] ──▶ [Retired]
//!      ▲ │                      │           │
//!      │ └── ends ──────────────┤           └── ends ──▶ [Failed]
//!      │                        ▼
//!      └──── back-off ──── [Starting] … RESTARTS_MAX in a row ──▶ [Failed]
//!  [Starting] ── the same, target of a morph ──▶ [Awaiting] ── Serve ──▶ [Running]
//! ```
//!
//! Invariants: the agent never restarts a program that holds or awaits the state of a morph, because its successor
//! would start with empty state; a program that has retired stays ended.

mod launch;
mod memory;
mod supervisor;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kmorph_launch::WorkloadSpec;
use kmorph_workload::handover::message::{Reply, Request};
use kmorph_workload::handover::{AgentEndError, Incoming};
use kmp_proto::message::WorkloadState;
use slog::Logger;
use tokio::sync::{mpsc, oneshot, watch};

use crate::logging::Log;
use crate::priority::Scheduling;

pub use launch::LaunchError;
pub use memory::{Held, Memory};

/// Time after which a live program that has not registered counts as one that does not support morphs.
pub const PLAIN_AFTER: Duration = Duration::from_secs(1);
/// The same for the target of a morph: longer, since no client waits for its answers yet.
pub const STANDBY_PLAIN_AFTER: Duration = Duration::from_secs(5);
/// First pause before the program is started again; doubled each time.
pub const RESTART_PAUSE: Duration = Duration::from_millis(100);
/// Longest such pause.
pub const RESTART_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Failures in a row before the agent gives up.
pub const RESTARTS_MAX: u32 = 5;
/// Run time after which a program counts as successfully started: the failure counter is reset.
pub const SETTLED_AFTER: Duration = Duration::from_secs(10);
/// Time a program has to end after SIGTERM.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests that may wait for the program.
const REQUESTS_MAX: usize = 16;

/// The condition of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Its current state.
    pub state: WorkloadState,
    /// Whether it takes part in morphs.
    pub cooperative: bool,
    /// How it last ended: exit status, or minus the signal.
    pub exit_status: i32,
    /// Times it was started again.
    pub restarts: u32,
    /// The latest event, for people.
    pub text: String,
    /// Its process, while there is one.
    pub pid: Option<i32>,
}

/// The program and its start parameters.
#[derive(Debug)]
pub struct Plan {
    /// The program.
    pub spec: WorkloadSpec,
    /// The instance it belongs to.
    pub instance: String,
    /// Its generation.
    pub generation: u64,
    /// The release to report.
    pub kernel_release: String,
    /// Its listening sockets, with their names.
    pub listeners: Vec<(String, OwnedFd)>,
    /// The target of a morph.
    pub standby: bool,
    /// Whether the target is given the listening sockets too. In the embedded backend they come
    /// with the state, and two programs that hold them would both be connected to.
    pub standby_listeners: bool,
    /// The memory that it may use.
    pub memory: Memory,
    /// How it is scheduled: as the agent was at its start.
    pub scheduling: Scheduling,
    /// Destination of its output.
    pub output: Log,
}

struct Ask {
    request: Request,
    data: Vec<u8>,
    fds: Vec<OwnedFd>,
    within: Duration,
    reply: oneshot::Sender<Result<Incoming<Reply>, AskError>>,
}

/// Why the program did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is none, or it has ended.
    #[error("the workload is not running ({0})")]
    NotRunning(&'static str),
    /// The program has not registered, so it does not support morphs.
    #[error("the workload does not support morphs: it has not registered with its agent")]
    NotCooperative,
    /// The exchange failed, or it refused.
    #[error(transparent)]
    Exchange(#[from] AgentEndError),
}

/// The agent's handle on its program. Clones share it.
#[derive(Clone, Debug)]
pub struct Workload {
    asks: Option<mpsc::Sender<Ask>>,
    condition: watch::Receiver<Condition>,
    stop: Arc<tokio::sync::Notify>,
}

impl Workload {
    /// No program: the instance runs only its agent.
    pub fn none() -> Self {
        let (_, condition) = watch::channel(Condition::new(WorkloadState::None));
        Self {
            asks: None,
            condition,
            stop: Arc::default(),
        }
    }

    /// For tests of whoever shows what becomes of a program: nothing runs, and `condition` says what is known.
    #[cfg(test)]
    pub(crate) fn told_by(condition: watch::Receiver<Condition>) -> Self {
        Self {
            condition,
            ..Self::none()
        }
    }

    /// For tests of whoever asks a program: this one runs, and answers as `answer` says, with data after it.
    #[cfg(test)]
    pub(crate) fn played(answer: impl Fn(&Request) -> (Reply, Vec<u8>) + Send + 'static) -> Self {
        let (asks, mut queue) = mpsc::channel::<Ask>(REQUESTS_MAX);
        tokio::spawn(async move {
            while let Some(ask) = queue.recv().await {
                let (message, data) = answer(&ask.request);
                let incoming = Incoming {
                    id: 0,
                    message,
                    data,
                    fds: Vec::new(),
                };
                let _ = ask.reply.send(Ok(incoming));
            }
        });
        let (_, condition) = watch::channel(Condition {
            cooperative: true,
            ..Condition::new(WorkloadState::Running)
        });
        Self {
            asks: Some(asks),
            condition,
            stop: Arc::default(),
        }
    }

    /// Starts the program of `plan` and supervises it from a task of its own.
    pub fn start(plan: Plan, log: Logger) -> Self {
        let (asks, queue) = mpsc::channel(REQUESTS_MAX);
        let (told, condition) = watch::channel(Condition::new(WorkloadState::Starting));
        let stop = Arc::<tokio::sync::Notify>::default();
        let supervisor = supervisor::Supervisor::new(plan, queue, told, stop.clone(), log);
        tokio::spawn(supervisor.run());
        Self {
            asks: Some(asks),
            condition,
            stop,
        }
    }

    /// Whether there is a program at all.
    pub fn exists(&self) -> bool {
        self.asks.is_some()
    }

    /// The current condition of the program.
    pub fn condition(&self) -> Condition {
        let mut condition = self.condition.borrow().clone();
        let supervised = self.asks.as_ref().is_none_or(|asks| !asks.is_closed());
        let alive = matches!(
            condition.state,
            WorkloadState::Starting
                | WorkloadState::Running
                | WorkloadState::Awaiting
                | WorkloadState::Frozen
        );
        if alive && !supervised {
            // Nothing supervises the workload any more: it may not be running.
            condition.state = WorkloadState::Failed;
            condition.text = "the workload is no longer supervised".to_owned();
        }
        condition
    }

    /// A receiver that hears of every change.
    pub fn changes(&self) -> watch::Receiver<Condition> {
        self.condition.clone()
    }

    /// Asks the program.
    ///
    /// # Errors
    /// See [`AskError`].
    pub async fn ask(
        &self,
        request: Request,
        fds: Vec<OwnedFd>,
        within: Duration,
    ) -> Result<Incoming<Reply>, AskError> {
        self.ask_with(request, Vec::new(), fds, within).await
    }

    /// Asks the program, with raw data after the request.
    ///
    /// # Errors
    /// See [`AskError`].
    pub async fn ask_with(
        &self,
        request: Request,
        data: Vec<u8>,
        fds: Vec<OwnedFd>,
        within: Duration,
    ) -> Result<Incoming<Reply>, AskError> {
        let gone = || AskError::NotRunning(self.condition.borrow().state.as_str());
        let asks = self.asks.as_ref().ok_or_else(gone)?;
        let (reply, answer) = oneshot::channel();
        let ask = Ask {
            request,
            data,
            fds,
            within,
            reply,
        };
        asks.send(ask).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Ends the program: SIGTERM, then SIGKILL after [`STOP_TIMEOUT`]. Returns when it has ended.
    pub async fn stop(&self) {
        self.stop.notify_one();
        let mut changes = self.condition.clone();
        // The supervisor drops its end when it is done.
        while changes.changed().await.is_ok() {}
    }
}

impl Condition {
    pub(crate) fn new(state: WorkloadState) -> Self {
        Self {
            state,
            cooperative: false,
            exit_status: 0,
            restarts: 0,
            text: String::new(),
            pid: None,
        }
    }
}
