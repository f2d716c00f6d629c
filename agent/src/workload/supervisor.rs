//! The task that owns the program.

use std::convert::Infallible;
use std::future::pending;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmorph_launch::WorkloadRestart;
use kmorph_workload::handover::AgentEnd;
use kmorph_workload::handover::message::{Reply, Role};
use kmp_proto::message::WorkloadState;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use slog::{Logger, info, warn};
use tokio::process::Child;
use tokio::sync::{Notify, mpsc, watch};

use super::{
    Ask, AskError, Condition, PLAIN_AFTER, Plan, RESTART_PAUSE, RESTART_PAUSE_MAX, RESTARTS_MAX,
    SETTLED_AFTER, STANDBY_PLAIN_AFTER, STOP_TIMEOUT, launch,
};

/// A program may register as late as it likes; its life is the bound.
const EVER: Duration = Duration::from_secs(100 * 365 * 86_400);

pub(super) struct Supervisor {
    plan: Plan,
    queue: mpsc::Receiver<Ask>,
    told: watch::Sender<Condition>,
    stop: Arc<Notify>,
    log: Logger,
    failures: u32,
    /// Kills for want of memory that the kernel had counted when the program was started.
    oom_kills: Option<u64>,
}

/// The step after a program's end.
enum Next {
    Start,
    Rest,
    Stop,
}

impl Supervisor {
    pub(super) fn new(
        plan: Plan,
        queue: mpsc::Receiver<Ask>,
        told: watch::Sender<Condition>,
        stop: Arc<Notify>,
        log: Logger,
    ) -> Self {
        Self {
            plan,
            queue,
            told,
            stop,
            log,
            failures: 0,
            oom_kills: None,
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            self.oom_kills = self.plan.memory.oom_kills();
            let next = match launch::launch(&self.plan, self.listening()) {
                Ok(launched) => {
                    tokio::spawn(self.plan.output.clone().relay(launched.output));
                    self.attend(launched.child, launched.end).await
                }
                Err(error) => self.failed(0, error.to_string()),
            };
            match next {
                Next::Start if self.pause().await => {}
                Next::Rest if self.rest().await => {}
                _ => return,
            }
        }
    }

    fn listening(&self) -> bool {
        !self.plan.standby || self.plan.standby_listeners
    }

    fn tell(&self, change: impl FnOnce(&mut Condition)) {
        self.told.send_modify(change);
    }

    fn state(&self) -> WorkloadState {
        self.told.borrow().state
    }

    /// From the program's start to its end.
    async fn attend(&mut self, mut child: Child, mut end: AgentEnd) -> Next {
        let began = Instant::now();
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        info!(self.log, "workload started"; "pid" => pid);
        self.tell(|c| {
            c.state = WorkloadState::Starting;
            c.pid = pid;
        });
        let stopping = self.stop.clone();
        let status = tokio::select! {
            // First what it said, then that it ended: its last reply came before its end.
            biased;
            never = self.serve(&mut end) => match never {},
            status = child.wait() => status,
            () = stopping.notified() => {
                stop(&mut child, pid).await;
                self.stopped();
                return Next::Stop;
            }
        };
        crate::reap::orphans(None);
        if began.elapsed() >= SETTLED_AFTER {
            self.failures = 0;
        }
        match status {
            Ok(status) => self.ended(status),
            Err(error) => self.failed(0, format!("waiting for the workload: {error}")),
        }
    }

    /// Registration, then one request after the other.
    async fn serve(&mut self, end: &mut AgentEnd) -> Infallible {
        self.register(end).await;
        loop {
            let Some(ask) = self.queue.recv().await else {
                return pending().await;
            };
            let result = end
                .request(&ask.request, &ask.data, &borrowed(&ask.fds), ask.within)
                .await;
            if let Ok(incoming) = &result {
                self.note(&incoming.message);
            }
            let _ = ask.reply.send(result.map_err(AskError::from));
        }
    }

    async fn register(&mut self, end: &mut AgentEnd) {
        let role = if self.plan.standby {
            Role::Standby
        } else {
            Role::Serve
        };
        let (instance, release) = (self.plan.instance.clone(), self.plan.kernel_release.clone());
        let register = end.register(role, &instance, self.plan.generation, &release, EVER);
        tokio::pin!(register);
        let grace = if self.plan.standby {
            STANDBY_PLAIN_AFTER
        } else {
            PLAIN_AFTER
        };
        let mut grace = Box::pin(tokio::time::sleep(grace));
        let (mut waiting, mut registers) = (true, true);
        loop {
            tokio::select! {
                result = &mut register, if registers => match result {
                    Ok(_) => break,
                    // A program that ends closes its socket first: only one that lives on is well.
                    Err(error) => {
                        registers = false;
                        warn!(self.log, "the workload does not support morphs"; "reason" => %error);
                    }
                },
                () = &mut grace, if waiting => {
                    waiting = false;
                    self.plain();
                }
                ask = self.queue.recv() => match ask {
                    Some(ask) => drop(ask.reply.send(Err(AskError::NotCooperative))),
                    None => pending().await,
                },
            }
        }
        let state = match role {
            Role::Standby => WorkloadState::Awaiting,
            Role::Serve => WorkloadState::Running,
        };
        self.tell(|c| {
            c.state = state;
            c.cooperative = true;
            c.text.clear();
        });
    }

