//! The instance's end of a bulk channel that copies state in rounds.
//!
//! ```text
//!  source:  pull(round) ─▶ read* ─▶ chunk* ─▶ end_of_round(dirty bytes left)
//!  target:  chunk ─▶ checked ─▶ apply        end_of_round ─▶ applied
//! ```
//!
//! The session's provider ([`crate::provider`]) decides what is read and where it is applied.
//!
//! Invariants: a round ends after as many bytes as were dirty when it started, however fast the workload writes
//! meanwhile; only the last round, with the workload frozen, continues until nothing is left. A chunk with a wrong
//! checksum is never applied.

use kmp_proto::codec::Frame;
use kmp_proto::message::{
    Channel, IncomingState, Message, MorphTransfer, MorphTransferFixed, STATE_CHUNK_MAX_BYTES,
    Side, StateError, TransferMode, TransferOp, transfer_flags,
};
use kmp_proto::wire::ErrorCode;
use kmp_transport::connection::{Connection, ConnectionError, FrameWriter};

use crate::morph::Morphs;
use crate::provider::{Chosen, Export, Import};
use crate::refusal::Refusal;
use crate::server::heed;

/// A bulk channel of the morph `session`.
struct Bulk {
    morphs: Morphs,
    session: u64,
    /// Source: bytes still to be sent when a round begins, as the provider last said.
    dirty_bytes: u64,
    total_bytes: u64,
    /// Target: what has come.
    incoming: Option<Incoming>,
}

/// State that comes in.
struct Incoming {
    provider: Chosen,
    /// Holds what comes to what was announced.
    state: IncomingState,
    ready: bool,
}

/// Serves `connection`, which has begun with `first`, until it ends.
///
/// # Errors
/// Why it ended.
pub async fn serve(
    connection: Connection,
    first: Frame,
    morphs: Morphs,
) -> Result<(), ConnectionError> {
    let session = connection.hello.fixed.session;
    let (mut reader, mut writer) = (connection.reader, connection.writer);
    let mut bulk = Bulk {
        morphs,
        session,
        dirty_bytes: 0,
        total_bytes: 0,
        incoming: None,
    };
    let mut frame = first;
    loop {
        heed(&frame, &writer, Channel::Bulk)?;
        match bulk.take(&frame, &mut writer).await {
            Ok(()) => {}
            Err(Failure::Refused(Refusal { code, text })) => {
                // State with a hole in it is no state: with the first chunk that is refused the channel ends.
                writer.refuse(code, &frame, text.clone()).await;
                if code.ends(Channel::Bulk) {
                    return Err(ConnectionError::Refused { code, text });
                }
            }
            Err(Failure::Connection(error)) => return Err(error),
        }
        frame = reader.next_or_tell(&mut writer).await?;
    }
}

enum Failure {
    Refused(Refusal),
    Connection(ConnectionError),
}

impl From<ConnectionError> for Failure {
    fn from(error: ConnectionError) -> Self {
        Self::Connection(error)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::Refused(Refusal::new(error.code(), error.to_string()))
    }
}

/// A chunk that is not taken leaves a hole, whatever is against it.
fn hole(refusal: Refusal) -> Refusal {
    match refusal.code {
        ErrorCode::UnexpectedInState => Refusal {
            code: ErrorCode::ValidationFailed,
            ..refusal
        },
        _ => refusal,
    }
}

fn refuse<T>(code: ErrorCode, text: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Refused(Refusal::new(code, text)))
}

impl Bulk {
    async fn take(&mut self, frame: &Frame, writer: &mut FrameWriter) -> Result<(), Failure> {
        let Message::MorphTransfer(transfer) = &frame.message else {
            let text = format!("{} on a bulk channel", frame.message.msg_type());
            return refuse(ErrorCode::UnexpectedInState, text);
        };
        let fixed = transfer.fixed;
        match fixed.op {
            TransferOp::Pull => {
                if fixed.session != self.session || fixed.mode != TransferMode::Rounds {
                    let text = format!("this channel carries rounds of session {}", self.session);
                    return refuse(ErrorCode::UnexpectedInState, text);
                }
                let provider = fixed.provider;
                let chosen = self.morphs.choose(self.session, Side::Source, provider)?;
                self.send_round(&chosen, fixed, writer).await
            }
            TransferOp::Chunk => {
                let incoming = self.incoming(fixed)?;
                incoming.state.take(transfer)?;
                incoming.apply(transfer).await.map_err(hole)?;
                Ok(())
            }
            TransferOp::EndOfRound => {
                let incoming = self.incoming(fixed)?;
                incoming.state.take(transfer)?;
                incoming.make_ready(fixed).await.map_err(hole)?;
                let fixed = MorphTransferFixed {
                    op: TransferOp::Applied,
                    ..fixed
                };
                let applied = Message::MorphTransferReply(bare(fixed));
                Ok(writer.reply(&applied, frame.header.sequence).await?)
            }
            TransferOp::Applied => refuse(ErrorCode::UnexpectedInState, "applied is a reply"),
        }
    }

