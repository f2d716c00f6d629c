//! The instance's end of a bulk channel on which it sends memory of a fenced kernel: VMCORE_*.
//!
//! ```text
//!  channel ── VMCORE_START ──▶ [order] ─▶ ┌────────────────────┐
//!                                         │ a thread of its own │ ◀── the memory that was lent
//!  channel ◀── VMCORE_DATA ── [2 chunks] ◀ └────────────────────┘
//! ```
//!
//! The reader thread runs at low priority ([`READER_NICE`]), because it works for other instances. Invariants: it
//! reads only lent memory, and only within the requested range. Once the daemon has the answer to VMCORE_COMPLETE, it
//! can take the memory back: nothing uses the memory any more.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use kmp_proto::codec::Frame;
use kmp_proto::message::{
    CHUNK_MAX_BYTES, CaptureStatus, Channel, MemoryRange, MemoryWindow, Message, VmcoreComplete,
    VmcoreData, VmcoreStart,
};
use kmp_proto::wire::ErrorCode;
use kmp_transport::connection::{Connection, ConnectionError, FrameWriter};
use tokio::sync::mpsc;

use crate::lent::{Lent, LentError};
use crate::priority::Scheduling;
use crate::refusal::Refusal;
use crate::server::heed;

/// How much the thread that reads stands back behind everything else: a nice value.
const READER_NICE: i32 = 19;
/// Chunks that are read before they can be written.
const CHUNKS_AHEAD: usize = 2;
/// Bytes of a page: chunks are of whole pages.
const PAGE_BYTES: u32 = 4096;

/// Serves a channel that has begun with `first`, until it ends. `sysfs` is where the kernel shows its devices. The thread
/// that reads uses the CPUs of `started_with`.
///
/// # Errors
/// Why it ended.
pub async fn serve(
    connection: Connection,
    first: Frame,
    sysfs: PathBuf,
    started_with: Scheduling,
) -> Result<(), ConnectionError> {
    let capture = connection.hello.fixed.session;
    let (mut reader, mut writer) = (connection.reader, connection.writer);
    let mut thread = Reader::start(sysfs, started_with)?;
    // Sequences of what was asked and not answered, in their order.
    let mut asked = VecDeque::new();
    let mut frame = first;
    loop {
        heed(&frame, &writer, Channel::Bulk)?;
        match &frame.message {
            Message::VmcoreStart(start) => {
                let order = Order::parse(start, capture);
                let done = match order {
                    Ok(order) => thread.carry_out(order, &frame, &mut writer).await?,
                    Err(refusal) => Err(refusal),
                };
                match done {
                    Ok(sequence) => asked.push_back(sequence),
                    Err(Refusal { code, text }) => {
                        writer.refuse(code, &frame, text.clone()).await;
                        if code.ends(Channel::Bulk) {
                            return Err(ConnectionError::Refused { code, text });
                        }
                    }
                }
            }
            Message::VmcoreComplete(complete) => {
                thread.end().await;
                let reply = Message::VmcoreCompleteReply(*complete);
                return writer.reply(&reply, frame.header.sequence).await;
            }
            Message::VmcoreCompleteReply(reply) => {
                let (msg_type, sequence) = (frame.header.msg_type, frame.header.sequence);
                if asked.pop_front() != Some(sequence) || reply.capture != capture {
                    return Err(ConnectionError::AnswersNothing { msg_type, sequence });
                }
            }
            message if message.is_answer() => {}
            other => {
                let code = ErrorCode::UnexpectedInState;
                let text = format!("{} on the channel of a capture", other.msg_type());
                writer.refuse(code, &frame, text).await;
            }
        }
        frame = reader.next_or_tell(&mut writer).await?;
    }
}

/// The memory to read.
struct Order {
    capture: u64,
    pci_port: String,
    pieces: Vec<Piece>,
    chunk_bytes: usize,
}

/// A range of the fenced kernel's memory, and where it is in what was lent.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    range: MemoryRange,
    offset: u64,
}

impl Order {
    fn parse(start: &VmcoreStart, capture: u64) -> Result<Self, Refusal> {
        let refuse = |code, text: &str| Err(Refusal::new(code, text));
        let fixed = start.fixed;
        if fixed.capture != capture {
            let text = format!("this channel is of capture {capture}");
            return refuse(ErrorCode::UnexpectedInState, &text);
        }
        let chunk_bytes = fixed.chunk_bytes;
        if !chunk_bytes.is_multiple_of(PAGE_BYTES) || !(1..=CHUNK_MAX_BYTES).contains(&chunk_bytes)
        {
            let text = format!("invalid chunk length: {chunk_bytes}");
            return refuse(ErrorCode::Malformed, &text);
        }
        let Some(pci_port) = start.pci_port.clone() else {
            let text = "the request does not name the place of the lent memory";
            return refuse(ErrorCode::RefusedByPolicy, text);
        };
        let mut pieces = Vec::with_capacity(start.ranges.len());
        for range in &start.ranges {
            let Some(piece) = piece(*range, &start.windows) else {
                let text = format!("{:#x} was not lent", range.start);
                return refuse(ErrorCode::RefusedByPolicy, &text);
            };
            pieces.push(piece);
        }
        Ok(Self {
            capture,
            pci_port,
            pieces,
            // At most CHUNK_MAX_BYTES.
            chunk_bytes: usize::try_from(chunk_bytes).unwrap_or(0),
        })
    }

