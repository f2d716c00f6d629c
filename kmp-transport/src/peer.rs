//! The daemon's end of one instance: a heartbeat channel and a control channel.
//!
//! ```text
//!  Peer::send ──▶ queue (bounded) ──▶ ┌───────────┐ ◀──▶ link ◀──▶ instance
//!                                     │ one task  │
//!  sink(PeerEvent) ◀───────────────── └───────────┘   connect ▸ HELLO ▸ pump ▸ back-off ▸ …
//! ```
//!
//! Each channel has its own task, so a heartbeat never queues behind other messages. A lost channel is reconnected,
//! with exponential back-off and jitter, until the [`Peer`] is dropped.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kmp_proto::codec::Frame;
use kmp_proto::message::{Channel, Hello, Message, PeerRole};
use kmp_proto::wire::ErrorCode;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::connection::{Connection, ConnectionError, FrameWriter, greet};
pub use crate::link::Connecting;
use crate::link::{Address, ConnectError, KMP_PORT, Network, connect};
use crate::speaker::Speaker;

/// Messages that may wait to be written on one channel.
pub const QUEUE_MAX: usize = 32;
/// First wait before a lost channel is connected again.
pub const RECONNECT_FIRST: Duration = Duration::from_millis(5);
/// Longest such wait.
pub const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// Probes that may wait for their answer on one heartbeat channel. A further one is held back: an
/// instance that has so many to answer has nothing to learn from another, and the detector counts it as
/// unanswered.
pub const PROBES_MAX: usize = 8;
/// Longest time for one message to be written.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Events on a peer's channels.
#[derive(Debug)]
pub enum PeerEvent {
    /// A channel is up, and this is who answered.
    Up(Channel, Box<Hello>),
    /// A channel is down.
    Down(Channel, String),
    /// Connecting was refused by a live kernel.
    KernelRefused(Channel),
    /// Connecting failed otherwise, which says nothing about the kernel; how.
    Unreachable(Channel, String),
    /// Someone answered, but not as the peer must: no HELLO, a bad frame, another generation.
    Rejected(Channel, String),
    /// A message was put on the wire with this sequence; `token` is the sender's own.
    Sent {
        /// The channel.
        channel: Channel,
        /// The sender's token.
        token: u64,
        /// The frame's sequence.
        sequence: u32,
    },
    /// A message cannot be put into a frame: the sender's own mistake. The channel stays.
    Unsendable {
        /// The channel.
        channel: Channel,
        /// The sender's token.
        token: u64,
        /// The reason.
        reason: String,
    },
    /// A frame came in.
    Frame(Channel, Box<Frame>),
}

/// Takes events. Called from the channel's task: it must not block.
pub type Sink = Arc<dyn Fn(PeerEvent) + Send + Sync>;

/// Makes a link to the instance; asked for each connection of each channel.
pub type Connector = Arc<dyn Fn() -> Connecting + Send + Sync>;

/// The queue is full or the channel is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {} channel cannot accept a message now", .0.as_str())]
pub struct SendRefused(pub Channel);

/// One instance. Dropping it closes its channels.
pub struct Peer {
    heartbeat: ChannelHandle,
    control: ChannelHandle,
}

struct ChannelHandle {
    queue: mpsc::Sender<(u64, Message)>,
    task: AbortHandle,
}

impl Drop for ChannelHandle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peer {
    /// Begins to connect to the instance at `address`. The HELLO of `speaker` says who is meant; its channel
    /// is set for each connection. `jitter_seed` spreads the reconnections of many peers.
    pub fn start(
        address: Address,
        speaker: impl Into<Speaker>,
        jitter_seed: u64,
        sink: Sink,
    ) -> Self {
        let connector: Connector = Arc::new(move || {
            let address = address.clone();
            Box::pin(async move { connect(&address, KMP_PORT).await })
        });
        Self::over(connector, speaker, jitter_seed, sink)
    }

    /// As [`Peer::start`], over `network`.
    pub fn through(
        network: Arc<dyn Network>,
        address: Address,
        speaker: impl Into<Speaker>,
        jitter_seed: u64,
        sink: Sink,
    ) -> Self {
        let connector: Connector = Arc::new(move || network.connect(address.clone(), KMP_PORT));
        Self::over(connector, speaker, jitter_seed, sink)
    }

