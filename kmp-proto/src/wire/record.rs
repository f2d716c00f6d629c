//! Records: the optional part of a payload.
//!
//! `{kind u16, flags u16, len u32, bytes, zero padding to 8}`. An unknown record is skipped, unless
//! its flag bit 0 (critical) is set: then the message is refused. A known record that appears more
//! often than its message allows is malformed.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::message::LayoutError;

/// Flag: refuse the message if the kind is unknown.
pub(crate) const CRITICAL: u16 = 1;
const ALIGN: usize = 8;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RecordHeader {
    kind: U16,
    flags: U16,
    len: U32,
}

const _: () = assert!(core::mem::size_of::<RecordHeader>() == 8);

macro_rules! kinds {
    ($($name:ident = $value:literal;)*) => {
        $(pub(crate) const $name: u16 = $value;)*
        /// All record kinds: number and name in `docs/kmp.md`.
        pub const RECORD_KINDS: &[(u16, &str)] = &[$(($value, stringify!($name)),)*];
    };
}

kinds! {
    INSTANCE_ID = 1;
    KERNEL_RELEASE = 2;
    AGENT_VERSION = 3;
    TEXT = 4;
    FENCE_CERTIFICATE = 5;
    TOPOLOGY = 6;
    PROVIDER = 7;
    DATA = 8;
    REFERENCE = 9;
    CHECK = 10;
    RANGE = 11;
    PCI_PORT = 12;
    WINDOW = 13;
    NONCE = 14;
    PROOF = 15;
    CPU_STALL = 16;
}

/// One record.
pub(crate) struct Record<'a> {
    pub(crate) kind: u16,
    pub(crate) bytes: &'a [u8],
    critical: bool,
}

impl<'a> Record<'a> {
    /// Handles an unknown kind: skips it, or refuses it if it is critical.
    pub(crate) fn skip(&self) -> Result<(), LayoutError> {
        if self.critical {
            Err(LayoutError::CriticalRecord(self.kind))
        } else {
            Ok(())
        }
    }

    /// Returns the record as text of at most `limit` bytes.
    pub(crate) fn text(&self, limit: usize) -> Result<String, LayoutError> {
        if self.bytes.len() > limit {
            return Err(LayoutError::TextTooLong {
                kind: self.kind,
                limit,
            });
        }
        let text = core::str::from_utf8(self.bytes).map_err(|_| LayoutError::NotText)?;
        Ok(text.to_owned())
    }
}

/// Iterates over the records in `bytes`.
pub(crate) fn records(bytes: &[u8]) -> impl Iterator<Item = Result<Record<'_>, LayoutError>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let record = split(&mut rest);
        if record.is_err() {
            rest = &[];
        }
        Some(record)
    })
}

fn split<'a>(rest: &mut &'a [u8]) -> Result<Record<'a>, LayoutError> {
    let (header, after) =
        RecordHeader::read_from_prefix(rest).map_err(|_| LayoutError::TooShort)?;
    let len = usize::try_from(header.len.get()).map_err(|_| LayoutError::TooShort)?;
    let bytes = after.get(..len).ok_or(LayoutError::TooShort)?;
    let padding = len.wrapping_neg() % ALIGN;
    let pad = after.get(len..len + padding).ok_or(LayoutError::TooShort)?;
    if pad.iter().any(|b| *b != 0) {
        return Err(LayoutError::ReservedNotZero);
    }
    *rest = &after[len + padding..];
    let critical = header.flags.get() & CRITICAL != 0;
    Ok(Record {
        kind: header.kind.get(),
        bytes,
        critical,
    })
}

/// Appends a record. The caller keeps payloads within their limit, so the length fits.
pub(crate) fn append(out: &mut Vec<u8>, kind: u16, flags: u16, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let header = RecordHeader {
        kind: kind.into(),
        flags: flags.into(),
        len: len.into(),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(bytes);
    out.resize(out.len() + bytes.len().wrapping_neg() % ALIGN, 0);
}

/// Sets `slot`, which must be empty.
pub(crate) fn once<T>(slot: &mut Option<T>, value: T, kind: u16) -> Result<(), LayoutError> {
    if slot.replace(value).is_some() {
        Err(LayoutError::Repeated(kind))
    } else {
        Ok(())
    }
}
