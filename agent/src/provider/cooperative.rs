//! The provider `cooperative`: a workload that has registered with its agent moves its state itself
//! (`docs/workloads.md`). Each step is one request to the workload.
//!
//! Without a program there is nothing to move, and each step succeeds at once.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kmorph_launch::handover::{self as launch_handover, Answer};
use kmorph_workload::handover::message::{
    self as message, Mode, Reply, Request, mode_bit, state_kind,
};
use kmorph_workload::handover::{MAX_CHUNK_BYTES, PacketSocket};
use kmp_proto::message::{
    Check, CheckResult, STATE_CHUNK_MAX_BYTES, StateProvider, TransferMode, WorkloadState,
    capability,
};
use kmp_proto::morph::FROZEN_STEP_TIMEOUT;
use kmp_proto::wire::ErrorCode;

use super::{Ability, Export, Exported, Host, Import, Piece, Provider};
use crate::refusal::Refusal;
use crate::workload::{AskError, Workload};

const _: () = assert!(MAX_CHUNK_BYTES == STATE_CHUNK_MAX_BYTES);

/// Longest wait for the workload in a step that is not part of the downtime.
const CALM_STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for the workload to take or give one chunk, or to get ready for that.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(10);
/// Time the workload may spend checking content before the freeze, microseconds.
const VALIDATE_BUDGET_US: u32 = 100_000;
/// Time it may spend checking content while frozen, microseconds.
const ACTIVATE_BUDGET_US: u32 = 200;
/// Every kind of state.
const ALL_KINDS: u32 =
    capability::MEMORY | capability::FDS | capability::LISTENERS | capability::CONNECTIONS;
// A workload's status names kinds of state by its own library's bits, and they are offered to the daemon as they are.
const _: () = assert!(
    state_kind::MEMORY == capability::MEMORY
        && state_kind::FILES == capability::FDS
        && state_kind::LISTENERS == capability::LISTENERS
        && state_kind::CONNECTIONS == capability::CONNECTIONS
        && mode_bit::BY_REFERENCE == capability::BY_REFERENCE
        && mode_bit::ROUNDS == capability::ROUNDS
);
/// Version of the state; equal on both sides of a morph.
const STATE_VERSION: u32 = message::PROTOCOL_VERSION;
/// Bits of a chunk's offset that lie within its memory section; those above number the section.
const SECTION_SHIFT: u32 = 48;

#[derive(Debug)]
struct Cooperative {
    workload: Workload,
    predecessor: Option<PathBuf>,
}

pub(super) fn make(host: &Host) -> Arc<dyn Provider> {
    let Host {
        workload,
        predecessor,
    } = host.clone();
    Arc::new(Cooperative {
        workload,
        predecessor,
    })
}

#[async_trait]
impl Provider for Cooperative {
    fn id(&self) -> StateProvider {
        StateProvider::Cooperative
    }

    async fn offer(&self) -> Result<Ability, String> {
        let mut ability = Ability {
            memory_bytes: 0,
            dirty_bytes_per_s: 0,
            // Without a program there is nothing to hand over, and any way will do.
            state_kinds: ALL_KINDS,
            modes: capability::BY_REFERENCE | capability::ROUNDS,
            state_version: STATE_VERSION,
        };
        if self.workload.exists() {
            let status = match self.step(Request::Query).await {
                Ok(Reply::Status(status)) => status,
                Ok(_) => return Err(AskError::NotCooperative.to_string()),
                Err(error) => return Err(error.to_string()),
            };
            ability.memory_bytes = status.state_bytes;
            ability.dirty_bytes_per_s = status.dirty_bytes_per_s;
            ability.state_kinds = status.state_kinds;
            ability.modes = status.modes;
        }
        Ok(ability)
    }

