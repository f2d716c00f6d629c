//! Messages as Rust values: one struct per payload, one enum over all of them.
//!
//! Decoding yields owned values without a pointer into the frame; encoding appends bytes. Every
//! layout is in `docs/kmp.md` and in a golden frame.

mod fault;
mod heartbeat;
mod hello;
mod incoming;
mod morph;
mod provider;
mod recover;
mod reply;
mod route;
mod topology;
mod vmcore;

pub use fault::{ErrorInfo, RetryAfter};
pub use heartbeat::{
    CpuStall, Health, HealthStatus, HealthStatusFixed, HeartbeatReq, HeartbeatRsp,
    HeartbeatRspFixed, PRESSURE_ABSENT, WorkloadState,
};
pub use hello::{
    Authenticate, Authenticated, Channel, Hello, HelloError, HelloFixed, PeerRole,
    SHORT_TEXT_MAX_BYTES, features,
};
pub use incoming::{IncomingState, STATE_CHUNK_MAX_BYTES, StateError};
pub use morph::{
    Check, CheckResult, CommitReply, CommitStep, MorphCommit, MorphPrepare, MorphRollback,
    MorphTransfer, MorphTransferFixed, MorphValidate, Reference, RollbackFixed, RollbackReply,
    RollbackStatus, SessionReply, Side, StepStatus, TransferMode, TransferOp, ValidateReply,
    ValidateReplyFixed, transfer_flags,
};
pub use provider::{
    MorphNegotiate, NegotiateReply, PROVIDERS_MAX, ProviderOffer, StateProvider, capability,
};
pub use recover::{
    FailureCause, FenceClaim, RecoverComplete, RecoverCompleteFixed, RecoverFixed, RecoverNotice,
    RecoverReclaim, RecoverReply, RecoveryOutcome, TopologyEntry, complete_flags,
};
pub use reply::{Expected, ReplyError};
pub use topology::{PartError, TopologyParts};
pub use vmcore::{
    CHUNK_MAX_BYTES, CaptureStatus, ChunkEncoding, MemoryRange, MemoryWindow, PCI_PORT_MAX_BYTES,
    RANGES_MAX, VmcoreComplete, VmcoreData, VmcoreDataFixed, VmcoreStart, VmcoreStartFixed,
    WINDOWS_MAX,
};

use crate::wire::{ErrorCode, Layout, MsgType};

/// Maximum length of a text in a record, in bytes.
pub const TEXT_MAX_BYTES: usize = 512;
/// Maximum length of an instance id, in bytes.
pub const INSTANCE_ID_MAX_BYTES: usize = 63;

/// Returns all byte tables of `docs/kmp.md`, each with its heading.
pub fn layouts() -> impl Iterator<Item = (&'static str, Layout)> {
    let parts = [
        hello::LAYOUTS,
        heartbeat::LAYOUTS,
        recover::LAYOUTS,
        vmcore::LAYOUTS,
        morph::LAYOUTS,
        provider::LAYOUTS,
        fault::LAYOUTS,
    ];
    parts.into_iter().flatten().copied()
}

/// Why a payload with a valid checksum was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The payload is shorter than its fixed part, or a record extends beyond the end.
    #[error("the payload ends too early")]
    TooShort,
    /// Trailing bytes after a payload without records.
    #[error("{0} bytes after the end of the payload")]
    Trailing(usize),
    /// Reserved bytes or padding are not zero.
    #[error("reserved bytes are not zero")]
    ReservedNotZero,
    /// A number that is not defined in version 1.
    #[error("{value} is no {field}")]
    BadValue {
        /// The field's type.
        field: &'static str,
        /// The number.
        value: u64,
    },
    /// A critical record of unknown kind.
    #[error("record kind {0} is unknown and marked critical")]
    CriticalRecord(u16),
    /// A single-use record appears again.
    #[error("record kind {0} appears more than once")]
    Repeated(u16),
    /// A required record is missing.
    #[error("record kind {0} is missing")]
    MissingRecord(u16),
    /// A text is too long.
    #[error("the text of record kind {kind} is longer than {limit} bytes")]
    TextTooLong {
        /// The record's kind.
        kind: u16,
        /// Its limit.
        limit: usize,
    },
    /// A text is not UTF-8.
    #[error("a text is not UTF-8")]
    NotText,
    /// Too many entries.
    #[error("more than {0} entries")]
    TooMany(usize),
    /// Lengths contradict each other.
    #[error("lengths contradict each other")]
    Inconsistent,
    /// A fixed-length record has another length.
    #[error("record kind {0} has another length than it must")]
    WrongLength(u16),
    /// Fields contradict each other, or a number is invalid.
    #[error("{0}")]
    Contradiction(&'static str),
}

