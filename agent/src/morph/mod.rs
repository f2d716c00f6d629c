//! The instance's side of a morph: one session at a time, each step passed on to the workload.
//!
//! [`part`] decides what a request may do; this module has the workload do it, one step of a commit or rollback at a
//! time. A step that is repeated, because its answer was lost or another daemon took over, is answered as before.

mod part;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kmorph_launch::handover::{self as launch_handover, Answer};
use kmorph_workload::handover::PacketSocket;
use kmorph_workload::handover::message::{self as workload, Mode, Reply, Request, Status};
use kmp_proto::message::{
    Check, CheckResult, CommitReply, CommitStep, Message, MorphCommit, MorphNegotiate,
    MorphPrepare, MorphRollback, MorphTransfer, MorphTransferFixed, MorphValidate, NegotiateFixed,
    RollbackReply, RollbackStatus, SessionReply, Side, StepStatus, TransferMode, TransferOp,
    ValidateReply, ValidateReplyFixed, Verdict, WorkloadState, capability, transfer_flags,
};
use kmp_proto::wire::ErrorCode;
use slog::{Logger, info, warn};
use std::os::fd::OwnedFd;

use self::part::{Freeze, Misfit, Role, Undo};
use crate::workload::{AskError, Workload};

/// Longest wait for the workload in a step that is not part of the downtime.
const CALM_STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for the workload in a step of the downtime.
const FROZEN_STEP_TIMEOUT: Duration = Duration::from_secs(2);
/// Time the workload may spend checking content before the freeze, microseconds.
const VALIDATE_BUDGET_US: u32 = 100_000;
/// Time it may spend checking content while frozen, microseconds.
const ACTIVATE_BUDGET_US: u32 = 200;
/// Every kind of state.
const ALL_KINDS: u32 =
    capability::MEMORY | capability::FDS | capability::LISTENERS | capability::CONNECTIONS;
/// Version of the cooperative provider's state; equal on both sides of a morph.
const STATE_VERSION: u32 = workload::PROTOCOL_VERSION;

/// Why a request was not done: an ERROR frame.
#[derive(Debug)]
pub struct Refusal {
    /// Its code.
    pub code: ErrorCode,
    /// Its text.
    pub text: String,
}

impl Refusal {
    pub(crate) fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { code, text }
    }
}

