//! A framed link: HELLO first, then frames in both directions.

use std::io;
use std::time::Duration;

use kmp_proto::codec::{Decoder, EncodeError, Frame, FrameError, encode};
use kmp_proto::message::{Channel, ErrorInfo, Hello, Message, PeerRole};
use kmp_proto::wire::{ErrorCode, VERSION};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use crate::boottime_ns;
use crate::link::BoxedLink;

/// Longest time for the other side's HELLO.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes read at once on a heartbeat or control channel: small, there are many of them.
const READ_SMALL_BYTES: usize = 512;
/// Bytes read at once on a bulk channel.
const READ_BULK_BYTES: usize = 256 * 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The other side hung up.
    #[error("the peer closed the connection")]
    Closed,
    /// The link failed.
    #[error("the link failed: {0}")]
    Link(#[from] io::Error),
    /// The peer broke the framing; it was told, and the connection closed.
    #[error("the peer sent a bad frame: {0}")]
    Frame(#[from] FrameError),
    /// Our own message did not fit.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// No HELLO in time.
    #[error("no HELLO within {HELLO_TIMEOUT:?}")]
    HelloTimeout,
    /// The first frame was another.
    #[error("the first frame was {0}, not HELLO")]
    NotHello(&'static str),
    /// The peer is not the one that was meant.
    #[error("the peer is {found}, expected was {expected}")]
    WrongPeer {
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
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
}

/// Writes frames, each with one write.
pub struct FrameWriter {
    half: WriteHalf<BoxedLink>,
    buffer: Vec<u8>,
    next_sequence: u32,
}

/// A link whose HELLO exchange is done.
pub struct Connection {
    /// Frames from the peer.
    pub reader: FrameReader,
    /// Frames to the peer.
    pub writer: FrameWriter,
    /// What the peer said of itself.
    pub hello: Hello,
}

impl FrameReader {
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
                return Ok(frame);
            }
            self.end = self.half.read(&mut self.buffer).await?;
            self.start = 0;
            if self.end == 0 {
                return Err(ConnectionError::Closed);
            }
        }
    }
}

