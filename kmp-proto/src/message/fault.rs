//! ERROR and RETRY.

use super::heartbeat::{append_text, text_record};
use super::{LayoutError, Payload, fixed_only};
use crate::wire::ErrorCode;
use crate::wire::Layout;
use crate::wire::field::fixed;

fixed! {
    /// Fixed part of ERROR.
    ErrorFixed, 16 {
        /// The reason.
        code: ErrorCode = 0,
        /// `msg_type` of the refused frame, including its reply bit; 0 if it could not be read.
        offending_type: u16 = 2,
        /// Its sequence.
        offending_sequence: u32 = 4,
        ; reserved 8
    }
}

/// ERROR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorInfo {
    /// The reason.
    pub code: ErrorCode,
    /// `msg_type` of the refused frame.
    pub offending_type: u16,
    /// Its sequence.
    pub offending_sequence: u32,
    /// Text for people, at most 512 bytes.
    pub text: String,
}

impl Payload for ErrorInfo {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = ErrorFixed::split(payload)?;
        let text = text_record(rest)?;
        let ErrorFixed {
            code,
            offending_type,
            offending_sequence,
        } = fixed;
        Ok(Self {
            code,
            offending_type,
            offending_sequence,
            text,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let Self {
            code,
            offending_type,
            offending_sequence,
            ..
        } = *self;
        ErrorFixed {
            code,
            offending_type,
            offending_sequence,
        }
        .append(out);
        append_text(out, &self.text);
    }
}

fixed! {
    /// RETRY.
    pub RetryAfter, 16 {
        /// Minimum wait in milliseconds; the sender then backs off exponentially with jitter.
        retry_after_ms: u32 = 0,
        /// The reason.
        reason: ErrorCode = 4,
        /// `msg_type` of the deferred frame.
        offending_type: u16 = 6,
        /// Its sequence.
        offending_sequence: u32 = 8,
        ; reserved 4
    }
}

fixed_only!(RetryAfter);

pub(super) const LAYOUTS: &[(&str, Layout)] =
    &[("ERROR", ErrorFixed::LAYOUT), ("RETRY", RetryAfter::LAYOUT)];
