//! Checks that a reply matches its request.

use super::{
    CommitStep, Message, MorphCommit, MorphTransfer, StateProvider, TransferMode, TransferOp,
    transfer_flags,
};
use crate::wire::MsgType;

/// Why a reply does not match the request with its sequence. The caller's request fails with this
/// error; nothing is sent back, since nothing answers an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The reply has another type.
    #[error("a {found} answers a {asked}")]
    OtherType {
        /// The type of the request.
        asked: MsgType,
        /// The type of the reply.
        found: MsgType,
    },
    /// A field differs from the request's field.
    #[error("the {msg_type} reply has the {field} {found}, the request has {expected}")]
    OtherField {
        /// The type of both.
        msg_type: MsgType,
        /// The field, as `docs/kmp.md` names it.
        field: &'static str,
        /// The value in the request.
        expected: u64,
        /// The value in the reply.
        found: u64,
    },
    /// A MORPH_TRANSFER_STATE reply that is not `applied`.
    #[error("the MORPH_TRANSFER_STATE reply is {}, not applied", .0.as_str())]
    NotApplied(TransferOp),
}

/// The expected contents of the reply to one request: a few numbers, so that the request need not be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    msg_type: MsgType,
    /// Field name and value of the session, recovery or capture.
    subject: Option<(&'static str, u64)>,
    detail: Detail,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Detail {
    Nothing,
    Applied {
        round: u32,
        mode: TransferMode,
        provider: StateProvider,
        last: bool,
    },
    Step {
        nonce: u64,
        step: CommitStep,
    },
}

impl Expected {
    /// Returns the expected reply to `request`; `None` for a message without a reply.
    pub fn of(request: &Message) -> Option<Self> {
        let msg_type = request.msg_type();
        if request.is_answer() || !msg_type.has_reply() {
            return None;
        }
        let detail = match request {
            Message::MorphTransfer(MorphTransfer { fixed, .. }) => Detail::Applied {
                round: fixed.round,
                mode: fixed.mode,
                provider: fixed.provider,
                last: fixed.flags & transfer_flags::FINAL != 0,
            },
            Message::MorphCommit(MorphCommit { nonce, step, .. }) => Detail::Step {
                nonce: *nonce,
                step: *step,
            },
            _ => Detail::Nothing,
        };
        Some(Self {
            msg_type,
            subject: request.subject(),
            detail,
        })
    }

    /// Checks `reply` against the expected contents.
    ///
    /// # Errors
    /// The first violated rule.
    pub fn check(&self, reply: &Message) -> Result<(), ReplyError> {
        let found = reply.msg_type();
        if !reply.is_reply() || found != self.msg_type {
            let asked = self.msg_type;
            return Err(ReplyError::OtherType { asked, found });
        }
        if let (Some((field, expected)), Some((_, found))) = (self.subject, reply.subject()) {
            self.equal(field, expected, found)?;
        }
        match (self.detail, reply) {
            (
                Detail::Applied {
                    round,
                    mode,
                    provider,
                    last,
                },
                Message::MorphTransferReply(applied),
            ) => {
                let fixed = applied.fixed;
                if fixed.op != TransferOp::Applied {
                    return Err(ReplyError::NotApplied(fixed.op));
                }
                self.equal("round", round.into(), fixed.round.into())?;
                self.equal("mode", mode.value().into(), fixed.mode.value().into())?;
                let found = fixed.provider.value().into();
                self.equal("provider", provider.value().into(), found)?;
                let found = fixed.flags & transfer_flags::FINAL;
                self.equal("flags", u64::from(last), found.into())
            }
            (Detail::Step { nonce, step }, Message::MorphCommitReply(reply)) => {
                self.equal("nonce", nonce, reply.nonce)?;
                self.equal("step", step.value().into(), reply.step.value().into())
            }
            _ => Ok(()),
        }
    }

    fn equal(&self, field: &'static str, expected: u64, found: u64) -> Result<(), ReplyError> {
        if expected == found {
            return Ok(());
        }
        Err(ReplyError::OtherField {
            msg_type: self.msg_type,
            field,
            expected,
            found,
        })
    }
}

impl Message {
    /// Returns the subject of a request, which its reply repeats: the field's name and value.
    fn subject(&self) -> Option<(&'static str, u64)> {
        Some(match self {
            Self::RecoverPrepare(m) => ("recovery", m.fixed.recovery),
            Self::RecoverReclaim(m) => ("recovery", m.fixed.recovery),
            Self::RecoverComplete(m) => ("recovery", m.fixed.recovery),
            Self::RecoverPrepareReply(m)
            | Self::RecoverReclaimReply(m)
            | Self::RecoverCompleteReply(m) => ("recovery", m.recovery),
            Self::VmcoreStart(m) => ("capture", m.fixed.capture),
            Self::VmcoreComplete(m) | Self::VmcoreStartReply(m) | Self::VmcoreCompleteReply(m) => {
                ("capture", m.capture)
            }
            Self::MorphPrepare(m) => ("session", m.session),
            Self::MorphPrepareReply(m) => ("session", m.session),
            Self::MorphNegotiate(m) => ("session", m.session),
            Self::MorphNegotiateReply(m) => ("session", m.session),
            Self::MorphTransfer(m) | Self::MorphTransferReply(m) => ("session", m.fixed.session),
            Self::MorphValidate(m) => ("session", m.session),
            Self::MorphValidateReply(m) => ("session", m.fixed.session),
            Self::MorphCommit(m) => ("session", m.session),
            Self::MorphCommitReply(m) => ("session", m.session),
            Self::MorphRollback(m) => ("session", m.fixed.session),
            Self::MorphRollbackReply(m) => ("session", m.session),
            _ => return None,
        })
    }
}
