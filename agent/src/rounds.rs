//! The instance's end of a bulk channel: state that is copied in rounds.
//!
//! ```text
//!  old:  pull(round) ─▶ ReadDirty* ─▶ chunk* ─▶ end_of_round(dirty bytes left)
//!  new:  chunk ─▶ checked ─▶ Apply         end_of_round ─▶ applied
//! ```
//!
//! Invariants: a round ends after as many bytes as were dirty when it began, however fast the
//! workload writes meanwhile; only the last one, with the workload frozen, goes on until nothing is
//! left. A chunk whose checksum does not hold is never applied.

use std::time::Duration;

use kmorph_workload::handover::MAX_CHUNK_BYTES;
use kmorph_workload::handover::message::{Mode, Reply, Request};
use kmp_proto::codec::Frame;
use kmp_proto::message::{
    Channel, IncomingState, Message, MorphTransfer, MorphTransferFixed, STATE_CHUNK_MAX_BYTES,
    Side, StateError, TransferMode, TransferOp, transfer_flags,
};
use kmp_proto::wire::ErrorCode;
use kmp_transport::connection::{Connection, ConnectionError, FrameWriter};

use crate::morph::{Morphs, Refusal, unexpected};
use crate::server::heed;
use crate::workload::{AskError, Workload};

const _: () = assert!(MAX_CHUNK_BYTES == STATE_CHUNK_MAX_BYTES);

/// Longest wait for the workload to take or give one chunk.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(10);
/// Bits of a chunk's offset that lie within its memory section; those above number the section.
const SECTION_SHIFT: u32 = 48;

/// A bulk channel of the morph `session`.
struct Bulk {
    morphs: Morphs,
    workload: Workload,
    session: u64,
    /// Bytes still to be sent when a round begins, as the workload last said.
    dirty_bytes: u64,
    total_bytes: u64,
    import_ready: bool,
    /// New: holds what comes to what was announced.
    state: IncomingState,
}

/// Serves `connection`, which has begun with `first`, until it ends.
///
/// # Errors
/// Why it ended.
pub async fn serve(
    connection: Connection,
    first: Frame,
    morphs: Morphs,
    workload: Workload,
) -> Result<(), ConnectionError> {
    let session = connection.hello.fixed.session;
    let (mut reader, mut writer) = (connection.reader, connection.writer);
    let mut bulk = Bulk {
        morphs,
        workload,
        session,
        dirty_bytes: 0,
        total_bytes: 0,
        import_ready: false,
        state: IncomingState::new(session),
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

/// As [`hole`].
fn hole_in(failure: Failure) -> Failure {
    match failure {
        Failure::Refused(refusal) => Failure::Refused(hole(refusal)),
        other => other,
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

impl From<AskError> for Failure {
    fn from(error: AskError) -> Self {
        Self::Refused(error.into())
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
                self.morphs.expect_side(self.session, Side::Source)?;
                self.send_round(fixed, writer).await
            }
            TransferOp::Chunk => {
                let new = self.morphs.expect_side(self.session, Side::Target);
                new.map_err(hole)?;
                self.state.take(transfer)?;
                self.apply(transfer).await.map_err(hole_in)
            }
            TransferOp::EndOfRound => {
                let new = self.morphs.expect_side(self.session, Side::Target);
                new.map_err(hole)?;
                self.state.take(transfer)?;
                self.import(fixed.total_bytes).await.map_err(hole_in)?;
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

    /// Old: one round.
    async fn send_round(
        &mut self,
        pull: MorphTransferFixed,
        writer: &mut FrameWriter,
    ) -> Result<(), Failure> {
        if pull.round == 1 && self.workload.exists() {
            let mode = Mode::Rounds;
            let export = Request::PrepareExport { mode };
            let reply = self.workload.ask(export, Vec::new(), CHUNK_TIMEOUT).await?;
            let Reply::Prepared {
                total_len,
                dirty_bytes,
            } = reply.message
            else {
                return Err(unexpected(&reply.message).into());
            };
            (self.total_bytes, self.dirty_bytes) = (total_len, dirty_bytes);
        }
        let last = pull.flags & transfer_flags::FINAL != 0;
        let fixed = MorphTransferFixed {
            total_bytes: self.total_bytes,
            ..pull
        };
        let mut left = if last { u64::MAX } else { self.dirty_bytes };
        while left > 0 && self.workload.exists() {
            let Some(sent) = self.send_chunk(fixed, writer).await? else {
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

    /// Sends what the workload gives next; `None` when nothing is left.
    async fn send_chunk(
        &mut self,
        fixed: MorphTransferFixed,
        writer: &mut FrameWriter,
    ) -> Result<Option<u64>, Failure> {
        let max_bytes = u32::try_from(MAX_CHUNK_BYTES).unwrap_or(u32::MAX);
        let read = Request::ReadDirty { max_bytes };
        let incoming = self.workload.ask(read, Vec::new(), CHUNK_TIMEOUT).await?;
        let Reply::Chunk {
            section,
            offset,
            dirty_bytes,
        } = incoming.message
        else {
            return Err(unexpected(&incoming.message).into());
        };
        self.dirty_bytes = dirty_bytes;
        if incoming.data.is_empty() {
            return Ok(None);
        }
        let sent = incoming.data.len() as u64;
        let offset = u64::from(section) << SECTION_SHIFT | offset;
        let chunk = MorphTransfer::chunk(
            MorphTransferFixed {
                offset,
                dirty_bytes,
                ..fixed
            },
            incoming.data,
        );
        writer.send(&Message::MorphTransfer(chunk)).await?;
        self.morphs.renew_lease(self.session);
        Ok(Some(sent))
    }

    /// New: makes room, once.
    async fn import(&mut self, total_len: u64) -> Result<(), Failure> {
        if self.import_ready || !self.workload.exists() {
            return Ok(());
        }
        let mode = Mode::Rounds;
        let import = Request::PrepareImport { mode, total_len };
        let reply = self.workload.ask(import, Vec::new(), CHUNK_TIMEOUT).await?;
        if !matches!(reply.message, Reply::ImportReady { .. }) {
            return Err(unexpected(&reply.message).into());
        }
        self.import_ready = true;
        Ok(())
    }

    async fn apply(&mut self, chunk: &MorphTransfer) -> Result<(), Failure> {
        self.import(chunk.fixed.total_bytes).await?;
        let section = u32::try_from(chunk.fixed.offset >> SECTION_SHIFT).unwrap_or(u32::MAX);
        let offset = chunk.fixed.offset & ((1 << SECTION_SHIFT) - 1);
        let apply = Request::Apply { section, offset };
        let asked = self
            .workload
            .ask_with(apply, chunk.data.clone(), Vec::new(), CHUNK_TIMEOUT);
        let reply = asked.await?;
        if reply.message == Reply::Applied {
            Ok(())
        } else {
            Err(unexpected(&reply.message).into())
        }
    }
}

fn bare(fixed: MorphTransferFixed) -> MorphTransfer {
    MorphTransfer {
        fixed,
        data: Vec::new(),
        references: Vec::new(),
    }
}
