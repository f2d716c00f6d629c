//! MORPH_*: moving a running workload from one kernel to another.

use super::heartbeat::{append_text, text_record};
use super::{LayoutError, Payload, StateProvider, TEXT_MAX_BYTES, at_most, clip, fixed_only};
use crate::wire::Layout;
use crate::wire::field::{code_enum, fixed};
use crate::wire::record::{CHECK, CRITICAL, DATA, REFERENCE, append, once, records};

/// Maximum number of checks in a validation report.
const CHECKS_MAX: usize = 100;
/// Maximum length of a check's name, in bytes: with this and [`TEXT_MAX_BYTES`] of detail, [`CHECKS_MAX`] checks fit.
const CHECK_NAME_MAX_BYTES: usize = 64;
/// Maximum number of state references in one message.
const REFERENCES_MAX: usize = 1024;

code_enum! {
    /// The addressed side of the morph.
    Side: u8 {
        /// The source kernel.
        Source = 1, "source";
        /// The target kernel.
        Target = 2, "target";
    }
}

fixed! {
    /// MORPH_PREPARE.
    pub MorphPrepare, 40 {
        /// The morph's session: never 0, never reused.
        session: u64 = 0,
        /// The source generation.
        from_generation: u64 = 8,
        /// The target generation.
        to_generation: u64 = 16,
        /// Budget for the downtime, microseconds.
        downtime_budget_us: u32 = 24,
        /// Maximum time for one phase, milliseconds.
        phase_timeout_ms: u32 = 28,
        /// The addressed side.
        side: Side = 32,
        ; reserved 7
    }
}

fixed! {
    /// Reply to MORPH_PREPARE.
    pub SessionReply, 16 {
        /// The session.
        session: u64 = 0,
        ; reserved 8
    }
}

code_enum! {
    /// The operation of a MORPH_TRANSFER_STATE.
    TransferOp: u16 {
        /// Daemon to source: send a round.
        Pull = 1, "pull";
        /// Source to daemon to target: bytes of the round.
        Chunk = 2, "chunk";
        /// Source to daemon to target: the round is complete.
        EndOfRound = 3, "end_of_round";
        /// Target to daemon, the reply to END_OF_ROUND: everything is in place.
        Applied = 4, "applied";
    }
}

code_enum! {
    /// How state is transferred.
    TransferMode: u16 {
        /// By reference.
        ByReference = 1, "by_reference";
        /// Copied in rounds.
        Rounds = 2, "rounds";
    }
}

/// Bits of [`MorphTransferFixed::flags`].
pub mod transfer_flags {
    /// The last round: the source workload is frozen.
    pub const FINAL: u32 = 1;
}

fixed! {
    /// Fixed part of MORPH_TRANSFER_STATE.
    pub MorphTransferFixed, 56 {
        /// The session.
        session: u64 = 0,
        /// Offset of the chunk in the state.
        offset: u64 = 8,
        /// Size of the whole state, bytes.
        total_bytes: u64 = 16,
        /// In END_OF_ROUND: number of bytes that changed in the meantime.
        dirty_bytes: u64 = 24,
        /// Number of the round, from 1.
        round: u32 = 32,
        /// See [`transfer_flags`].
        flags: u32 = 36,
        /// CRC-32/ISO-HDLC of the chunk's bytes.
        chunk_crc32: u32 = 40,
        /// The operation.
        op: TransferOp = 44,
        /// How state is transferred.
        mode: TransferMode = 46,
        /// The state provider. A pull names it to both sides; all messages of the pull repeat it.
        provider: StateProvider = 48,
        ; reserved 4
    }
}

fixed! {
    /// State passed by reference: a REFERENCE record.
    pub Reference, 24 {
        /// Id of the piece of state, assigned by the provider.
        region: u64 = 0,
        /// Its length in bytes.
        length: u64 = 8,
        /// Its digest; 0 if it is computed later.
        digest: u64 = 16,
        ; reserved 0
    }
}

/// MORPH_TRANSFER_STATE, and its reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MorphTransfer {
    /// Fixed part.
    pub fixed: MorphTransferFixed,
    /// Bytes of a chunk.
    pub data: Vec<u8>,
    /// State passed by reference.
    pub references: Vec<Reference>,
}

impl MorphTransfer {
    /// Returns a chunk with its checksum.
    pub fn chunk(fixed: MorphTransferFixed, data: Vec<u8>) -> Self {
        let chunk_crc32 = crate::checksum::crc32(&[&data]);
        let fixed = MorphTransferFixed {
            chunk_crc32,
            op: TransferOp::Chunk,
            ..fixed
        };
        Self {
            fixed,
            data,
            references: Vec::new(),
        }
    }