impl LayoutError {
    /// Returns the error code of the answer.
    pub fn code(self) -> ErrorCode {
        ErrorCode::Malformed
    }
}

/// Decoding and encoding of one payload.
pub(crate) trait Payload: Sized {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError>;
    fn write(&self, out: &mut Vec<u8>);

    /// Checks that a receiver would accept this payload. The encoder truncates texts for people; it
    /// does not truncate lists and names, since a part of them would have another meaning.
    fn writable(&self) -> Result<(), LayoutError> {
        Ok(())
    }
}

/// Checks the length of a list against its limit.
pub(crate) fn at_most(len: usize, limit: usize) -> Result<(), LayoutError> {
    if len > limit {
        Err(LayoutError::TooMany(limit))
    } else {
        Ok(())
    }
}

/// Checks the length of an instance id against its limit.
pub(crate) fn writable_id(instance: &str) -> Result<(), LayoutError> {
    if instance.len() > INSTANCE_ID_MAX_BYTES {
        Err(LayoutError::TextTooLong {
            kind: crate::wire::record::INSTANCE_ID,
            limit: INSTANCE_ID_MAX_BYTES,
        })
    } else {
        Ok(())
    }
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident($body:ty) = $ty:ident, $reply:literal;)*) => {
        /// Any message.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Message {
            $($(#[$doc])* $name($body),)*
        }

        impl Message {
            /// Returns its type.
            pub const fn msg_type(&self) -> MsgType {
                match self {
                    $(Self::$name(_) => MsgType::$ty,)*
                }
            }

            /// Returns whether it is a reply.
            pub const fn is_reply(&self) -> bool {
                match self {
                    $(Self::$name(_) => $reply,)*
                }
            }

            /// Returns whether the message answers another one. Nothing answers an answer: two
            /// peers would refuse each other forever.
            pub const fn is_answer(&self) -> bool {
                self.is_reply()
                    || matches!(
                        self.msg_type(),
                        MsgType::HeartbeatRsp | MsgType::Error | MsgType::Retry
                    )
            }

            pub(crate) fn parse(
                msg_type: MsgType,
                reply: bool,
                payload: &[u8],
            ) -> Result<Self, LayoutError> {
                match (msg_type, reply) {
                    $((MsgType::$ty, $reply) => <$body as Payload>::parse(payload).map(Self::$name),)*
                    // The header check already refused this type: it has no reply.
                    (other, _) => Err(LayoutError::BadValue {
                        field: "msg_type",
                        value: other as u64,
                    }),
                }
            }

            pub(crate) fn writable(&self) -> Result<(), LayoutError> {
                match self {
                    $(Self::$name(body) => body.writable(),)*
                }
            }

            pub(crate) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$name(body) => body.write(out),)*
                }
            }
        }
    };
}

