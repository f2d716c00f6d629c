//! Checks the state that one side of a morph sends against its announcement.

use super::{MorphTransfer, StateProvider, TransferMode, TransferOp};
use crate::wire::ErrorCode;

/// Maximum number of state bytes in one chunk of a morph.
pub const STATE_CHUNK_MAX_BYTES: usize = 65_536;

/// A violation by one side of the transfer. The bulk channel ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The frame is neither a chunk nor the end of a round, in rounds mode, of this session.
    #[error("a {} of session {session}, not state of the session of this channel", .op.as_str())]
    NotState {
        /// The received operation.
        op: TransferOp,
        /// The session in the frame.
        session: u64,
    },
    /// The frame belongs to a different round.
    #[error("a frame of round {found}, round {expected} is under way")]
    OtherRound {
        /// The current round, or the next one.
        expected: u32,
        /// The round in the frame.
        found: u32,
    },
    /// The frame belongs to another provider than the chosen one.
    #[error("a frame of the provider {found}, the state is carried by {expected}")]
    OtherProvider {
        /// The chosen provider.
        expected: StateProvider,
        /// The provider in the frame.
        found: StateProvider,
    },
    /// The chunk is too large.
    #[error("a chunk of {0} bytes, at most {STATE_CHUNK_MAX_BYTES} are allowed")]
    ChunkTooLarge(usize),
    /// The chunk's checksum does not match.
    #[error("the checksum of the chunk at {0:#x} does not hold")]
    Damaged(u64),
    /// The total size differs from the announced size.
    #[error("{found} bytes of state announced, {announced} before")]
    TotalChanged {
        /// The first announcement.
        announced: u64,
        /// The new announcement.
        found: u64,
    },
    /// The round has more bytes than the state.
    #[error("{sent} bytes in round {round} of a state of {announced}")]
    OverTotal {
        /// The round.
        round: u32,
        /// Number of its bytes so far.
        sent: u64,
        /// The announced number.
        announced: u64,
    },
}

impl StateError {
    /// Returns the error code of the answer.
    pub const fn code(self) -> ErrorCode {
        match self {
            Self::ChunkTooLarge(_) | Self::OverTotal { .. } => ErrorCode::TooLarge,
            _ => ErrorCode::ValidationFailed,
        }
    }
}

/// The incoming state of one session: rounds from 1, each with at most the announced number of bytes.
#[derive(Debug)]
pub struct IncomingState {
    session: u64,
    provider: StateProvider,
    announced: Option<u64>,
    /// The current round, or the next one.
    round: u32,
    sent: u64,
}

impl IncomingState {
    /// Starts before the first frame of `session`; `provider` carries the state.
    pub const fn new(session: u64, provider: StateProvider) -> Self {
        Self {
            session,
            provider,
            announced: None,
            round: 1,
            sent: 0,
        }
    }

    /// Handles the next frame. A round may carry one chunk more than the state holds, because it ends with the chunk
    /// that reaches its number of bytes.
    ///
    /// # Errors
    /// The first rule that the frame violates; the frame must not be used.
    pub fn take(&mut self, transfer: &MorphTransfer) -> Result<(), StateError> {
        let fixed = &transfer.fixed;
        let (op, session) = (fixed.op, fixed.session);
        let state = matches!(op, TransferOp::Chunk | TransferOp::EndOfRound);
        if !state || session != self.session || fixed.mode != TransferMode::Rounds {
            return Err(StateError::NotState { op, session });
        }
        if fixed.provider != self.provider {
            let (expected, found) = (self.provider, fixed.provider);
            return Err(StateError::OtherProvider { expected, found });
        }
        if fixed.round != self.round {
            let (expected, found) = (self.round, fixed.round);
            return Err(StateError::OtherRound { expected, found });
        }
        if transfer.data.len() > STATE_CHUNK_MAX_BYTES {
            return Err(StateError::ChunkTooLarge(transfer.data.len()));
        }
        if op == TransferOp::Chunk && !transfer.chunk_holds() {
            return Err(StateError::Damaged(fixed.offset));
        }
        let announced = *self.announced.get_or_insert(fixed.total_bytes);
        if announced != fixed.total_bytes {
            let found = fixed.total_bytes;
            return Err(StateError::TotalChanged { announced, found });
        }
        self.sent = self.sent.saturating_add(transfer.data.len() as u64);
        let most = announced.saturating_add(STATE_CHUNK_MAX_BYTES as u64);
        if self.sent > most {
            return Err(StateError::OverTotal {
                round: self.round,
                sent: self.sent,
                announced,
            });
        }
        if op == TransferOp::EndOfRound {
            (self.round, self.sent) = (self.round.saturating_add(1), 0);
        }
        Ok(())
    }
}
