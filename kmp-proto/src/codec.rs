//! The frame stream: bytes to messages and back.
//!
//! ```text
//! feed ──▶ [ header 32 B ] ──▶ checks 1-6 ──▶ [ payload ≤ limit ] ──▶ crc ──▶ layout ──▶ Frame
//!                │                                  │                    │        │
//!                └──────────────── FrameError: poisoned, never resynchronises ────┘
//! ```
//!
//! Invariants: incomplete input is not an error; at most one frame is buffered, and its payload only
//! after the header was accepted; after an error every further call fails with the same error.

use zerocopy::{FromBytes, IntoBytes};

use crate::message::{ErrorInfo, LayoutError, Message};
use crate::wire::{ErrorCode, HEADER_BYTES, Header, HeaderError, MsgType, RawHeader};

/// One frame, decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// Its message.
    pub message: Message,
}

/// Why a frame was refused. The stream must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fault}")]
pub struct FrameError {
    /// The error.
    pub fault: FrameFault,
    /// The frame, if its header could be read.
    pub offender: Option<Offender>,
}

/// The frame that caused an error, as its header names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offender {
    /// `msg_type` from the header, with its reply bit.
    pub msg_type: u16,
    /// Its sequence.
    pub sequence: u32,
}

/// An error in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameFault {
    /// The header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The checksum does not match.
    #[error("the checksum of a {0} frame does not hold")]
    BadCrc(MsgType),
    /// The payload's layout.
    #[error("the payload of a {msg_type} frame is malformed: {reason}")]
    Layout {
        /// The type.
        msg_type: MsgType,
        /// The reason.
        reason: LayoutError,
    },
}

impl FrameError {
    /// Error code of the answer that precedes the close.
    pub fn code(self) -> ErrorCode {
        match self.fault {
            FrameFault::Header(error) => error.code(),
            FrameFault::BadCrc(_) => ErrorCode::BadCrc,
            FrameFault::Layout { reason, .. } => reason.code(),
        }
    }

    /// Returns the ERROR that precedes the close.
    pub fn answer(self) -> ErrorInfo {
        ErrorInfo {
            code: self.code(),
            offending_type: self.offender.map_or(0, |offender| offender.msg_type),
            offending_sequence: self.offender.map_or(0, |offender| offender.sequence),
            text: self.to_string(),
        }
    }
}

/// Why a message cannot be encoded: no peer would accept it. Nothing was written, and the connection stays usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The frame exceeds the limit of its type.
    #[error("a {msg_type} payload of {len} bytes does not fit its limit of {}", msg_type.payload_limit())]
    TooLarge {
        /// The type.
        msg_type: MsgType,
        /// The payload's length.
        len: usize,
    },
    /// A list or a name in the message exceeds its limit.
    #[error("a {msg_type} message cannot be written: {reason}")]
    Unwritable {
        /// The type.
        msg_type: MsgType,
        /// The reason.
        reason: LayoutError,
    },
}

/// Appends a whole frame to `out`; leaves it unchanged on failure.
///
/// # Errors
/// If the message, or a list or name in it, is larger than its type allows.
pub fn encode(
    message: &Message,
    sequence: u32,
    timestamp: u64,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let msg_type = message.msg_type();
    message
        .writable()
        .map_err(|reason| EncodeError::Unwritable { msg_type, reason })?;
    let start = out.len();
    out.resize(start + HEADER_BYTES, 0);
    message.write(out);
    let (head, payload) = out[start..].split_at_mut(HEADER_BYTES);
    let len = payload.len();
    if len > msg_type.payload_limit() as usize {
        out.truncate(start);
        return Err(EncodeError::TooLarge { msg_type, len });
    }
    let raw = Header::seal(msg_type, message.is_reply(), sequence, timestamp, payload);
    head.copy_from_slice(raw.as_bytes());
    Ok(())
}

/// Decodes a stream.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    accepted: Option<(RawHeader, Header)>,
    poison: Option<FrameError>,
}

impl Decoder {
    /// Creates a decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the bytes of the next frame from the front of `input`. `Ok(None)`: all bytes were taken, and the frame is
    /// incomplete.
    ///
    /// # Errors
    /// If the stream is broken; every later call then fails too.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = self.poison {
            return Err(error);
        }
        let result = self.advance(input);
        if let Err(error) = result {
            self.poison = Some(error);
            self.buffer = Vec::new();
        }
        result
    }

    /// Returns the number of buffered bytes of an incomplete frame.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
            + if self.accepted.is_some() {
                HEADER_BYTES
            } else {
                0
            }
    }

    #[inline]
    fn advance(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        let (raw, header) = match self.accepted {
            Some(accepted) => accepted,
            None => {
                let Some(raw) = self.header(input) else {
                    return Ok(None);
                };
                let header = Header::parse(&raw).map_err(|error| FrameError {
                    fault: error.into(),
                    offender: error.is_of_a_readable_header().then(|| offender(&raw)),
                })?;
                (raw, header)
            }
        };
        let want = header.payload_len as usize;
        if self.buffer.is_empty() && input.len() >= want {
            let (payload, rest) = input.split_at(want);
            *input = rest;
            self.accepted = None;
            return finish(&raw, header, payload).map(Some);
        }
        self.accepted = Some((raw, header));
        self.take(input, want);
        if self.buffer.len() < want {
            return Ok(None);
        }
        self.accepted = None;
        let frame = finish(&raw, header, &self.buffer)?;
        self.buffer = Vec::new();
        Ok(Some(frame))
    }

    #[inline]
    fn header(&mut self, input: &mut &[u8]) -> Option<RawHeader> {
        if self.buffer.is_empty()
            && let Ok((raw, rest)) = RawHeader::read_from_prefix(input)
        {
            *input = rest;
            return Some(raw);
        }
        self.take(input, HEADER_BYTES);
        let raw = RawHeader::read_from_bytes(&self.buffer).ok()?;
        self.buffer.clear();
        Some(raw)
    }

    /// Moves bytes from `input` until the buffer holds `want`.
    fn take(&mut self, input: &mut &[u8], want: usize) {
        let count = want.saturating_sub(self.buffer.len()).min(input.len());
        let (taken, rest) = input.split_at(count);
        self.buffer.extend_from_slice(taken);
        *input = rest;
    }
}

#[inline]
fn finish(raw: &RawHeader, header: Header, payload: &[u8]) -> Result<Frame, FrameError> {
    let msg_type = header.msg_type;
    let refused = |fault| FrameError {
        fault,
        offender: Some(offender(raw)),
    };
    if !Header::checksum_holds(raw, payload) {
        return Err(refused(FrameFault::BadCrc(msg_type)));
    }
    let message = Message::parse(msg_type, header.reply, payload)
        .map_err(|reason| refused(FrameFault::Layout { msg_type, reason }))?;
    Ok(Frame { header, message })
}

fn offender(raw: &RawHeader) -> Offender {
    Offender {
        msg_type: raw.msg_type.get(),
        sequence: raw.sequence.get(),
    }
}
