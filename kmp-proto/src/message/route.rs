//! The permitted senders and channels of each message, and the features it needs.

use super::{Channel, Message, PeerRole, TransferMode, TransferOp, features};
use crate::wire::MsgType;

impl Message {
    /// Returns whether `sender` may send this message on `channel`, according to the tables of `docs/kmp.md`.
    pub fn may_travel(&self, sender: PeerRole, channel: Channel) -> bool {
        let by_daemon = match self.msg_type() {
            MsgType::Error | MsgType::Retry => return true,
            MsgType::MorphTransferState => return self.transfer_may_travel(sender, channel),
            MsgType::VmcoreComplete => return channel == Channel::Bulk,
            MsgType::HeartbeatRsp | MsgType::HealthStatus | MsgType::VmcoreData => false,
            _ => !self.is_reply(),
        };
        let carries = match self.msg_type() {
            MsgType::Hello | MsgType::Authenticate => true,
            MsgType::HeartbeatReq | MsgType::HeartbeatRsp => channel == Channel::Heartbeat,
            MsgType::VmcoreStart | MsgType::VmcoreData => channel == Channel::Bulk,
            _ => channel == Channel::Control,
        };
        carries && by_daemon == (sender == PeerRole::Daemon)
    }

    fn transfer_may_travel(&self, sender: PeerRole, channel: Channel) -> bool {
        let (Self::MorphTransfer(transfer) | Self::MorphTransferReply(transfer)) = self else {
            return false;
        };
        let carries = match transfer.fixed.mode {
            TransferMode::ByReference => channel == Channel::Control,
            TransferMode::Rounds => channel == Channel::Bulk,
        };
        carries
            && match (self.is_reply(), transfer.fixed.op) {
                (true, _) => sender == PeerRole::Instance,
                (false, TransferOp::Pull) => sender == PeerRole::Daemon,
                (false, TransferOp::Chunk | TransferOp::EndOfRound) => channel == Channel::Bulk,
                (false, TransferOp::Applied) => false,
            }
    }

    /// Bits of [`features`] that both sides must have for this message; 0 for most messages.
    pub fn needs(&self) -> u64 {
        match self {
            Self::MorphTransfer(transfer) if transfer.fixed.mode == TransferMode::ByReference => {
                features::MORPHS | features::BY_REFERENCE
            }
            Self::MorphPrepare(_)
            | Self::MorphNegotiate(_)
            | Self::MorphTransfer(_)
            | Self::MorphValidate(_)
            | Self::MorphCommit(_)
            | Self::MorphRollback(_) => features::MORPHS,
            Self::VmcoreStart(_) => features::READS_LENT_MEMORY,
            _ => 0,
        }
    }
}