    /// As [`Peer::start`], over the links that `connector` makes.
    pub fn over(
        connector: Connector,
        speaker: impl Into<Speaker>,
        jitter_seed: u64,
        sink: Sink,
    ) -> Self {
        let speaker = speaker.into();
        let start = |channel| {
            let mut speaker = speaker.clone();
            speaker.hello_mut().fixed.channel = channel;
            let (queue, receiver) = mpsc::channel(QUEUE_MAX);
            let runner = Runner {
                connector: Arc::clone(&connector),
                speaker,
                sink: Arc::clone(&sink),
                queue: receiver,
                random: jitter_seed | 1,
            };
            ChannelHandle {
                queue,
                task: tokio::spawn(runner.run()).abort_handle(),
            }
        };
        Self {
            heartbeat: start(Channel::Heartbeat),
            control: start(Channel::Control),
        }
    }

    /// Queues a message. Never waits.
    ///
    /// # Errors
    /// If the channel's queue is full.
    pub fn send(&self, channel: Channel, token: u64, message: Message) -> Result<(), SendRefused> {
        let handle = match channel {
            Channel::Heartbeat => &self.heartbeat,
            Channel::Control => &self.control,
            Channel::Bulk => return Err(SendRefused(channel)),
        };
        handle
            .queue
            .try_send((token, message))
            .map_err(|_| SendRefused(channel))
    }
}

/// Opens a bulk channel for `session`, over `network`.
///
/// # Errors
/// If it cannot be connected or the instance refuses it.
pub async fn open_bulk(
    network: &dyn Network,
    address: &Address,
    speaker: impl Into<Speaker>,
    session: u64,
) -> Result<Connection, BulkError> {
    let mut speaker = speaker.into();
    let fixed = &mut speaker.hello_mut().fixed;
    (fixed.channel, fixed.session) = (Channel::Bulk, session);
    let link = network.connect(address.clone(), KMP_PORT).await?;
    Ok(greet(link, speaker).await?)
}

/// The next frame on a daemon's bulk channel: an answer, or a request that is expected now. Any other request is
/// refused, as on every channel, and the next frame waited for.
///
/// # Errors
/// The end of the connection. A peer that broke the framing was told.
pub async fn next_on_bulk(
    connection: &mut Connection,
    expected: impl Fn(&Message) -> bool,
) -> Result<Frame, ConnectionError> {
    let Connection { reader, writer, .. } = connection;
    loop {
        let frame = reader.next_or_tell(writer).await?;
        writer.check_answer(&frame, PeerRole::Instance, Channel::Bulk)?;
        if frame.message.is_answer() || expected(&frame.message) {
            return Ok(frame);
        }
        refuse_unexpected(writer, &frame).await;
    }
}

/// Refuses a request that an instance does not send on the channel that it came in on, or not now.
async fn refuse_unexpected(writer: &mut FrameWriter, frame: &Frame) {
    let kind = frame.header.msg_type;
    let text = format!("unexpected {kind} from an instance on this channel");
    let code = ErrorCode::UnexpectedInState;
    writer.refuse(code, frame, text).await;
}

/// Why a bulk channel could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BulkError {
    /// Connecting.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The HELLO exchange.
    #[error(transparent)]
    Hello(#[from] ConnectionError),
}

struct Runner {
    connector: Connector,
    speaker: Speaker,
    sink: Sink,
    queue: mpsc::Receiver<(u64, Message)>,
    random: u64,
}

impl Runner {
    async fn run(mut self) {
        let channel = self.speaker.hello().fixed.channel;
        let mut wait = RECONNECT_FIRST;
        loop {
            match self.open().await {
                Ok(connection) => {
                    let begun = tokio::time::Instant::now();
                    // Messages queued for the last connection do not belong to this one.
                    while self.queue.try_recv().is_ok() {}
                    (self.sink)(PeerEvent::Up(channel, Box::new(connection.hello.clone())));
                    let end = self.pump(connection).await;
                    (self.sink)(PeerEvent::Down(channel, end.to_string()));
                    // Keep the back-off for a peer that repeatedly says HELLO and disconnects.
                    if begun.elapsed() >= RECONNECT_MAX {
                        wait = RECONNECT_FIRST;
                    }
                }
                Err(BulkError::Connect(ConnectError::KernelRefused { .. })) => {
                    (self.sink)(PeerEvent::KernelRefused(channel));
                }
                Err(BulkError::Hello(error)) => {
                    (self.sink)(PeerEvent::Rejected(channel, error.to_string()));
                }
                Err(BulkError::Connect(error)) => {
                    (self.sink)(PeerEvent::Unreachable(channel, error.to_string()));
                }
            }
            tokio::time::sleep(self.jittered(wait)).await;
            wait = (wait * 2).min(RECONNECT_MAX);
        }
    }

