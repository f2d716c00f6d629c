//! The 32-byte frame header.
//!
//! The order of checks is part of the protocol: length available, magic, version, reserved, type known, payload length
//! within the type's limit, checksum, payload layout. The checks up to the payload length need only the header, so a
//! peer is refused before a byte of its payload is buffered.

use core::mem::{offset_of, size_of};

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::types::{ErrorCode, MsgType, REPLY_BIT};
use crate::checksum::crc32;

/// First four bytes of every frame, as a little-endian number.
pub const MAGIC: u32 = 0x4B4D_5000;
/// Version of the protocol.
pub const VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;

/// The header in its wire form.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// [`MAGIC`].
    pub magic: U32,
    /// [`VERSION`].
    pub version: U16,
    /// [`MsgType`], with [`REPLY_BIT`] for a reply.
    pub msg_type: U16,
    /// The sender's counter; a reply repeats that of the request.
    pub sequence: U32,
    /// Length of the payload, bytes.
    pub payload_len: U32,
    /// Nanoseconds since the sender's boot; never compared across kernels.
    pub timestamp: U64,
    /// CRC-32/ISO-HDLC over the header with this field zero, then the payload.
    pub crc32: U32,
    /// Must be 0.
    pub reserved: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(offset_of!(RawHeader, magic) == 0);
    assert!(offset_of!(RawHeader, version) == 4);
    assert!(offset_of!(RawHeader, msg_type) == 6);
    assert!(offset_of!(RawHeader, sequence) == 8);
    assert!(offset_of!(RawHeader, payload_len) == 12);
    assert!(offset_of!(RawHeader, timestamp) == 16);
    assert!(offset_of!(RawHeader, crc32) == 24);
    assert!(offset_of!(RawHeader, reserved) == 28);
};

/// A header with checked fields; its checksum is checked with the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The type.
    pub msg_type: MsgType,
    /// Whether it is a reply.
    pub reply: bool,
    /// The sender's counter, or the request's in a reply.
    pub sequence: u32,
    /// Nanoseconds since the sender's boot.
    pub timestamp: u64,
    /// Length of the payload in bytes, at most the type's limit.
    pub payload_len: u32,
    pub(crate) crc32: u32,
}

/// Why a header was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not KMP.
    #[error("the magic number is {0:#010x}, not {MAGIC:#010x}: the peer does not speak KMP")]
    BadMagic(u32),
    /// The version is not supported.
    #[error("protocol version {0}, this side speaks {VERSION}")]
    UnsupportedVersion(u16),
    /// The reserved field is not zero.
    #[error("the reserved header field is {0:#x}, must be 0")]
    ReservedNotZero(u32),
    /// A type unknown to this version.
    #[error("message type {0:#06x} is unknown")]
    UnknownType(u16),
    /// The payload exceeds the type's limit.
    #[error("a {msg_type} payload of {len} bytes, the limit is {}", msg_type.payload_limit())]
    TooLarge {
        /// The type.
        msg_type: MsgType,
        /// The announced length.
        len: u32,
    },
}

impl HeaderError {
    /// Returns the error code of the answer.
    pub fn code(self) -> ErrorCode {
        match self {
            Self::BadMagic(_) | Self::ReservedNotZero(_) => ErrorCode::Malformed,
            Self::UnsupportedVersion(_) => ErrorCode::UnsupportedVersion,
            Self::UnknownType(_) => ErrorCode::UnknownType,
            Self::TooLarge { .. } => ErrorCode::TooLarge,
        }
    }
}

impl HeaderError {
    /// Returns whether the header has this version, so that its type and sequence are at their known offsets.
    pub(crate) const fn is_of_a_readable_header(self) -> bool {
        matches!(self, Self::UnknownType(_) | Self::TooLarge { .. })
    }
}

impl Header {
    /// Performs all checks that need only the header, in the fixed order.
    ///
    /// # Errors
    /// The first check that fails.
    #[inline]
    pub fn parse(raw: &RawHeader) -> Result<Self, HeaderError> {
        if raw.magic.get() != MAGIC {
            return Err(HeaderError::BadMagic(raw.magic.get()));
        }
        if raw.version.get() != VERSION {
            return Err(HeaderError::UnsupportedVersion(raw.version.get()));
        }
        if raw.reserved.get() != 0 {
            return Err(HeaderError::ReservedNotZero(raw.reserved.get()));
        }
        let value = raw.msg_type.get();
        let reply = value & REPLY_BIT != 0;
        let known = MsgType::from_value(value & !REPLY_BIT).filter(|t| !reply || t.has_reply());
        let msg_type = known.ok_or(HeaderError::UnknownType(value))?;
        let payload_len = raw.payload_len.get();
        if payload_len > msg_type.payload_limit() {
            return Err(HeaderError::TooLarge {
                msg_type,
                len: payload_len,
            });
        }
        Ok(Self {
            msg_type,
            reply,
            sequence: raw.sequence.get(),
            timestamp: raw.timestamp.get(),
            payload_len,
            crc32: raw.crc32.get(),
        })
    }

    /// Returns the header for `payload`, including its checksum.
    #[inline]
    pub(crate) fn seal(
        msg_type: MsgType,
        reply: bool,
        sequence: u32,
        timestamp: u64,
        payload: &[u8],
    ) -> RawHeader {
        let bit = if reply { REPLY_BIT } else { 0 };
        let payload_len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut raw = RawHeader {
            magic: MAGIC.into(),
            version: VERSION.into(),
            msg_type: (msg_type as u16 | bit).into(),
            sequence: sequence.into(),
            payload_len: payload_len.into(),
            timestamp: timestamp.into(),
            crc32: 0.into(),
            reserved: 0.into(),
        };
        raw.crc32 = crc32(&[raw.as_bytes(), payload]).into();
        raw
    }

    /// Returns whether the checksum of `raw` matches `payload`.
    #[inline]
    pub(crate) fn checksum_holds(raw: &RawHeader, payload: &[u8]) -> bool {
        let mut zeroed = *raw;
        zeroed.crc32 = 0.into();
        crc32(&[zeroed.as_bytes(), payload]) == raw.crc32.get()
    }
}