impl FrameWriter {
    /// Sends a message of our own; the sequence it was given.
    ///
    /// # Errors
    /// When the link fails or the message is too large.
    pub async fn send(&mut self, message: &Message) -> Result<u32, ConnectionError> {
        let sequence = self.next_sequence;
        self.next_sequence = self.next_sequence.wrapping_add(1);
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

    async fn write(&mut self, message: &Message, sequence: u32) -> Result<(), ConnectionError> {
        self.buffer.clear();
        encode(message, sequence, boottime_ns(), &mut self.buffer)?;
        self.half.write_all(&self.buffer).await?;
        if self.buffer.capacity() > READ_BULK_BYTES * 8 {
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
        let bit = if header.reply {
            kmp_proto::wire::REPLY_BIT
        } else {
            0
        };
        let error = ErrorInfo {
            code,
            offending_type: header.msg_type as u16 | bit,
            offending_sequence: header.sequence,
            text,
        };
        let _ = self.write(&Message::Error(error), header.sequence).await;
    }

    /// The same for a stream that broke before a frame could be read.
    pub async fn refuse_stream(&mut self, error: FrameError) {
        let text = error.to_string();
        let info = ErrorInfo {
            code: error.code(),
            offending_type: 0,
            offending_sequence: 0,
            text,
        };
        let _ = self.write(&Message::Error(info), 0).await;
    }
}

fn framed(link: BoxedLink, channel: Channel) -> (FrameReader, FrameWriter) {
    let (read, write) = tokio::io::split(link);
    let size = if channel == Channel::Bulk {
        READ_BULK_BYTES
    } else {
        READ_SMALL_BYTES
    };
    let buffer = vec![0; size].into_boxed_slice();
    let reader = FrameReader {
        half: read,
        decoder: Decoder::new(),
        buffer,
        start: 0,
        end: 0,
    };
    let writer = FrameWriter {
        half: write,
        buffer: Vec::new(),
        next_sequence: 1,
    };
    (reader, writer)
}

/// The daemon's side of HELLO: says who it wants, and checks who answers.
///
/// # Errors
/// When the peer does not answer in time, refuses, or is another instance or generation.
pub async fn greet(link: BoxedLink, hello: Hello) -> Result<Connection, ConnectionError> {
    let (mut reader, mut writer) = framed(link, hello.fixed.channel);
    let expected = format!("{} generation {}", hello.instance, hello.fixed.generation);
    let exchange = async {
        writer.send(&Message::Hello(hello.clone())).await?;
        reader.next().await
    };
    let frame = tokio::time::timeout(HELLO_TIMEOUT, exchange)
        .await
        .map_err(|_| ConnectionError::HelloTimeout)??;
    let answer = match frame.message {
        Message::HelloReply(answer) => answer,
        Message::Error(ErrorInfo { code, text, .. }) => {
            return Err(ConnectionError::Refused { code, text });
        }
        other => return Err(ConnectionError::NotHello(other.msg_type().name())),
    };
    let same = answer.instance == hello.instance
        && answer.fixed.generation == hello.fixed.generation
        && answer.fixed.role == PeerRole::Instance;
    if !same {
        let found = format!("{} generation {}", answer.instance, answer.fixed.generation);
        return Err(ConnectionError::WrongPeer { expected, found });
    }
    Ok(Connection {
        reader,
        writer,
        hello: answer,
    })
}

/// The instance's side of HELLO: checks that it is meant, and says who it is. Under a deadline.
///
/// # Errors
/// When the peer sends no HELLO in time, another frame, or means another instance or generation. It
/// was told why.
pub async fn welcome(link: BoxedLink, identity: &Hello) -> Result<Connection, ConnectionError> {
    // The channel is not known yet; the reader is replaced for bulk below.
    let (mut reader, mut writer) = framed(link, Channel::Control);
    let first = match tokio::time::timeout(HELLO_TIMEOUT, reader.next()).await {
        Err(_) => return Err(ConnectionError::HelloTimeout),
        Ok(Err(ConnectionError::Frame(error))) => {
            writer.refuse_stream(error).await;
            return Err(error.into());
        }
        Ok(other) => other?,
    };
    let Message::Hello(hello) = &first.message else {
        let text = "the first frame must be HELLO".to_owned();
        writer
            .refuse(ErrorCode::UnexpectedInState, &first, text)
            .await;
        return Err(ConnectionError::NotHello(first.message.msg_type().name()));
    };
    if let Some((code, text)) = objection(hello, identity) {
        writer.refuse(code, &first, text.clone()).await;
        return Err(ConnectionError::Refused { code, text });
    }
    let mut answer = identity.clone();
    answer.fixed.channel = hello.fixed.channel;
    answer.fixed.session = hello.fixed.session;
    let reply = Message::HelloReply(answer);
    let sent = tokio::time::timeout(HELLO_TIMEOUT, writer.reply(&reply, first.header.sequence));
    sent.await.map_err(|_| ConnectionError::HelloTimeout)??;
    if hello.fixed.channel == Channel::Bulk {
        let mut larger = vec![0; READ_BULK_BYTES].into_boxed_slice();
        let rest = reader.start..reader.end;
        larger[..rest.len()].copy_from_slice(&reader.buffer[rest.clone()]);
        (reader.start, reader.end) = (0, rest.len());
        reader.buffer = larger;
    }
    let hello = hello.clone();
    Ok(Connection {
        reader,
        writer,
        hello,
    })
}

fn objection(hello: &Hello, identity: &Hello) -> Option<(ErrorCode, String)> {
    let (theirs, ours) = (&hello.fixed, &identity.fixed);
    if theirs.version_min > VERSION || theirs.version_max < VERSION {
        let text = format!("this side speaks version {VERSION}");
        return Some((ErrorCode::UnsupportedVersion, text));
    }
    if theirs.role != PeerRole::Daemon {
        let text = "only a daemon connects to an instance".to_owned();
        return Some((ErrorCode::UnexpectedInState, text));
    }
    if hello.instance != identity.instance {
        let text = format!("this is instance {}", identity.instance);
        return Some((ErrorCode::UnexpectedInState, text));
    }
    if theirs.generation != ours.generation {
        let text = format!("this is generation {}", ours.generation);
        return Some((ErrorCode::StaleGeneration, text));
    }
    None
}