impl From<AskError> for Refusal {
    fn from(error: AskError) -> Self {
        let code = match &error {
            AskError::NotRunning(_) | AskError::NotCooperative => ErrorCode::UnexpectedInState,
            AskError::Exchange(_) => ErrorCode::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Misfit> for Refusal {
    fn from(text: Misfit) -> Self {
        Self::new(ErrorCode::UnexpectedInState, text)
    }
}

/// Pause before a source whose lease is over is asked again to go on.
const THAW_RETRY: Duration = Duration::from_secs(1);

/// The instance's side of morphs. Clones share it.
#[derive(Clone, Debug)]
pub struct Morphs {
    workload: Workload,
    generation: u64,
    predecessor: Option<PathBuf>,
    log: Logger,
    role: Arc<Mutex<Role>>,
    /// Held by the step of a commit or the rollback that is under way.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Morphs {
    /// For an instance of `generation` with this workload; `predecessor` is where the generation it
    /// takes over from hands over its state, if it is on the same host kernel.
    pub fn new(
        workload: Workload,
        generation: u64,
        predecessor: Option<PathBuf>,
        log: Logger,
    ) -> Self {
        Self {
            workload,
            generation,
            predecessor,
            log,
            role: Arc::new(Mutex::new(Role::new())),
            turn: Arc::default(),
        }
    }

    fn role(&self) -> MutexGuard<'_, Role> {
        self.role.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a request of a morph.
    ///
    /// # Errors
    /// What to answer with ERROR instead.
    pub async fn answer(&self, message: &Message) -> Result<Message, Refusal> {
        match message {
            Message::MorphPrepare(prepare) => self.prepare(prepare),
            Message::MorphNegotiate(ask) => self.negotiate(ask).await,
            Message::MorphTransfer(transfer) => self.transfer(transfer).await,
            Message::MorphValidate(validate) => self.validate(validate).await,
            Message::MorphCommit(commit) => self.commit(*commit).await,
            Message::MorphRollback(rollback) => self.roll_back(rollback).await,
            other => {
                let text = format!("{} is no request of a morph", other.msg_type());
                Err(Refusal::new(ErrorCode::UnexpectedInState, text))
            }
        }
    }

    fn prepare(&self, prepare: &MorphPrepare) -> Result<Message, Refusal> {
        let (meant, session) = match prepare.side {
            Side::Source => (prepare.from_generation, prepare.session),
            Side::Target => (prepare.to_generation, prepare.session),
        };
        if meant != self.generation {
            let text = format!("this is generation {}, not {meant}", self.generation);
            return Err(Refusal::new(ErrorCode::StaleGeneration, text));
        }
        self.role().prepare(session, prepare.side)?;
        Ok(Message::MorphPrepareReply(SessionReply { session }))
    }

    pub(crate) fn expect_side(&self, session: u64, side: Side) -> Result<(), Refusal> {
        if self.role().side(session)? == side {
            return Ok(());
        }
        let text = format!(
            "this is not the {} side of session {session}",
            side.as_str()
        );
        Err(Refusal::new(ErrorCode::UnexpectedInState, text))
    }

    async fn negotiate(&self, ask: &MorphNegotiate) -> Result<Message, Refusal> {
        let session = ask.fixed.session;
        self.role().side(session)?;
        let mut fixed = NegotiateFixed {
            session,
            memory_bytes: 0,
            dirty_bytes_per_s: 0,
            // Without a program there is nothing to hand over, and any way will do.
            state_kinds: ALL_KINDS,
            providers: capability::COOPERATIVE,
            modes: capability::BY_REFERENCE | capability::ROUNDS,
            state_version: STATE_VERSION,
            verdict: Verdict::Accept,
        };
        let mut missing = Vec::new();
        if self.workload.exists() {
            match self.status().await {
                Ok(status) => {
                    fixed.memory_bytes = status.state_bytes;
                    fixed.dirty_bytes_per_s = status.dirty_bytes_per_s;
                    fixed.state_kinds = status.state_kinds;
                    fixed.modes = status.modes;
                }
                Err(error) => {
                    fixed.verdict = Verdict::Veto;
                    fixed.providers = 0;
                    fixed.modes = 0;
                    missing.push(error.to_string());
                }
            }
        }
        let answer = MorphNegotiate { fixed, missing };
        Ok(Message::MorphNegotiateReply(answer))
    }

    async fn status(&self) -> Result<Status, AskError> {
        let query = self
            .workload
            .ask(Request::Query, Vec::new(), FROZEN_STEP_TIMEOUT);
        match query.await?.message {
            Reply::Status(status) => Ok(status),
            _ => Err(AskError::NotCooperative),
        }
    }

    async fn transfer(&self, transfer: &MorphTransfer) -> Result<Message, Refusal> {
        let fixed = transfer.fixed;
        if fixed.op != TransferOp::Pull || fixed.mode != TransferMode::ByReference {
            let text = format!(
                "{} of {} on a control channel",
                fixed.op.as_str(),
                fixed.mode.as_str()
            );
            return Err(Refusal::new(ErrorCode::UnexpectedInState, text));
        }
        let last = fixed.flags & transfer_flags::FINAL != 0;
        if last {
            // By reference nothing is left to move; the source stands still from here until it is told.
            self.hold(fixed.session)?;
        } else {
            self.expect_side(fixed.session, Side::Target)?;
            if self.workload.exists() {
                self.take_over(fixed.session).await?;
            }
        }
        let fixed = MorphTransferFixed {
            op: TransferOp::Applied,
            dirty_bytes: 0,
            ..fixed
        };
        Ok(Message::MorphTransferReply(MorphTransfer {
            fixed,
            data: Vec::new(),
            references: Vec::new(),
        }))
    }

    /// Gets a channel to the source workload and has ours import over it.
    async fn take_over(&self, session: u64) -> Result<(), Refusal> {
        let Some(predecessor) = self.predecessor.clone() else {
            let text = "no predecessor on this kernel: state cannot move by reference";
            return Err(Refusal::new(ErrorCode::Incompatible, text));
        };
        let place = format!("taking over at {}", predecessor.display());
        let ask = move || {
            let request = launch_handover::Request::TakeOver { session };
            launch_handover::ask(&predecessor, &request)
        };
        let failed = |e: String| Refusal::new(ErrorCode::Internal, format!("{place}: {e}"));
        let (answer, fds) = tokio::task::spawn_blocking(ask)
            .await
            .map_err(|e| failed(e.to_string()))?
            .map_err(|e| failed(e.to_string()))?;
        if answer != Answer::Channel || fds.len() != 1 {
            return Err(failed("another answer than a channel".to_owned()));
        }
        let import = Request::PrepareImport {
            mode: Mode::ByReference,
            total_len: 0,
        };
        let imported = self.workload.ask(import, fds, CALM_STEP_TIMEOUT).await?;
        expect_reply(
            &imported.message,
            matches!(imported.message, Reply::ImportReady { .. }),
        )
    }

    /// The source of [`Morphs::take_over`]: the end of the channel that the target gets.
    ///
    /// # Errors
    /// When `session` is not the one in which this side is left, or the workload refuses.
    pub async fn hand_over(&self, session: u64) -> Result<OwnedFd, Refusal> {
        self.expect_side(session, Side::Source)?;
        let (ours, theirs) = PacketSocket::pair()
            .map_err(|e| Refusal::new(ErrorCode::ResourceExhausted, e.to_string()))?;
        let export = Request::PrepareExport {
            mode: Mode::ByReference,
        };
        let prepared = self
            .workload
            .ask(export, vec![ours], CALM_STEP_TIMEOUT)
            .await?;
        expect_reply(
            &prepared.message,
            matches!(prepared.message, Reply::Prepared { .. }),
        )?;
        Ok(theirs)
    }

    async fn validate(&self, validate: &MorphValidate) -> Result<Message, Refusal> {
        self.expect_side(validate.session, Side::Target)?;
        let mut checks = Vec::new();
        if self.workload.exists() {
            let budget_us = VALIDATE_BUDGET_US;
            let request = Request::Validate { budget_us };
            let reply = self
                .workload
                .ask(request, Vec::new(), CALM_STEP_TIMEOUT)
                .await?;
            let Reply::Validated { checks: found, .. } = reply.message else {
                return Err(unexpected(&reply.message));
            };
            checks.extend(found.into_iter().map(check));
        }
        checks.push(self.alive());
        let all = checks.iter().all(|c| c.result == CheckResult::Passed);
        let verdict = passed(all);
        let session = validate.session;
        let fixed = ValidateReplyFixed { session, verdict };
        Ok(Message::MorphValidateReply(ValidateReply { fixed, checks }))
    }

    /// The agent's own check: the workload stands where the target of a morph should.
    fn alive(&self) -> Check {
        let began = Instant::now();
        let condition = self.workload.condition();
        let well = matches!(
            condition.state,
            WorkloadState::Awaiting | WorkloadState::None
        );
        Check {
            name: "workload".to_owned(),
            result: passed(well),
            duration_us: micros(began),
            detail: format!("is {}", condition.state.as_str()),
        }
    }

    /// The source answers its last round. The commit record may exist from now on.
    ///
    /// # Errors
    /// When this is not a source that stands still in `session`.
    pub(crate) fn hold(&self, session: u64) -> Result<(), Refusal> {
        Ok(self.role().hold(session)?)
    }

    /// A part of the last round was sent: the daemon that froze this source lives.
    pub(crate) fn renew_lease(&self, session: u64) {
        self.role().renew(session, Instant::now());
    }

    async fn commit(&self, commit: MorphCommit) -> Result<Message, Refusal> {
        let _turn = self.turn.lock().await;
        let began = Instant::now();
        let state_digest = match commit.step {
            CommitStep::Freeze => self.freeze(commit.session).await?,
            CommitStep::Activate => self.activate(commit).await?,
            CommitStep::Serve => self.serve(commit.session).await?,
            CommitStep::Retire => self.retire(commit.session).await?,
        };
        Ok(Message::MorphCommitReply(CommitReply {
            session: commit.session,
            nonce: commit.nonce,
            state_digest,
            elapsed_us: micros(began),
            step: commit.step,
            status: StepStatus::Done,
        }))
    }

    async fn step(&self, request: Request) -> Result<Reply, Refusal> {
        let ask = self.workload.ask(request, Vec::new(), FROZEN_STEP_TIMEOUT);
        Ok(ask.await?.message)
    }

    async fn freeze(&self, session: u64) -> Result<u64, Refusal> {
        let todo = self.role().freeze(session)?;
        let digest = match todo {
            Freeze::Already(digest) => return Ok(digest),
            Freeze::Now if !self.workload.exists() => 0,
            Freeze::Now => match self.step(Request::Freeze).await? {
                Reply::Frozen { state, .. } => state.digest,
                other => return Err(unexpected(&other)),
            },
        };
        self.role().frozen(session, digest, Instant::now());
        tokio::spawn(self.clone().thaw_when_left_alone(session));
        Ok(digest)
    }

    /// Has the workload serve again when the daemon that froze it is not heard of until its lease is over.
    async fn thaw_when_left_alone(self, session: u64) {
        loop {
            let Some(until) = self.role().lease(session) else {
                return;
            };
            tokio::time::sleep_until(until.into()).await;
            let _turn = self.turn.lock().await;
            if self.role().expire(session, Instant::now()) {
                break;
            }
        }
        warn!(self.log, "the daemon froze the workload and fell silent: it serves again"; "session" => session);
        while let Err(refusal) = self.resume().await {
            warn!(self.log, "the workload does not serve again yet"; "reason" => &refusal.text);
            tokio::time::sleep(THAW_RETRY).await;
        }
    }

    async fn activate(&self, commit: MorphCommit) -> Result<u64, Refusal> {
        let known = self.role().activate(commit.session)?;
        let digest = match known {
            Some(digest) => digest,
            None if !self.workload.exists() => 0,
            None => self.activate_workload(commit.nonce).await?,
        };
        self.role().activated(commit.session, digest);
        Ok(digest)
    }

    async fn activate_workload(&self, nonce: u64) -> Result<u64, Refusal> {
        let request = Request::Activate {
            nonce,
            budget_us: ACTIVATE_BUDGET_US,
        };
        match self.step(request).await? {
            Reply::Activated {
                nonce: found,
                state,
                ..
            } if found == nonce => Ok(state.digest),
            other => Err(unexpected(&other)),
        }
    }

    async fn serve(&self, session: u64) -> Result<u64, Refusal> {
        let todo = self.role().serve(session)?;
        if todo && self.workload.exists() {
            let reply = self.step(Request::Serve).await?;
            expect_reply(&reply, matches!(reply, Reply::Serving { .. }))?;
        }
        self.role().serves(session);
        Ok(0)
    }

    async fn retire(&self, session: u64) -> Result<u64, Refusal> {
        let todo = self.role().retire(session)?;
        if todo && self.workload.exists() {
            let reply = self.step(Request::Retire).await?;
            expect_reply(&reply, reply == Reply::Retired)?;
        }
        self.role().retired(session);
        Ok(0)
    }

    async fn roll_back(&self, rollback: &MorphRollback) -> Result<Message, Refusal> {
        let _turn = self.turn.lock().await;
        let (session, side) = (rollback.fixed.session, rollback.fixed.side);
        let todo = self.role().roll_back(session, side)?;
        let status = match todo {
            Undo::Resume => self.resume().await?,
            Undo::Stop => {
                self.workload.stop().await;
                RollbackStatus::Stopped
            }
        };
        info!(self.log, "a morph was rolled back"; "session" => session, "side" => side.as_str());
        self.role().rolled_back(session);
        Ok(Message::MorphRollbackReply(RollbackReply {
            session,
            status,
        }))
    }

    /// Has the workload serve again if it stands still.
    async fn resume(&self) -> Result<RollbackStatus, Refusal> {
        let condition = self.workload.condition();
        if !self.workload.exists() {
            return Ok(RollbackStatus::Running);
        }
        if condition.cooperative {
            // Also when it was not frozen: it lets go of what it had prepared for its successor.
            let reply = self.step(Request::Resume).await?;
            expect_reply(&reply, reply == Reply::Resumed)?;
        }
        Ok(match self.workload.condition().state {
            WorkloadState::Running | WorkloadState::Starting => RollbackStatus::Running,
            _ => RollbackStatus::Stopped,
        })
    }
}

fn expect_reply(reply: &Reply, expected: bool) -> Result<(), Refusal> {
    if expected {
        Ok(())
    } else {
        Err(unexpected(reply))
    }
}

pub(crate) fn unexpected(reply: &Reply) -> Refusal {
    let text = format!("the workload answered {reply:?}");
    Refusal::new(ErrorCode::Internal, text)
}

fn passed(well: bool) -> CheckResult {
    if well {
        CheckResult::Passed
    } else {
        CheckResult::Failed
    }
}

fn check(found: workload::Check) -> Check {
    Check {
        name: found.name,
        result: passed(found.passed),
        duration_us: found.duration_us,
        detail: found.detail,
    }
}

fn micros(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX)
}