    async fn export(&self, export: Export) -> Result<Exported, Refusal> {
        // By reference the workload prepares when it is given the channel to the other one.
        if export.mode == TransferMode::ByReference || !self.workload.exists() {
            return Ok(Exported::default());
        }
        let prepared = Request::PrepareExport { mode: Mode::Rounds };
        match self.ask(prepared, Vec::new(), CHUNK_TIMEOUT).await? {
            Reply::Prepared {
                total_len,
                dirty_bytes,
            } => Ok(Exported {
                total_bytes: total_len,
                dirty_bytes,
                references: Vec::new(),
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn hand_over(&self) -> Result<OwnedFd, Refusal> {
        let (ours, theirs) = PacketSocket::pair()
            .map_err(|e| Refusal::new(ErrorCode::ResourceExhausted, e.to_string()))?;
        let export = Request::PrepareExport {
            mode: Mode::ByReference,
        };
        match self.ask(export, vec![ours], CALM_STEP_TIMEOUT).await? {
            Reply::Prepared { .. } => Ok(theirs),
            other => Err(unexpected(&other)),
        }
    }

    async fn read(&self, max_bytes: usize) -> Result<Piece, Refusal> {
        if !self.workload.exists() {
            return Ok(Piece::default());
        }
        let max_bytes = u32::try_from(max_bytes).unwrap_or(u32::MAX);
        let read = Request::ReadDirty { max_bytes };
        let incoming = self.workload.ask(read, Vec::new(), CHUNK_TIMEOUT).await?;
        match incoming.message {
            Reply::Chunk {
                section,
                offset,
                dirty_bytes,
            } => Ok(Piece {
                offset: u64::from(section) << SECTION_SHIFT | offset,
                data: incoming.data,
                dirty_bytes,
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn freeze(&self) -> Result<u64, Refusal> {
        if !self.workload.exists() {
            return Ok(0);
        }
        match self.step(Request::Freeze).await? {
            Reply::Frozen { state, .. } => Ok(state.digest),
            other => Err(unexpected(&other)),
        }
    }

    async fn resume(&self) -> Result<(), Refusal> {
        // Also when it was not frozen: it lets go of what it had prepared for its successor.
        if !self.workload.condition().cooperative {
            return Ok(());
        }
        match self.step(Request::Resume).await? {
            Reply::Resumed => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn retire(&self) -> Result<(), Refusal> {
        if !self.workload.exists() {
            return Ok(());
        }
        match self.step(Request::Retire).await? {
            Reply::Retired => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn import(&self, import: Import) -> Result<(), Refusal> {
        if !self.workload.exists() {
            return Ok(());
        }
        let (mode, channel, within) = match import.mode {
            TransferMode::ByReference => {
                let channel = self.take_over(import.session).await?;
                (Mode::ByReference, vec![channel], CALM_STEP_TIMEOUT)
            }
            TransferMode::Rounds => (Mode::Rounds, Vec::new(), CHUNK_TIMEOUT),
        };
        let total_len = match mode {
            Mode::ByReference => 0,
            Mode::Rounds => import.total_bytes,
        };
        let prepare = Request::PrepareImport { mode, total_len };
        match self.ask(prepare, channel, within).await? {
            Reply::ImportReady { .. } => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn apply(&self, offset: u64, data: Vec<u8>) -> Result<(), Refusal> {
        let section = u32::try_from(offset >> SECTION_SHIFT).unwrap_or(u32::MAX);
        let offset = offset & ((1 << SECTION_SHIFT) - 1);
        let apply = Request::Apply { section, offset };
        let asked = self
            .workload
            .ask_with(apply, data, Vec::new(), CHUNK_TIMEOUT);
        match asked.await?.message {
            Reply::Applied => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn validate(&self) -> Result<Vec<Check>, Refusal> {
        let mut checks = Vec::new();
        if self.workload.exists() {
            let budget_us = VALIDATE_BUDGET_US;
            let request = Request::Validate { budget_us };
            match self.ask(request, Vec::new(), CALM_STEP_TIMEOUT).await? {
                Reply::Validated { checks: found, .. } => {
                    checks.extend(found.into_iter().map(check));
                }
                other => return Err(unexpected(&other)),
            }
        }
        checks.push(self.alive());
        Ok(checks)
    }

    async fn activate(&self, nonce: u64) -> Result<u64, Refusal> {
        if !self.workload.exists() {
            return Ok(0);
        }
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

    async fn serve(&self) -> Result<(), Refusal> {
        if !self.workload.exists() {
            return Ok(());
        }
        match self.step(Request::Serve).await? {
            Reply::Serving { .. } => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

impl Cooperative {
    async fn ask(
        &self,
        request: Request,
        fds: Vec<OwnedFd>,
        within: Duration,
    ) -> Result<Reply, AskError> {
        Ok(self.workload.ask(request, fds, within).await?.message)
    }

    /// A step of the downtime, or one that is measured for its estimate.
    async fn step(&self, request: Request) -> Result<Reply, AskError> {
        self.ask(request, Vec::new(), FROZEN_STEP_TIMEOUT).await
    }

    /// A channel to the source workload, from the agent of that.
    async fn take_over(&self, session: u64) -> Result<OwnedFd, Refusal> {
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
        let (answer, mut fds) = tokio::task::spawn_blocking(ask)
            .await
            .map_err(|e| failed(e.to_string()))?
            .map_err(|e| failed(e.to_string()))?;
        match (answer, fds.pop()) {
            (Answer::Channel, Some(channel)) if fds.is_empty() => Ok(channel),
            _ => Err(failed("unexpected reply instead of a channel".to_owned())),
        }
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
            duration_us: u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX),
            detail: format!("is {}", condition.state.as_str()),
        }
    }
}

fn unexpected(reply: &Reply) -> Refusal {
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

fn check(found: message::Check) -> Check {
    Check {
        name: found.name,
        result: passed(found.passed),
        duration_us: found.duration_us,
        detail: found.detail,
    }
}
