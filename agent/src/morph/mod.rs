//! The instance's side of a morph: one session at a time, each step passed on to the state provider.
//!
//! [`part`] decides whether a request is allowed; this module then calls the provider that the daemon has chosen
//! ([`crate::provider`]), one step of a commit or rollback at a time. If a step is repeated because its answer was
//! lost or another daemon took over, the answer is the same as before.

mod part;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kmp_proto::message::{
    CheckResult, CommitReply, CommitStep, Message, MorphCommit, MorphNegotiate, MorphPrepare,
    MorphRollback, MorphTransfer, MorphTransferFixed, MorphValidate, NegotiateReply, Reference,
    RollbackReply, RollbackStatus, SessionReply, Side, StateProvider, StepStatus, TransferMode,
    TransferOp, ValidateReply, ValidateReplyFixed, WorkloadState, transfer_flags,
};
use kmp_proto::wire::ErrorCode;
use slog::{Logger, info, warn};
use std::os::fd::OwnedFd;

use self::part::{Freeze, Misfit, Role, Undo};
use crate::provider::{Chosen, Export, Host, Import, Providers};
use crate::refusal::Refusal;
use crate::workload::Workload;

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
    providers: Arc<Providers>,
    log: Logger,
    role: Arc<Mutex<Role>>,
    /// Held by the current step of a commit or rollback.
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
        let host = Host {
            workload,
            predecessor,
        };
        let providers = Providers::of(&host);
        Self::with(providers, host.workload, generation, log)
    }

    /// As [`Self::new`], with these providers.
    pub(crate) fn with(
        providers: Providers,
        workload: Workload,
        generation: u64,
        log: Logger,
    ) -> Self {
        Self {
            workload,
            generation,
            providers: Arc::new(providers),
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
    /// The refusal, which the caller answers with ERROR.
    pub async fn answer(&self, message: &Message) -> Result<Message, Refusal> {
        match message {
            Message::MorphPrepare(prepare) => self.prepare(prepare),
            Message::MorphNegotiate(ask) => self.negotiate(*ask).await,
            Message::MorphTransfer(transfer) => self.transfer(transfer).await,
            Message::MorphValidate(validate) => self.validate(validate).await,
            Message::MorphCommit(commit) => self.commit(*commit).await,
            Message::MorphRollback(rollback) => self.roll_back(rollback).await,
            other => {
                let text = format!("{} is not a morph request", other.msg_type());
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

    async fn negotiate(&self, ask: MorphNegotiate) -> Result<Message, Refusal> {
        let MorphNegotiate { session, providers } = ask;
        self.role().side(session)?;
        let offers = self.providers.offer(session, providers).await;
        let answer = NegotiateReply { session, offers };
        Ok(Message::MorphNegotiateReply(answer))
    }

    /// The provider that the daemon has chosen, on the side that it is to work for.
    ///
    /// # Errors
    /// If this is not that side of `session`, or the provider is not the one that it uses and may use.
    pub(crate) fn choose(
        &self,
        session: u64,
        side: Side,
        provider: StateProvider,
    ) -> Result<Chosen, Refusal> {
        self.expect_side(session, side)?;
        self.providers.choose(session, provider)
    }

    /// State by reference: first the source makes its own ready, then the target takes that over.
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
        let references = if fixed.flags & transfer_flags::FINAL != 0 {
            // Nothing is left to move; the source stands still from here until it is told.
            self.hold(fixed.session)?;
            Vec::new()
        } else {
            self.hand_on(transfer).await?
        };
        let fixed = MorphTransferFixed {
            op: TransferOp::Applied,
            dirty_bytes: 0,
            ..fixed
        };
        Ok(Message::MorphTransferReply(MorphTransfer {
            fixed,
            data: Vec::new(),
            references,
        }))
    }

    /// The references that the source hands to the target; the target hands over none.
    async fn hand_on(&self, transfer: &MorphTransfer) -> Result<Vec<Reference>, Refusal> {
        let MorphTransferFixed {
            session,
            mode,
            provider,
            total_bytes,
            ..
        } = transfer.fixed;
        let side = self.role().side(session)?;
        let chosen = self.choose(session, side, provider)?;
        match side {
            Side::Source => {
                let export = Export { session, mode };
                Ok(chosen.export(export).await?.references)
            }
            Side::Target => {
                let import = Import {
                    session,
                    mode,
                    total_bytes,
                    references: transfer.references.clone(),
                };
                chosen.import(import).await?;
                Ok(Vec::new())
            }
        }
    }

    /// Returns the descriptor for the provider of the target's agent on the same kernel.
    ///
    /// # Errors
    /// If `session` is not the one in which this side is left, or the provider has nothing to give.
    pub async fn hand_over(&self, session: u64) -> Result<OwnedFd, Refusal> {
        self.expect_side(session, Side::Source)?;
        self.providers.chosen(session)?.hand_over().await
    }

    async fn validate(&self, validate: &MorphValidate) -> Result<Message, Refusal> {
        let session = validate.session;
        self.expect_side(session, Side::Target)?;
        let checks = self.providers.chosen(session)?.validate().await?;
        let all = checks.iter().all(|c| c.result == CheckResult::Passed);
        let verdict = if all {
            CheckResult::Passed
        } else {
            CheckResult::Failed
        };
        let fixed = ValidateReplyFixed { session, verdict };
        Ok(Message::MorphValidateReply(ValidateReply { fixed, checks }))
    }

    /// The source answers its last round. The commit record may exist from now on.
    ///
    /// # Errors
    /// If this is not a source that stands still in `session`.
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

    async fn freeze(&self, session: u64) -> Result<u64, Refusal> {
        let todo = self.role().freeze(session)?;
        let digest = match todo {
            Freeze::Already(digest) => return Ok(digest),
            Freeze::Now => self.providers.chosen(session)?.freeze().await?,
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
        warn!(self.log, "the daemon froze the workload and then fell silent: the workload serves again"; "session" => session);
        while let Err(refusal) = self.resume().await {
            warn!(self.log, "the workload has not resumed yet"; "reason" => &refusal.text);
            tokio::time::sleep(THAW_RETRY).await;
        }
    }

    async fn activate(&self, commit: MorphCommit) -> Result<u64, Refusal> {
        let MorphCommit { session, nonce, .. } = commit;
        let known = self.role().activate(session)?;
        let digest = match known {
            Some(digest) => digest,
            None => self.providers.chosen(session)?.activate(nonce).await?,
        };
        self.role().activated(session, digest);
        Ok(digest)
    }

    async fn serve(&self, session: u64) -> Result<u64, Refusal> {
        let todo = self.role().serve(session)?;
        if todo {
            self.providers.chosen(session)?.serve().await?;
        }
        self.role().serves(session);
        Ok(0)
    }

    async fn retire(&self, session: u64) -> Result<u64, Refusal> {
        let todo = self.role().retire(session)?;
        if todo {
            self.providers.chosen(session)?.retire().await?;
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
                if let Ok(chosen) = self.providers.chosen(session) {
                    chosen.abandon().await;
                }
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
        // The provider that was used last: where none was, nothing of the workload was touched.
        if let Some(provider) = self.providers.latest() {
            provider.resume().await?;
        }
        Ok(match self.workload.condition().state {
            WorkloadState::Running | WorkloadState::Starting | WorkloadState::None => {
                RollbackStatus::Running
            }
            _ => RollbackStatus::Stopped,
        })
    }
}

fn micros(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX)
}
