//! A RECOVER_COMPLETE whose topology does not fit into one frame: split into parts, and reassembled.

use super::recover::{RECORD_HEADER_BYTES, TOPOLOGY_MAX_ENTRIES};
use super::{RecoverComplete, RecoverCompleteFixed, complete_flags};
use crate::wire::MsgType;

/// Why a part of a topology was refused; the parts before it are discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartError {
    /// The part is out of order.
    #[error("part {found} of recovery {recovery}, part {expected} was to come")]
    OutOfOrder {
        /// Its recovery.
        recovery: u64,
        /// The expected part.
        expected: u16,
        /// The received part.
        found: u16,
    },
    /// The part belongs to another message than the parts before it.
    #[error("a part of recovery {0} says otherwise than the parts before it")]
    OfAnother(u64),
    /// The part is empty, and not the last one.
    #[error("a part without an entry is followed by another")]
    Empty,
    /// The topology has too many entries.
    #[error("more than {TOPOLOGY_MAX_ENTRIES} instances")]
    TooMany,
}

impl RecoverComplete {
    /// Splits the message into messages that each fit into a frame; one, if the whole message fits.
    pub fn into_parts(self) -> Vec<Self> {
        let limit = MsgType::RecoverComplete.payload_limit() as usize;
        let begin = RecoverCompleteFixed::BYTES
            + RECORD_HEADER_BYTES
            + self.instance.len().next_multiple_of(8);
        let (mut parts, mut bytes) = (Vec::new(), begin);
        let mut entries = Vec::new();
        for entry in self.topology {
            let size = entry.record_bytes();
            if bytes + size > limit && !entries.is_empty() {
                parts.push(std::mem::take(&mut entries));
                bytes = begin;
            }
            bytes += size;
            entries.push(entry);
        }
        parts.push(entries);
        let last = parts.len() - 1;
        let part = |(n, topology)| {
            let more = if n < last { complete_flags::MORE } else { 0 };
            Self {
                fixed: RecoverCompleteFixed {
                    part: u16::try_from(n).unwrap_or(u16::MAX),
                    flags: self.fixed.flags & !complete_flags::MORE | more,
                    ..self.fixed
                },
                instance: self.instance.clone(),
                topology,
            }
        };
        parts.into_iter().enumerate().map(part).collect()
    }
}

/// Reassembles the parts of one RECOVER_COMPLETE. Holds at most one topology.
#[derive(Debug, Default)]
pub struct TopologyParts {
    so_far: Option<RecoverComplete>,
}

impl TopologyParts {
    /// Handles the next part. Returns the whole topology if the part was the last one. Part 0 starts a new topology.
    ///
    /// # Errors
    /// If the part does not follow those before it.
    pub fn take(&mut self, part: RecoverComplete) -> Result<Option<RecoverComplete>, PartError> {
        let before = self.so_far.take();
        let (number, recovery) = (part.fixed.part, part.fixed.recovery);
        let more = part.fixed.flags & complete_flags::MORE != 0;
        if more && part.topology.is_empty() {
            return Err(PartError::Empty);
        }
        let mut whole = match (number, before) {
            (0, _) => part,
            (found, None) => {
                let expected = 0;
                return Err(PartError::OutOfOrder {
                    recovery,
                    expected,
                    found,
                });
            }
            (found, Some(mut whole)) => {
                let expected = whole.fixed.part.saturating_add(1);
                if found != expected {
                    return Err(PartError::OutOfOrder {
                        recovery,
                        expected,
                        found,
                    });
                }
                let same = RecoverCompleteFixed {
                    part: whole.fixed.part,
                    flags: whole.fixed.flags,
                    ..part.fixed
                };
                if same != whole.fixed || part.instance != whole.instance {
                    return Err(PartError::OfAnother(recovery));
                }
                whole.fixed.part = number;
                whole.topology.extend(part.topology);
                whole
            }
        };
        if whole.topology.len() > TOPOLOGY_MAX_ENTRIES {
            return Err(PartError::TooMany);
        }
        if more {
            self.so_far = Some(whole);
            return Ok(None);
        }
        whole.fixed.part = 0;
        whole.fixed.flags &= !complete_flags::MORE;
        Ok(Some(whole))
    }
}