    /// Returns whether the chunk's checksum matches: it protects the bytes from kernel to kernel,
    /// over all hops.
    pub fn chunk_holds(&self) -> bool {
        crate::checksum::crc32(&[&self.data]) == self.fixed.chunk_crc32
    }
}

impl Payload for MorphTransfer {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = MorphTransferFixed::split(payload)?;
        let (mut data, mut references) = (None, Vec::new());
        for record in records(rest) {
            let record = record?;
            match record.kind {
                DATA => once(&mut data, record.bytes.to_vec(), DATA)?,
                REFERENCE if references.len() == REFERENCES_MAX => {
                    return Err(LayoutError::TooMany(REFERENCES_MAX));
                }
                REFERENCE => references.push(Reference::exact(record.bytes)?),
                _ => record.skip()?,
            }
        }
        Ok(Self {
            fixed,
            data: data.unwrap_or_default(),
            references,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        if !self.data.is_empty() {
            append(out, DATA, CRITICAL, &self.data);
        }
        for reference in &self.references {
            let mut bytes = Vec::with_capacity(Reference::BYTES);
            reference.append(&mut bytes);
            append(out, REFERENCE, CRITICAL, &bytes);
        }
    }

    fn writable(&self) -> Result<(), LayoutError> {
        at_most(self.references.len(), REFERENCES_MAX)
    }
}

fixed! {
    /// MORPH_VALIDATE.
    pub MorphValidate, 32 {
        /// The session.
        session: u64 = 0,
        /// The last round that was sent.
        round: u32 = 8,
        /// Unused, 0.
        flags: u32 = 12,
        /// Expected size of the state, bytes.
        state_bytes: u64 = 16,
        ; reserved 8
    }
}

code_enum! {
    /// Result of a check.
    CheckResult: u8 {
        /// The check passed.
        Passed = 1, "passed";
        /// The check failed.
        Failed = 2, "failed";
    }
}

fixed! {
    /// Fixed part of the reply to MORPH_VALIDATE.
    pub ValidateReplyFixed, 16 {
        /// The session.
        session: u64 = 0,
        /// Passed only if all checks passed.
        verdict: CheckResult = 8,
        ; reserved 7
    }
}

fixed! {
    /// Fixed part of a CHECK record.
    CheckFixed, 8 {
        duration_us: u32 = 0,
        name_len: u16 = 4,
        result: CheckResult = 6,
        ; reserved 1
    }
}

/// One check of a validation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Name of the check.
    pub name: String,
    /// Its result.
    pub result: CheckResult,
    /// Duration, microseconds.
    pub duration_us: u32,
    /// The finding.
    pub detail: String,
}

/// Reply to MORPH_VALIDATE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidateReply {
    /// Fixed part.
    pub fixed: ValidateReplyFixed,
    /// All checks.
    pub checks: Vec<Check>,
}

impl Check {
    fn parse(bytes: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = CheckFixed::split(bytes)?;
        let (name, detail) = rest
            .split_at_checked(usize::from(fixed.name_len))
            .ok_or(LayoutError::Inconsistent)?;
        if name.len() > CHECK_NAME_MAX_BYTES || detail.len() > TEXT_MAX_BYTES {
            return Err(LayoutError::TextTooLong {
                kind: CHECK,
                limit: TEXT_MAX_BYTES,
            });
        }
        let text = |b| {
            core::str::from_utf8(b)
                .map(str::to_owned)
                .map_err(|_| LayoutError::NotText)
        };
        let CheckFixed {
            duration_us,
            result,
            ..
        } = fixed;
        Ok(Self {
            name: text(name)?,
            result,
            duration_us,
            detail: text(detail)?,
        })
    }

    fn append(&self, out: &mut Vec<u8>) {
        let (name, detail) = (
            clip(&self.name, CHECK_NAME_MAX_BYTES),
            clip(&self.detail, TEXT_MAX_BYTES),
        );
        let name_len = u16::try_from(name.len()).unwrap_or(0);
        let mut bytes = Vec::new();
        CheckFixed {
            duration_us: self.duration_us,
            name_len,
            result: self.result,
        }
        .append(&mut bytes);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(detail.as_bytes());
        append(out, CHECK, CRITICAL, &bytes);
    }
}

impl Payload for ValidateReply {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = ValidateReplyFixed::split(payload)?;
        let mut checks = Vec::new();
        for record in records(rest) {
            let record = record?;
            match record.kind {
                CHECK if checks.len() == CHECKS_MAX => {
                    return Err(LayoutError::TooMany(CHECKS_MAX));
                }
                CHECK => checks.push(Check::parse(record.bytes)?),
                _ => record.skip()?,
            }
        }
        let all = checks.iter().all(|c| c.result == CheckResult::Passed);
        if fixed.verdict == CheckResult::Passed && !all {
            return Err(LayoutError::Inconsistent);
        }
        Ok(Self { fixed, checks })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        for check in &self.checks {
            check.append(out);
        }
    }

    fn writable(&self) -> Result<(), LayoutError> {
        at_most(self.checks.len(), CHECKS_MAX)
    }
}

