//! Numbers that all implementations share.

use super::field::open_enum;
use crate::message::Channel;

/// Maximum payload of any message, in bytes.
pub const PAYLOAD_MAX_BYTES: u32 = 1024 * 1024;
/// Bit of `msg_type` that marks a reply to that type.
pub const REPLY_BIT: u16 = 0x8000;

macro_rules! msg_types {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $spec:literal, $limit:expr, $reply:literal;)*) => {
        /// The type of a message, without the reply bit.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum MsgType {
            $($(#[$doc])* $name = $value,)*
        }

        impl MsgType {
            /// All types, by value.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Returns the type with this value.
            pub const fn from_value(value: u16) -> Option<Self> {
                match value {
                    $($value => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Returns the name used in documents and logs.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $spec,)*
                }
            }

            /// Returns the maximum payload of this type, in bytes; its reply has the same limit.
            pub const fn payload_limit(self) -> u32 {
                match self {
                    $(Self::$name => $limit,)*
                }
            }

            /// Returns whether a reply with this type and [`REPLY_BIT`] exists.
            pub const fn has_reply(self) -> bool {
                match self {
                    $(Self::$name => $reply,)*
                }
            }
        }
    };
}

msg_types! {
    /// First frame in each direction of every connection.
    Hello = 0x0001, "HELLO", 1024, true;
    /// Daemon to instance: proof of the key.
    Authenticate = 0x0002, "AUTHENTICATE", 128, true;
    /// Daemon to instance: a probe.
    HeartbeatReq = 0x0101, "HEARTBEAT_REQ", 128, false;
    /// Instance to daemon: the answer to a probe, with the instance's figures. The whole frame is under 256 bytes.
    HeartbeatRsp = 0x0102, "HEARTBEAT_RSP", 223, false;
    /// Instance to daemon, unsolicited: health of the instance.
    HealthStatus = 0x0103, "HEALTH_STATUS", 1024, false;
    /// Daemon to survivors: a generation has failed.
    RecoverPrepare = 0x0201, "RECOVER_PREPARE", 4096, true;
    /// Daemon to survivors: the failed generation is fenced; release everything shared with it.
    RecoverReclaim = 0x0202, "RECOVER_RECLAIM", 4096, true;
    /// Daemon to survivors: the recovery is over, with the new topology.
    RecoverComplete = 0x0203, "RECOVER_COMPLETE", 256 * 1024, true;
    /// Daemon to a survivor: capture this memory.
    VmcoreStart = 0x0211, "VMCORE_START", 64 * 1024, true;
    /// Survivor to daemon: a chunk of the memory.
    VmcoreData = 0x0212, "VMCORE_DATA", PAYLOAD_MAX_BYTES, false;
    /// Both directions: the capture is over.
    VmcoreComplete = 0x0213, "VMCORE_COMPLETE", 1024, true;
    /// Daemon to both sides: a morph begins.
    MorphPrepare = 0x0301, "MORPH_PREPARE", 1024, true;
    /// Daemon to both sides: list your state providers.
    MorphNegotiate = 0x0302, "MORPH_NEGOTIATE", 8192, true;
    /// Source to daemon to target: state.
    MorphTransferState = 0x0303, "MORPH_TRANSFER_STATE", PAYLOAD_MAX_BYTES, true;
    /// Daemon to target: validate the received state.
    MorphValidate = 0x0304, "MORPH_VALIDATE", 64 * 1024, true;
    /// Daemon to both sides: one step of the commit.
    MorphCommit = 0x0305, "MORPH_COMMIT", 1024, true;
    /// Daemon to both sides: roll back.
    MorphRollback = 0x0306, "MORPH_ROLLBACK", 1024, true;
    /// Both directions: refusal of a message.
    Error = 0x0F01, "ERROR", 1024, false;
    /// Both directions: retry later.
    Retry = 0x0F02, "RETRY", 256, false;
}

open_enum! {
    /// Why a message was refused.
    ErrorCode: u16 {
        /// The frame or its payload violates the layout.
        Malformed = 1, "malformed";
        /// The frame's checksum does not match.
        BadCrc = 2, "bad crc";
        /// The sides have no common version.
        UnsupportedVersion = 3, "unsupported version";
        /// A message type unknown to version 1.
        UnknownType = 4, "unknown type";
        /// Not permitted at this time, on this channel, or from this side.
        UnexpectedInState = 5, "unexpected in this state";
        /// A limit of the protocol is exceeded.
        TooLarge = 6, "too large";
        /// The message names another generation than the receiver's.
        StaleGeneration = 7, "stale generation";
        /// Impossible with the capabilities of both sides.
        Incompatible = 8, "incompatible";
        /// Temporarily refused.
        Busy = 9, "busy";
        /// The operation timed out.
        TimedOut = 10, "timed out";
        /// The receiver's policy forbids it.
        RefusedByPolicy = 11, "refused by policy";
        /// Not enough of a resource.
        ResourceExhausted = 12, "resource exhausted";
        /// The received data differs from the sent data.
        ValidationFailed = 13, "validation failed";
        /// The certificate does not cover the resources to reclaim.
        NotFenced = 14, "not fenced";
        /// An internal error of the receiver.
        Internal = 15, "internal";
        /// HELLO names another instance, or comes from the wrong side.
        WrongPeer = 16, "wrong peer";
        /// The proof of the key is missing or wrong.
        NotAuthentic = 17, "not authentic";
        /// The instance has accepted a newer daemon.
        OlderDaemon = 18, "older daemon";
    }
}

impl ErrorCode {
    /// Returns the words in documents and logs.
    pub const fn text(self) -> &'static str {
        self.as_str()
    }

    /// Returns whether an ERROR with this code ends the connection it is sent on. On a bulk channel, every
    /// error except [`ErrorCode::UnexpectedInState`] does: incomplete state is useless.
    pub const fn ends(self, channel: Channel) -> bool {
        match self {
            Self::Malformed
            | Self::BadCrc
            | Self::UnsupportedVersion
            | Self::UnknownType
            | Self::TooLarge
            | Self::StaleGeneration
            | Self::WrongPeer
            | Self::NotAuthentic
            | Self::OlderDaemon => true,
            Self::UnexpectedInState => false,
            _ => matches!(channel, Channel::Bulk),
        }
    }
}

impl std::fmt::Display for MsgType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