    /// It lives and has not registered. As the target of a morph it does no harm: it has no
    /// listening sockets, and the negotiation will say that it takes no part.
    fn plain(&mut self) {
        let state = if self.plan.standby {
            WorkloadState::Awaiting
        } else {
            WorkloadState::Running
        };
        self.tell(|c| c.state = state);
    }

    /// Records the program's state from a reply.
    fn note(&mut self, reply: &Reply) {
        let state = match reply {
            Reply::Frozen { .. } => WorkloadState::Frozen,
            Reply::Resumed => WorkloadState::Running,
            Reply::Serving { .. } => {
                self.plan.standby = false;
                WorkloadState::Running
            }
            Reply::Retired => WorkloadState::Retired,
            _ => return,
        };
        self.tell(|c| c.state = state);
    }

    fn ended(&mut self, status: ExitStatus) -> Next {
        use std::os::unix::process::ExitStatusExt;
        let number = status
            .code()
            .unwrap_or_else(|| -status.signal().unwrap_or(0));
        match self.state() {
            WorkloadState::Retired => {
                info!(self.log, "workload retired");
                self.tell(|c| c.pid = None);
                Next::Rest
            }
            WorkloadState::Frozen | WorkloadState::Awaiting => {
                let text = format!("the workload ended during a morph: {status}");
                self.give_up(WorkloadState::Failed, number, text)
            }
            _ if self.plan.standby => {
                let text = format!("the workload ended before it received its state: {status}");
                self.give_up(WorkloadState::Failed, number, text)
            }
            _ if status.success() || self.plan.spec.restart == WorkloadRestart::Never => {
                let text = format!("the workload ended by itself: {status}");
                self.give_up(WorkloadState::Exited, number, text)
            }
            _ => {
                let text = format!("the workload ended: {status}{}", self.want_of_memory());
                self.failed(number, text)
            }
        }
    }

    /// Says so when the kernel has killed something for want of memory since the program was started.
    fn want_of_memory(&self) -> String {
        match (self.oom_kills, self.plan.memory.oom_kills()) {
            (Some(before), Some(now)) if now > before => self.plan.memory.oom_text(),
            _ => String::new(),
        }
    }

    fn failed(&mut self, number: i32, text: String) -> Next {
        self.failures += 1;
        if self.plan.standby || self.failures > RESTARTS_MAX {
            let text = format!("{text}; not restarted after {} failures", self.failures);
            return self.give_up(WorkloadState::Failed, number, text);
        }
        warn!(self.log, "workload failed"; "reason" => &text, "failures" => self.failures);
        self.tell(|c| {
            c.state = WorkloadState::Starting;
            c.exit_status = number;
            c.restarts += 1;
            c.text = text;
            c.pid = None;
            c.cooperative = false;
        });
        Next::Start
    }

    fn give_up(&mut self, state: WorkloadState, number: i32, text: String) -> Next {
        warn!(self.log, "workload not restarted"; "reason" => &text);
        self.tell(|c| {
            c.state = state;
            c.exit_status = number;
            c.text = text;
            c.pid = None;
            c.cooperative = false;
        });
        Next::Rest
    }

    /// The agent ended it.
    fn stopped(&self) {
        self.tell(|c| {
            c.state = WorkloadState::Exited;
            c.text = "stopped by its agent".to_owned();
            c.pid = None;
            c.cooperative = false;
        });
    }

    /// The pause before a restart. False when the agent is stopping.
    async fn pause(&mut self) -> bool {
        let doubled = RESTART_PAUSE.saturating_mul(1 << self.failures.saturating_sub(1).min(16));
        let until = tokio::time::Instant::now() + doubled.min(RESTART_PAUSE_MAX);
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
                () = self.stop.notified() => return false,
                ask = self.queue.recv() => match ask {
                    Some(ask) => self.not_running(ask),
                    None => return false,
                },
            }
        }
    }

    /// Answers until the agent stops; nothing is started again.
    async fn rest(&mut self) -> bool {
        loop {
            tokio::select! {
                () = self.stop.notified() => return false,
                ask = self.queue.recv() => match ask {
                    Some(ask) => self.not_running(ask),
                    None => return false,
                },
            }
        }
    }

    fn not_running(&self, ask: Ask) {
        let state = self.state().as_str();
        drop(ask.reply.send(Err(AskError::NotRunning(state))));
    }
}

/// SIGTERM, then SIGKILL. Returns when it has ended.
async fn stop(child: &mut Child, pid: Option<i32>) {
    if let Some(pid) = pid {
        // Not reaped yet, so the pid is still its own.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(STOP_TIMEOUT, child.wait())
        .await
        .is_err()
    {
        let _ = child.kill().await;
    }
}

fn borrowed(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}