code_enum! {
    /// A step of the commit, in this order.
    CommitStep: u16 {
        /// Source: stop serving; from here on, the workload answers and changes nothing.
        Freeze = 1, "freeze";
        /// Target: take over the state and get ready to answer.
        Activate = 2, "activate";
        /// Target: serve. Only after the commit record is durable.
        Serve = 3, "serve";
        /// Source: end the workload; the fence follows.
        Retire = 4, "retire";
    }
}

fixed! {
    /// MORPH_COMMIT.
    pub MorphCommit, 32 {
        /// The session.
        session: u64 = 0,
        /// Random; the reply repeats it, to show that both directions work.
        nonce: u64 = 8,
        /// The step.
        step: CommitStep = 16,
        /// Unused, 0.
        flags: u16 = 18,
        ; reserved 12
    }
}

code_enum! {
    /// Result of a step.
    StepStatus: u16 {
        /// Done.
        Done = 1, "done";
        /// Not done; this side is unchanged.
        Refused = 2, "refused";
    }
}

fixed! {
    /// Reply to MORPH_COMMIT.
    pub CommitReply, 40 {
        /// The session.
        session: u64 = 0,
        /// The request's nonce.
        nonce: u64 = 8,
        /// Digest of the state: the digests of FREEZE and ACTIVATE must be equal.
        state_digest: u64 = 16,
        /// Duration, microseconds.
        elapsed_us: u32 = 24,
        /// The step.
        step: CommitStep = 28,
        /// Result.
        status: StepStatus = 30,
        ; reserved 8
    }
}

fixed! {
    /// Fixed part of MORPH_ROLLBACK.
    pub RollbackFixed, 16 {
        /// The session.
        session: u64 = 0,
        /// The addressed side.
        side: Side = 8,
        ; reserved 7
    }
}

/// MORPH_ROLLBACK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MorphRollback {
    /// Fixed part.
    pub fixed: RollbackFixed,
    /// The reason.
    pub text: String,
}

code_enum! {
    /// The state of a side after a rollback.
    RollbackStatus: u16 {
        /// The workload serves (source).
        Running = 1, "running";
        /// The workload has ended (target, or source when it could not resume).
        Stopped = 2, "stopped";
    }
}

fixed! {
    /// Reply to MORPH_ROLLBACK.
    pub RollbackReply, 16 {
        /// The session.
        session: u64 = 0,
        /// The state of the side.
        status: RollbackStatus = 8,
        ; reserved 6
    }
}

impl Payload for MorphRollback {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = RollbackFixed::split(payload)?;
        Ok(Self {
            fixed,
            text: text_record(rest)?,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        append_text(out, &self.text);
    }
}

impl MorphPrepare {
    fn consistent(&self) -> Result<(), LayoutError> {
        if self.session == 0 {
            return Err(LayoutError::Contradiction("session 0"));
        }
        if self.from_generation == self.to_generation {
            return Err(LayoutError::Contradiction(
                "a morph from a generation to itself",
            ));
        }
        Ok(())
    }
}

impl Payload for MorphPrepare {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (prepare, rest) = Self::split(payload)?;
        for record in records(rest) {
            record?.skip()?;
        }
        prepare.consistent()?;
        Ok(prepare)
    }

    fn write(&self, out: &mut Vec<u8>) {
        (*self).append(out);
    }

    fn writable(&self) -> Result<(), LayoutError> {
        self.consistent()
    }
}

fixed_only!(
    SessionReply,
    MorphValidate,
    MorphCommit,
    CommitReply,
    RollbackReply
);

pub(super) const LAYOUTS: &[(&str, Layout)] = &[
    ("MORPH_PREPARE", MorphPrepare::LAYOUT),
    ("MORPH_PREPARE", SessionReply::LAYOUT),
    ("MORPH_TRANSFER_STATE", MorphTransferFixed::LAYOUT),
    ("MORPH_TRANSFER_STATE", Reference::LAYOUT),
    ("MORPH_VALIDATE", MorphValidate::LAYOUT),
    ("MORPH_VALIDATE", ValidateReplyFixed::LAYOUT),
    ("MORPH_VALIDATE", CheckFixed::LAYOUT),
    ("MORPH_COMMIT", MorphCommit::LAYOUT),
    ("MORPH_COMMIT", CommitReply::LAYOUT),
    ("MORPH_ROLLBACK", RollbackFixed::LAYOUT),
    ("MORPH_ROLLBACK", RollbackReply::LAYOUT),
];