    async fn open(&self) -> Result<Connection, BulkError> {
        let link = (self.connector)().await?;
        Ok(greet(link, &self.speaker).await?)
    }

    async fn pump(&mut self, connection: Connection) -> ConnectionError {
        let mut open = Open {
            channel: self.speaker.hello().fixed.channel,
            connection,
            probes: VecDeque::with_capacity(PROBES_MAX),
        };
        loop {
            let done = tokio::select! {
                // In this order, so that a run of a test is the same each time. The peer's frames wait for what the owner
                // sends, and not the other way round: a flood of them holds nothing up.
                biased;
                next = self.queue.recv() => {
                    let Some((token, message)) = next else { return ConnectionError::Closed };
                    open.send(token, &message, &self.sink).await
                }
                frame = open.connection.reader.next() => match frame {
                    Ok(frame) => open.take(frame, &self.sink).await,
                    Err(ConnectionError::Frame(error)) => {
                        let told = open.connection.writer.refuse_stream(error);
                        // It is closed in any case.
                        let _ = tokio::time::timeout(WRITE_TIMEOUT, told).await;
                        return error.into();
                    }
                    Err(error) => return error,
                },
            };
            if let Err(error) = done {
                return error;
            }
        }
    }

    /// Between half of `wait` and all of it.
    fn jittered(&mut self, wait: Duration) -> Duration {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let part = u32::try_from(self.random % 512).unwrap_or(0);
        wait / 2 + wait * part / 1024
    }
}

/// A channel that is up.
struct Open {
    channel: Channel,
    connection: Connection,
    /// Sequence and number of each probe that is not answered, oldest first.
    probes: VecDeque<(u32, u32)>,
}

impl Open {
    async fn send(
        &mut self,
        token: u64,
        message: &Message,
        sink: &Sink,
    ) -> Result<(), ConnectionError> {
        let channel = self.channel;
        let probe = match message {
            Message::HeartbeatReq(_) if self.probes.len() == PROBES_MAX => return Ok(()),
            Message::HeartbeatReq(request) => Some(request.probe),
            _ => None,
        };
        match in_time(self.connection.writer.send(message)).await {
            Ok(sequence) => {
                self.probes.extend(probe.map(|probe| (sequence, probe)));
                sink(PeerEvent::Sent {
                    channel,
                    token,
                    sequence,
                });
            }
            // Nothing of it was written: the channel is none the worse for it.
            Err(ConnectionError::Encode(error)) => {
                let reason = error.to_string();
                sink(PeerEvent::Unsendable {
                    channel,
                    token,
                    reason,
                });
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Holds a frame to the rules of its channel and passes it on.
    async fn take(&mut self, frame: Frame, sink: &Sink) -> Result<(), ConnectionError> {
        let channel = self.channel;
        self.check_answer(&frame)?;
        if !frame.message.may_travel(PeerRole::Instance, channel) {
            let told = async {
                refuse_unexpected(&mut self.connection.writer, &frame).await;
                Ok(())
            };
            return in_time(told).await;
        }
        let refused = match &frame.message {
            Message::Error(error) if error.code.ends(channel) => Some(ConnectionError::Refused {
                code: error.code,
                text: error.text.clone(),
            }),
            _ => None,
        };
        sink(PeerEvent::Frame(channel, Box::new(frame)));
        refused.map_or(Ok(()), Err)
    }

    /// An answer is to something that was sent, and the answer to a probe to one that waits for it.
    fn check_answer(&mut self, frame: &Frame) -> Result<(), ConnectionError> {
        let writer = &self.connection.writer;
        writer.check_answer(frame, PeerRole::Instance, self.channel)?;
        if !frame.message.is_answer() {
            return Ok(());
        }
        let (msg_type, sequence) = (frame.header.msg_type, frame.header.sequence);
        let probe = self.probes.iter().position(|(sent, _)| *sent == sequence);
        if let Message::HeartbeatRsp(answer) = &frame.message
            && probe.is_none_or(|at| self.probes[at].1 != answer.fixed.probe)
        {
            return Err(ConnectionError::AnswersNothing { msg_type, sequence });
        }
        if let Some(at) = probe {
            self.probes.remove(at);
        }
        Ok(())
    }
}

async fn in_time<T>(
    write: impl Future<Output = Result<T, ConnectionError>>,
) -> Result<T, ConnectionError> {
    match tokio::time::timeout(WRITE_TIMEOUT, write).await {
        Ok(done) => done,
        Err(_) => {
            let text = format!("not writable for {WRITE_TIMEOUT:?}");
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, text).into())
        }
    }
}