    fn bytes(&self) -> u64 {
        let bytes = self.pieces.iter().map(|piece| piece.range.length);
        bytes.fold(0, u64::saturating_add)
    }
}

/// Where a range is in what was lent; `None` when it is not within one of the windows.
fn piece(range: MemoryRange, windows: &[MemoryWindow]) -> Option<Piece> {
    let end = range.start.checked_add(range.length)?;
    let window = windows.iter().find(|window| {
        let window_end = window.start.checked_add(window.length);
        range.start >= window.start && window_end.is_some_and(|window_end| end <= window_end)
    })?;
    let offset = window.offset.checked_add(range.start - window.start)?;
    offset.checked_add(range.length)?;
    Some(Piece { range, offset })
}

/// A message of the thread.
enum Told {
    /// It has the memory.
    Begun,
    Chunk(VmcoreData),
    Done(VmcoreComplete),
    Failed(LentError),
}

/// The thread that reads.
struct Reader {
    orders: Option<mpsc::Sender<Order>>,
    told: mpsc::Receiver<Told>,
}

impl Reader {
    fn start(sysfs: PathBuf, started_with: Scheduling) -> std::io::Result<Self> {
        let (orders, mut to_do) = mpsc::channel::<Order>(1);
        let (tell, told) = mpsc::channel(CHUNKS_AHEAD);
        let work = move || {
            // Of this thread alone: the kernel keeps both for each.
            let _ = started_with.restore_cpus();
            let _ = kmorph_launch::niceness::set_own(READER_NICE);
            let mut lent = None;
            while let Some(order) = to_do.blocking_recv() {
                if read(&order, &mut lent, &sysfs, &tell).is_none() {
                    break;
                }
            }
            // Before `tell`, whose end says that nothing is used any more.
            drop(lent);
            drop(tell);
        };
        let name = "vmcore".to_owned();
        std::thread::Builder::new().name(name).spawn(work)?;
        let orders = Some(orders);
        Ok(Self { orders, told })
    }

    /// Has an order carried out, and sends what is read. The sequence of the VMCORE_COMPLETE that ends it.
    async fn carry_out(
        &mut self,
        order: Order,
        frame: &Frame,
        writer: &mut FrameWriter,
    ) -> Result<Result<u32, Refusal>, ConnectionError> {
        let gone = || Refusal::new(ErrorCode::Internal, "the reader thread has exited");
        let begun = VmcoreComplete {
            capture: order.capture,
            bytes: order.bytes(),
            status: CaptureStatus::Complete,
        };
        let ordered = match &self.orders {
            Some(orders) => orders.send(order).await.is_ok(),
            None => false,
        };
        if !ordered {
            return Ok(Err(gone()));
        }
        while let Some(told) = self.told.recv().await {
            match told {
                Told::Begun => {
                    let reply = Message::VmcoreStartReply(begun);
                    writer.reply(&reply, frame.header.sequence).await?;
                }
                Told::Chunk(data) => {
                    writer.send(&Message::VmcoreData(data)).await?;
                }
                Told::Done(complete) => {
                    let sequence = writer.send(&Message::VmcoreComplete(complete)).await?;
                    return Ok(Ok(sequence));
                }
                Told::Failed(error) => {
                    let code = ErrorCode::RefusedByPolicy;
                    return Ok(Err(Refusal::new(code, error.to_string())));
                }
            }
        }
        Ok(Err(gone()))
    }

    /// Ends it, and waits until it uses nothing any more.
    async fn end(&mut self) {
        self.orders = None;
        while self.told.recv().await.is_some() {}
    }
}

/// Carries an order out; `None` when there is nobody left to tell, or nothing to read.
fn read(
    order: &Order,
    lent: &mut Option<(String, Lent)>,
    sysfs: &Path,
    tell: &mpsc::Sender<Told>,
) -> Option<()> {
    if lent
        .as_ref()
        .is_none_or(|(port, _)| *port != order.pci_port)
    {
        *lent = None;
        match Lent::below_port(sysfs, &order.pci_port) {
            Ok(found) => *lent = Some((order.pci_port.clone(), found)),
            Err(error) => {
                let _ = tell.blocking_send(Told::Failed(error));
                return None;
            }
        }
    }
    let (_, memory) = lent.as_ref()?;
    tell.blocking_send(Told::Begun).ok()?;
    let mut done = VmcoreComplete {
        capture: order.capture,
        bytes: 0,
        status: CaptureStatus::Complete,
    };
    let mut buffer = vec![0; order.chunk_bytes];
    for Piece { range, offset } in &order.pieces {
        let mut at = 0;
        while at < range.length {
            let left = usize::try_from(range.length - at).unwrap_or(usize::MAX);
            let chunk = &mut buffer[..left.min(order.chunk_bytes)];
            match memory.read(offset + at, chunk) {
                Ok(()) => {
                    let data = VmcoreData::chunk(order.capture, range.start + at, chunk);
                    tell.blocking_send(Told::Chunk(data)).ok()?;
                    done.bytes += chunk.len() as u64;
                }
                Err(_) => done.status = CaptureStatus::Incomplete,
            }
            at += chunk.len() as u64;
        }
    }
    tell.blocking_send(Told::Done(done)).ok()
}