    /// Target: where the state of this channel goes. Its first frame says what carries it.
    fn incoming(&mut self, fixed: MorphTransferFixed) -> Result<&mut Incoming, Refusal> {
        let (session, provider) = (self.session, fixed.provider);
        self.morphs
            .expect_side(session, Side::Target)
            .map_err(hole)?;
        let incoming = match self.incoming.take() {
            Some(incoming) => incoming,
            None => Incoming {
                provider: self.morphs.choose(session, Side::Target, provider)?,
                state: IncomingState::new(session, provider),
                ready: false,
            },
        };
        Ok(self.incoming.insert(incoming))
    }

    /// Source: one round.
    async fn send_round(
        &mut self,
        provider: &Chosen,
        pull: MorphTransferFixed,
        writer: &mut FrameWriter,
    ) -> Result<(), Failure> {
        if pull.round == 1 {
            let (session, mode) = (self.session, pull.mode);
            let exported = provider.export(Export { session, mode }).await?;
            (self.total_bytes, self.dirty_bytes) = (exported.total_bytes, exported.dirty_bytes);
        }
        let last = pull.flags & transfer_flags::FINAL != 0;
        let fixed = MorphTransferFixed {
            total_bytes: self.total_bytes,
            ..pull
        };
        let mut left = if last { u64::MAX } else { self.dirty_bytes };
        while left > 0 {
            let Some(sent) = self.send_chunk(provider, fixed, writer).await? else {
                break;
            };
            left = left.saturating_sub(sent);
        }
        if last {
            self.morphs.hold(self.session)?;
        }
        let end = MorphTransferFixed {
            op: TransferOp::EndOfRound,
            dirty_bytes: self.dirty_bytes,
            ..fixed
        };
        writer.send(&Message::MorphTransfer(bare(end))).await?;
        Ok(())
    }

    /// Sends what the provider gives next; `None` when nothing is left.
    async fn send_chunk(
        &mut self,
        provider: &Chosen,
        fixed: MorphTransferFixed,
        writer: &mut FrameWriter,
    ) -> Result<Option<u64>, Failure> {
        let piece = provider.read(STATE_CHUNK_MAX_BYTES).await?;
        self.dirty_bytes = piece.dirty_bytes;
        if piece.data.is_empty() {
            return Ok(None);
        }
        let sent = piece.data.len() as u64;
        let fixed = MorphTransferFixed {
            offset: piece.offset,
            dirty_bytes: piece.dirty_bytes,
            ..fixed
        };
        let chunk = MorphTransfer::chunk(fixed, piece.data);
        writer.send(&Message::MorphTransfer(chunk)).await?;
        self.morphs.renew_lease(self.session);
        Ok(Some(sent))
    }
}

impl Incoming {
    /// Makes room, once.
    async fn make_ready(&mut self, fixed: MorphTransferFixed) -> Result<(), Refusal> {
        if self.ready {
            return Ok(());
        }
        let import = Import {
            session: fixed.session,
            mode: fixed.mode,
            total_bytes: fixed.total_bytes,
            references: Vec::new(),
        };
        self.provider.import(import).await?;
        self.ready = true;
        Ok(())
    }

    async fn apply(&mut self, chunk: &MorphTransfer) -> Result<(), Refusal> {
        self.make_ready(chunk.fixed).await?;
        let (offset, data) = (chunk.fixed.offset, chunk.data.clone());
        self.provider.apply(offset, data).await
    }
}

fn bare(fixed: MorphTransferFixed) -> MorphTransfer {
    MorphTransfer {
        fixed,
        data: Vec::new(),
        references: Vec::new(),
    }
}
