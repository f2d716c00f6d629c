//! A framed link: HELLO first, then frames in both directions.

use std::io;
use std::time::Duration;

use kmp_proto::codec::{Decoder, EncodeError, Frame, FrameError, encode};
use kmp_proto::message::{
    Authenticate, Authenticated, Channel, ErrorInfo, Hello, HelloError, Message, PeerRole,
    StateError,
};
use kmp_proto::wire::{ErrorCode, MsgType, REPLY_BIT};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::Instant;

use crate::boottime_ns;
use crate::link::BoxedLink;
use crate::speaker::Speaker;

/// Longest time for the other side's HELLO.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest time from the first byte of a frame to its last.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes read at once on a heartbeat or control channel: small, there are many of them.
const READ_SMALL_BYTES: usize = 512;
/// Bytes read at once on a bulk channel.
const READ_BULK_BYTES: usize = 256 * 1024;
/// Largest buffer, in bytes, that a heartbeat or control channel keeps between two messages: a topology is large and
/// rare, and there are many channels.
const WRITE_SMALL_KEPT_BYTES: usize = 4 * 1024;
/// The same for a bulk channel: two of its largest frames.
const WRITE_BULK_KEPT_BYTES: usize = 2 * 1024 * 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The other side hung up.
    #[error("the peer closed the connection")]
    Closed,
    /// The link failed.
    #[error("the link failed: {0}")]
    Link(#[from] io::Error),
    /// The peer violated the framing; it was notified, and the connection closed.
    #[error("the peer sent an invalid frame: {0}")]
    Frame(#[from] FrameError),
    /// Our own message did not fit.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// No HELLO in time.
    #[error("no HELLO within {HELLO_TIMEOUT:?}")]
    HelloTimeout,
    /// A frame began and did not end in time.
    #[error("a frame was not complete within {FRAME_TIMEOUT:?} of its first byte")]
    HalfFrame,
    /// The answer to HELLO was another frame.
    #[error("{0} answers HELLO")]
    NotHello(&'static str),
    /// The peer is not the expected one, or does not speak this version; it was notified.
    #[error("HELLO: {0}")]
    Hello(#[from] HelloError),
    /// The peer answered what it was not asked.
    #[error("{msg_type} with the sequence {sequence} does not answer any request")]
    AnswersNothing {
        /// The type.
        msg_type: MsgType,
        /// Its sequence.
        sequence: u32,
    },
    /// The peer answered on a channel that does not carry such an answer.
    #[error("reply on the wrong channel: {msg_type} on the {} channel", .channel.as_str())]
    WrongChannel {
        /// The type.
        msg_type: MsgType,
        /// The channel of the message.
        channel: Channel,
    },
    /// The peer sent other state than it announced.
    #[error("the peer violated the transfer protocol: {0}")]
    State(#[from] StateError),
    /// The peer refused us.
    #[error("the peer refused: {code}: {text}")]
    Refused {
        /// Its code.
        code: ErrorCode,
        /// Its words.
        text: String,
    },
}

/// Reads frames.
pub struct FrameReader {
    half: ReadHalf<BoxedLink>,
    decoder: Decoder,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Deadline of the incomplete frame.
    frame_due: Option<Instant>,
}

/// Writes frames, each with one write.
pub struct FrameWriter {
    half: WriteHalf<BoxedLink>,
    buffer: Vec<u8>,
    /// Largest buffer that is kept, bytes.
    kept: usize,
    next_sequence: u32,
    /// The sequence numbers have wrapped.
    wrapped: bool,
}

/// A link whose HELLO exchange is done.
pub struct Connection {
    /// Frames from the peer.
    pub reader: FrameReader,
    /// Frames to the peer.
    pub writer: FrameWriter,
    /// The peer's HELLO.
    pub hello: Hello,
    /// The features that both sides have, see [`kmp_proto::message::features`]: no other is used.
    pub features: u64,
}

impl FrameReader {
    /// For a bulk channel, once it is known to be one.
    fn enlarge(&mut self) {
        let mut larger = vec![0; READ_BULK_BYTES].into_boxed_slice();
        let rest = self.start..self.end;
        larger[..rest.len()].copy_from_slice(&self.buffer[rest.clone()]);
        (self.start, self.end) = (0, rest.len());
        self.buffer = larger;
    }

    /// The next frame. Cancel-safe: dropped while waiting, nothing is lost.
    ///
    /// # Errors
    /// The end of the connection, for whatever reason.
    pub async fn next(&mut self) -> Result<Frame, ConnectionError> {
        loop {
            let mut input = &self.buffer[self.start..self.end];
            let frame = self.decoder.feed(&mut input);
            self.start = self.end - input.len();
            if let Some(frame) = frame? {
                self.frame_due = None;
                return Ok(frame);
            }
            let read = self.half.read(&mut self.buffer);
            // Counted over calls: whoever sends half a frame gains nothing from what goes on beside it.
            self.end = if self.decoder.buffered() == 0 {
                read.await?
            } else {
                let begun = || Instant::now() + FRAME_TIMEOUT;
                let due = *self.frame_due.get_or_insert_with(begun);
                match tokio::time::timeout_at(due, read).await {
                    Ok(end) => end?,
                    Err(_) => return Err(ConnectionError::HalfFrame),
                }
            };
            self.start = 0;
            if self.end == 0 {
                return Err(ConnectionError::Closed);
            }
        }
    }
}

impl FrameReader {
    /// Like [`FrameReader::next`]; a peer that violates the framing is notified through `writer`. Not cancel-safe.
    ///
    /// # Errors
    /// As [`FrameReader::next`].
    pub async fn next_or_tell(
        &mut self,
        writer: &mut FrameWriter,
    ) -> Result<Frame, ConnectionError> {
        let next = self.next().await;
        if let Err(ConnectionError::Frame(error)) = &next {
            writer.refuse_stream(*error).await;
        }
        next
    }
}

impl FrameWriter {
    /// Sends a message of our own; the sequence it was given.
    ///
    /// # Errors
    /// If the link fails or the message is too large.
    pub async fn send(&mut self, message: &Message) -> Result<u32, ConnectionError> {
        let sequence = self.next_sequence;
        // 0 is nobody's sequence: an ERROR has it that is about no frame.
        self.next_sequence = match sequence.wrapping_add(1) {
            0 => {
                self.wrapped = true;
                1
            }
            next => next,
        };
        self.write(message, sequence).await?;
        Ok(sequence)
    }

    /// Answers the frame that had `sequence`.
    ///
    /// # Errors
    /// As [`FrameWriter::send`].
    pub async fn reply(&mut self, message: &Message, sequence: u32) -> Result<(), ConnectionError> {
        self.write(message, sequence).await
    }

    /// Whether a message of this side's had `sequence`. Numbers wrap: of the two halves of all numbers,
    /// the one before the next is past.
    pub fn has_sent(&self, sequence: u32) -> bool {
        let age = self.next_sequence.wrapping_sub(sequence);
        let wrapped = self.wrapped || sequence < self.next_sequence;
        sequence != 0 && wrapped && (1..=u32::MAX / 2).contains(&age)
    }

    /// Holds an answer of `sender` to the rules of its channel: that the channel carries it, and that a message
    /// of this side's has its sequence. An ERROR that ends the channel may be about a frame that could not be
    /// read. What is no answer passes.
    ///
    /// # Errors
    /// The rule that it breaks; the connection ends with that.
    pub fn check_answer(
        &self,
        frame: &Frame,
        sender: PeerRole,
        channel: Channel,
    ) -> Result<(), ConnectionError> {
        let (msg_type, sequence) = (frame.header.msg_type, frame.header.sequence);
        if !frame.message.is_answer() {
            return Ok(());
        }
        if !frame.message.may_travel(sender, channel) {
            return Err(ConnectionError::WrongChannel { msg_type, channel });
        }
        match &frame.message {
            Message::Error(error) if error.code.ends(channel) => Ok(()),
            _ if self.has_sent(sequence) => Ok(()),
            _ => Err(ConnectionError::AnswersNothing { msg_type, sequence }),
        }
    }

    async fn write(&mut self, message: &Message, sequence: u32) -> Result<(), ConnectionError> {
        self.buffer.clear();
        encode(message, sequence, boottime_ns(), &mut self.buffer)?;
        self.half.write_all(&self.buffer).await?;
        if self.buffer.capacity() > self.kept {
            self.buffer = Vec::new();
        }
        Ok(())
    }

    /// Tells the peer why it is refused; nothing, when it was an answer that is refused. Failures are not
    /// reported: the reader meets them too.
    pub async fn refuse(&mut self, code: ErrorCode, offending: &Frame, text: String) {
        if offending.message.is_answer() {
            return;
        }
        let header = offending.header;
        let bit = if header.reply { REPLY_BIT } else { 0 };
        let offending_type = header.msg_type as u16 | bit;
        self.tell(code, offending_type, header.sequence, text).await;
    }

    /// The same for a stream that broke: the frame is named when its header could be read.
    pub async fn refuse_stream(&mut self, error: FrameError) {
        let info = error.answer();
        let sequence = info.offending_sequence;
        let _ = self.write(&Message::Error(info), sequence).await;
    }

    /// The last word on a connection that is about to be closed; it may be about an answer.
    async fn tell(&mut self, code: ErrorCode, offending_type: u16, sequence: u32, text: String) {
        let error = ErrorInfo {
            code,
            offending_type,
            offending_sequence: sequence,
            text,
        };
        let _ = self.write(&Message::Error(error), sequence).await;
    }
}

fn framed(link: BoxedLink, channel: Channel) -> (FrameReader, FrameWriter) {
    let (read, write) = tokio::io::split(link);
    let (read_bytes, kept) = match channel {
        Channel::Bulk => (READ_BULK_BYTES, WRITE_BULK_KEPT_BYTES),
        _ => (READ_SMALL_BYTES, WRITE_SMALL_KEPT_BYTES),
    };
    let buffer = vec![0; read_bytes].into_boxed_slice();
    let reader = FrameReader {
        half: read,
        decoder: Decoder::new(),
        buffer,
        start: 0,
        end: 0,
        frame_due: None,
    };
    let writer = FrameWriter {
        half: write,
        buffer: Vec::new(),
        kept,
        next_sequence: 1,
        wrapped: false,
    };
    (reader, writer)
}

/// The daemon's side of HELLO: says who it wants, checks who answers, and proves itself where it has a key.
///
/// # Errors
/// If the peer does not answer in time, refuses, is another instance or generation, or does not prove that it
/// has the key. It was told why.
pub async fn greet(
    link: BoxedLink,
    speaker: impl Into<Speaker>,
) -> Result<Connection, ConnectionError> {
    let speaker = speaker.into();
    let (reader, writer) = framed(link, speaker.hello().fixed.channel);
    tokio::time::timeout(HELLO_TIMEOUT, greeted(reader, writer, &speaker))
        .await
        .map_err(|_| ConnectionError::HelloTimeout)?
}

async fn greeted(
    mut reader: FrameReader,
    mut writer: FrameWriter,
    speaker: &Speaker,
) -> Result<Connection, ConnectionError> {
    let hello = speaker.ask()?;
    let asked = writer.send(&Message::Hello(hello.clone())).await?;
    let frame = reader.next_or_tell(&mut writer).await?;
    let sequence = frame.header.sequence;
    let answer = match frame.message {
        Message::Error(ErrorInfo { code, text, .. }) => {
            return Err(ConnectionError::Refused { code, text });
        }
        Message::HelloReply(answer) if sequence == asked => answer,
        Message::HelloReply(_) => {
            let msg_type = MsgType::Hello;
            return Err(ConnectionError::AnswersNothing { msg_type, sequence });
        }
        other => return Err(ConnectionError::NotHello(other.msg_type().name())),
    };
    let proven = |key: &kmp_proto::auth::Key| match (answer.nonce, &answer.proof) {
        (Some(_), Some(proof)) => key.proves(proof, PeerRole::Instance, &hello, &answer),
        _ => false,
    };
    let authentic = speaker.key().is_none_or(proven);
    if let Err(error) = hello.accept_reply(&answer, authentic) {
        let offending_type = MsgType::Hello as u16 | REPLY_BIT;
        let text = error.to_string();
        writer
            .tell(error.code(), offending_type, sequence, text)
            .await;
        return Err(error.into());
    }
    if let Some(key) = speaker.key() {
        let proof = key.proof(PeerRole::Daemon, &hello, &answer);
        prove(&mut reader, &mut writer, proof).await?;
    }
    Ok(Connection {
        features: hello.fixed.features & answer.fixed.features,
        reader,
        writer,
        hello: answer,
    })
}

/// Sends the daemon's proof; `Err` unless the instance takes it.
async fn prove(
    reader: &mut FrameReader,
    writer: &mut FrameWriter,
    proof: [u8; kmp_proto::auth::PROOF_BYTES],
) -> Result<(), ConnectionError> {
    let message = Message::Authenticate(Authenticate { proof });
    let asked = writer.send(&message).await?;
    let frame = reader.next_or_tell(writer).await?;
    match frame.message {
        Message::AuthenticateReply(_) if frame.header.sequence == asked => Ok(()),
        Message::Error(ErrorInfo { code, text, .. }) => {
            Err(ConnectionError::Refused { code, text })
        }
        other => Err(ConnectionError::NotHello(other.msg_type().name())),
    }
}

/// The instance's side of HELLO: checks that it is meant, says who it is, and, where it has a key, that the
/// daemon has it too and is not older than one before it. Under a deadline.
///
/// # Errors
/// If the peer sends no HELLO in time, means another instance or generation, or is not its daemon. It was
/// told why.
pub async fn welcome(
    link: BoxedLink,
    identity: impl Into<Speaker>,
) -> Result<Connection, ConnectionError> {
    let identity = identity.into();
    // The channel is not known yet; the buffer is replaced for bulk below.
    let (reader, writer) = framed(link, Channel::Control);
    tokio::time::timeout(HELLO_TIMEOUT, welcomed(reader, writer, &identity))
        .await
        .map_err(|_| ConnectionError::HelloTimeout)?
}

async fn welcomed(
    mut reader: FrameReader,
    mut writer: FrameWriter,
    identity: &Speaker,
) -> Result<Connection, ConnectionError> {
    let (first, hello) = first(
        &mut reader,
        &mut writer,
        MsgType::Hello,
        |message| match message {
            Message::Hello(hello) => Some(hello.clone()),
            _ => None,
        },
    )
    .await?;
    if let Err(error) = identity.accept(&hello) {
        writer.refuse(error.code(), &first, error.to_string()).await;
        return Err(error.into());
    }
    let answer = identity.reply(&hello)?;
    let reply = Message::HelloReply(answer.clone());
    writer.reply(&reply, first.header.sequence).await?;
    if let Some(key) = identity.key() {
        let (frame, proof) = self::first(
            &mut reader,
            &mut writer,
            MsgType::Authenticate,
            |message| match message {
                Message::Authenticate(Authenticate { proof }) => Some(*proof),
                _ => None,
            },
        )
        .await?;
        let seen = match key.proves(&proof, PeerRole::Daemon, &hello, &answer) {
            true => identity.saw(&hello),
            false => Err(HelloError::NotAuthentic),
        };
        match seen {
            Ok(incarnation) => {
                let reply = Message::AuthenticateReply(Authenticated { incarnation });
                writer.reply(&reply, frame.header.sequence).await?;
            }
            Err(error) => {
                writer.refuse(error.code(), &frame, error.to_string()).await;
                return Err(error.into());
            }
        }
    }
    if hello.fixed.channel == Channel::Bulk {
        reader.enlarge();
        writer.kept = WRITE_BULK_KEPT_BYTES;
    }
    Ok(Connection {
        features: hello.fixed.features & answer.fixed.features,
        reader,
        writer,
        hello,
    })
}

/// The first frame that `wanted` takes; whatever comes before it is refused, and ends nothing.
async fn first<T>(
    reader: &mut FrameReader,
    writer: &mut FrameWriter,
    name: MsgType,
    wanted: impl Fn(&Message) -> Option<T>,
) -> Result<(Frame, T), ConnectionError> {
    loop {
        let frame = reader.next_or_tell(writer).await?;
        if let Some(found) = wanted(&frame.message) {
            return Ok((frame, found));
        }
        let text = format!("send {name} first");
        writer
            .refuse(ErrorCode::UnexpectedInState, &frame, text)
            .await;
    }
}

#[cfg(test)]
mod tests;