messages! {
    /// See [`MsgType::Hello`].
    Hello(Hello) = Hello, false;
    /// The other side's HELLO.
    HelloReply(Hello) = Hello, true;
    /// See [`MsgType::Authenticate`].
    Authenticate(Authenticate) = Authenticate, false;
    /// Its reply.
    AuthenticateReply(Authenticated) = Authenticate, true;
    /// See [`MsgType::HeartbeatReq`].
    HeartbeatReq(HeartbeatReq) = HeartbeatReq, false;
    /// See [`MsgType::HeartbeatRsp`].
    HeartbeatRsp(HeartbeatRsp) = HeartbeatRsp, false;
    /// See [`MsgType::HealthStatus`].
    HealthStatus(HealthStatus) = HealthStatus, false;
    /// See [`MsgType::RecoverPrepare`].
    RecoverPrepare(RecoverNotice) = RecoverPrepare, false;
    /// Its reply.
    RecoverPrepareReply(RecoverReply) = RecoverPrepare, true;
    /// See [`MsgType::RecoverReclaim`].
    RecoverReclaim(RecoverReclaim) = RecoverReclaim, false;
    /// Its reply.
    RecoverReclaimReply(RecoverReply) = RecoverReclaim, true;
    /// See [`MsgType::RecoverComplete`].
    RecoverComplete(RecoverComplete) = RecoverComplete, false;
    /// Its reply.
    RecoverCompleteReply(RecoverReply) = RecoverComplete, true;
    /// See [`MsgType::VmcoreStart`].
    VmcoreStart(VmcoreStart) = VmcoreStart, false;
    /// Its reply.
    VmcoreStartReply(VmcoreComplete) = VmcoreStart, true;
    /// See [`MsgType::VmcoreData`].
    VmcoreData(VmcoreData) = VmcoreData, false;
    /// See [`MsgType::VmcoreComplete`].
    VmcoreComplete(VmcoreComplete) = VmcoreComplete, false;
    /// Its reply.
    VmcoreCompleteReply(VmcoreComplete) = VmcoreComplete, true;
    /// See [`MsgType::MorphPrepare`].
    MorphPrepare(MorphPrepare) = MorphPrepare, false;
    /// Its reply.
    MorphPrepareReply(SessionReply) = MorphPrepare, true;
    /// See [`MsgType::MorphNegotiate`].
    MorphNegotiate(MorphNegotiate) = MorphNegotiate, false;
    /// Its reply.
    MorphNegotiateReply(NegotiateReply) = MorphNegotiate, true;
    /// See [`MsgType::MorphTransferState`].
    MorphTransfer(MorphTransfer) = MorphTransferState, false;
    /// Its reply.
    MorphTransferReply(MorphTransfer) = MorphTransferState, true;
    /// See [`MsgType::MorphValidate`].
    MorphValidate(MorphValidate) = MorphValidate, false;
    /// Its reply.
    MorphValidateReply(ValidateReply) = MorphValidate, true;
    /// See [`MsgType::MorphCommit`].
    MorphCommit(MorphCommit) = MorphCommit, false;
    /// Its reply.
    MorphCommitReply(CommitReply) = MorphCommit, true;
    /// See [`MsgType::MorphRollback`].
    MorphRollback(MorphRollback) = MorphRollback, false;
    /// Its reply.
    MorphRollbackReply(RollbackReply) = MorphRollback, true;
    /// See [`MsgType::Error`].
    Error(ErrorInfo) = Error, false;
    /// See [`MsgType::Retry`].
    Retry(RetryAfter) = Retry, false;
}

/// Implements [`Payload`] for a fixed part without records.
macro_rules! fixed_only {
    ($($name:ty),*) => {$(
        impl $crate::message::Payload for $name {
            fn parse(payload: &[u8]) -> Result<Self, $crate::message::LayoutError> {
                let (fixed, rest) = Self::split(payload)?;
                for record in $crate::wire::record::records(rest) {
                    record?.skip()?;
                }
                Ok(fixed)
            }
            fn write(&self, out: &mut Vec<u8>) {
                (*self).append(out);
            }
        }
    )*};
}
pub(crate) use fixed_only;

/// Truncates a text to its limit at a character boundary, so that it always parses.
pub(crate) fn clip(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
