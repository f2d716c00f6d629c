//! The state of one vsock connection on this side: what it has received, what it may send, how it ends.
//!
//! This module does no I/O: packets go in, replies come out.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::task::Waker;

use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes that a connection takes before they are read.
pub(super) const BUFFER_BYTES: u32 = 128 * 1024;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Connecting,
    Open,
    /// Nothing is sent or received any more; what was received can still be read.
    Over(Ending),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Both sides had closed.
    Closed,
    /// The other kernel reset it: it is alive, and does not know the connection.
    Reset,
    /// The link to the other kernel was lost.
    Lost,
}

impl Ending {
    pub(super) fn error(self) -> io::Error {
        match self {
            Self::Closed => io::ErrorKind::BrokenPipe.into(),
            Self::Reset => io::ErrorKind::ConnectionReset.into(),
            Self::Lost => io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the link to the peer's kernel was lost",
            ),
        }
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) peer_port: u32,
    pub(super) stage: Stage,
    received: VecDeque<u8>,
    /// Bytes read by the program, counted on and on; and of them, what the peer knows.
    read: u32,
    told: u32,
    /// Bytes sent; the peer's buffer; what it has read of them.
    sent: u32,
    peer_buffer: u32,
    peer_read: u32,
    peer_sends_no_more: bool,
    peer_takes_no_more: bool,
    pub(super) closed_for_writing: bool,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
}

impl Connection {
    pub(super) fn new(peer_port: u32) -> Self {
        Self {
            peer_port,
            stage: Stage::Connecting,
            received: VecDeque::new(),
            read: 0,
            told: 0,
            sent: 0,
            peer_buffer: 0,
            peer_read: 0,
            peer_sends_no_more: false,
            peer_takes_no_more: false,
            closed_for_writing: false,
            reader: None,
            writer: None,
        }
    }

    /// This end's fields of a header; the caller fills in the others.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.read;
        (BUFFER_BYTES, self.read)
    }

    /// Takes a packet of this connection; returns what is to be answered. Never holds more than
    /// [`BUFFER_BYTES`]. The caller wakes reader and writer.
    pub(super) fn receive(&mut self, header: &Header, payload: &[u8]) -> Option<Op> {
        self.peer_buffer = header.buf_alloc;
        self.peer_read = header.fwd_cnt;
        match (self.stage, header.op) {
            (_, Op::Reset) => {
                self.end(if self.peer_sends_no_more {
                    Ending::Closed
                } else {
                    Ending::Reset
                });
                None
            }
            (Stage::Over(_), _) => Some(Op::Reset),
            (Stage::Connecting, Op::Response) => {
                self.stage = Stage::Open;
                None
            }
            (Stage::Open, Op::Data) if self.has_room(payload.len()) => {
                self.received.extend(payload);
                None
            }
            (Stage::Open, Op::CreditUpdate) => None,
            (Stage::Open, Op::CreditRequest) => Some(Op::CreditUpdate),
            (Stage::Open, Op::Shutdown) => self.peer_shuts(header.flags),
            // Out of turn, or more than it was told that there is room for.
            _ => {
                self.end(Ending::Reset);
                Some(Op::Reset)
            }
        }
    }

    /// Bytes that wait to be read.
    pub(super) fn unread(&self) -> usize {
        self.received.len()
    }

    fn has_room(&self, len: usize) -> bool {
        !self.peer_sends_no_more && self.received.len() + len <= BUFFER_BYTES as usize
    }

    fn peer_shuts(&mut self, flags: u32) -> Option<Op> {
        self.peer_takes_no_more |= flags & SHUTDOWN_RECEIVE != 0;
        self.peer_sends_no_more |= flags & SHUTDOWN_SEND != 0;
        if self.peer_takes_no_more && self.peer_sends_no_more {
            self.stage = Stage::Over(Ending::Closed);
            return Some(Op::Reset);
        }
        None
    }

    pub(super) fn end(&mut self, ending: Ending) {
        if !matches!(self.stage, Stage::Over(_)) {
            self.stage = Stage::Over(ending);
        }
        self.wake();
    }

    pub(super) fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()]
            .into_iter()
            .flatten()
        {
            waker.wake();
        }
    }

    /// Bytes that may be sent now; an error when none may be sent any more.
    pub(super) fn credit(&self) -> io::Result<usize> {
        match self.stage {
            Stage::Over(ending) => return Err(ending.error()),
            Stage::Connecting => return Ok(0),
            Stage::Open => {}
        }
        if self.closed_for_writing || self.peer_takes_no_more {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let under_way = self.sent.wrapping_sub(self.peer_read);
        Ok(self.peer_buffer.saturating_sub(under_way) as usize)
    }

    /// `len` bytes are on their way.
    pub(super) fn sent(&mut self, len: usize) {
        self.sent = self
            .sent
            .wrapping_add(u32::try_from(len).unwrap_or(u32::MAX));
    }

    /// Reads what is there into `buffer`; `Ok(None)` when nothing is there yet.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        if !self.received.is_empty() {
            let len = self.received.read(buffer)?;
            self.read = self.read.wrapping_add(u32::try_from(len).unwrap_or(0));
            return Ok(Some(len));
        }
        match self.stage {
            _ if self.peer_sends_no_more => Ok(Some(0)),
            Stage::Over(Ending::Closed) => Ok(Some(0)),
            Stage::Over(ending) => Err(ending.error()),
            _ => Ok(None),
        }
    }

    /// Whether the peer should hear that there is room again.
    pub(super) fn should_update(&self) -> bool {
        self.stage == Stage::Open && self.read.wrapping_sub(self.told) >= BUFFER_BYTES / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(op: Op, len: u32, flags: u32) -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 1,
            dst_port: 2,
            len,
            op,
            flags,
            buf_alloc: 1000,
            fwd_cnt: 0,
        }
    }

    fn open() -> Connection {
        let mut connection = Connection::new(1);
        assert_eq!(connection.receive(&packet(Op::Response, 0, 0), b""), None);
        assert_eq!(connection.stage, Stage::Open);
        connection
    }

    #[test]
    fn credit_is_what_the_peer_has_not_read_yet() {
        let mut connection = Connection::new(1);
        assert_eq!(connection.credit().unwrap(), 0, "connecting");
        connection = open();
        assert_eq!(connection.credit().unwrap(), 1000);
        connection.sent(900);
        assert_eq!(connection.credit().unwrap(), 100);
        let mut update = packet(Op::CreditUpdate, 0, 0);
        update.fwd_cnt = 500;
        assert_eq!(connection.receive(&update, b""), None);
        assert_eq!(connection.credit().unwrap(), 600);
        // Numbers that cannot be true give nothing.
        update.fwd_cnt = 5000;
        connection.receive(&update, b"");
        assert_eq!(connection.credit().unwrap(), 0);
    }

    #[test]
    fn more_than_there_is_room_for_is_a_reset() {
        let mut connection = open();
        let len = BUFFER_BYTES;
        let full = vec![0; len as usize];
        assert_eq!(connection.receive(&packet(Op::Data, len, 0), &full), None);
        let over = connection.receive(&packet(Op::Data, 1, 0), b"x");
        assert_eq!(over, Some(Op::Reset));
        // The received bytes remain readable; the reset follows them.
        let mut buffer = vec![0; len as usize + 1];
        assert_eq!(connection.read(&mut buffer).unwrap(), Some(len as usize));
        let error = connection.read(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn half_closed_it_still_sends() {
        let mut connection = open();
        connection.receive(&packet(Op::Data, 2, 0), b"hi");
        let answer = connection.receive(&packet(Op::Shutdown, 0, SHUTDOWN_SEND), b"");
        assert_eq!(answer, None);
        let mut buffer = [0; 8];
        assert_eq!(connection.read(&mut buffer).unwrap(), Some(2));
        assert_eq!(connection.read(&mut buffer).unwrap(), Some(0));
        assert_eq!(connection.credit().unwrap(), 1000);
        // The other half: now it is over, and said so.
        let answer = connection.receive(&packet(Op::Shutdown, 0, SHUTDOWN_RECEIVE), b"");
        assert_eq!(answer, Some(Op::Reset));
        assert!(connection.credit().is_err());
    }

    #[test]
    fn packets_out_of_turn_end_it() {
        for op in [Op::Data, Op::Shutdown, Op::Request, Op::Unknown(99)] {
            let mut connection = Connection::new(1);
            let answer = connection.receive(&packet(op, 0, 0), b"");
            assert_eq!(answer, Some(Op::Reset), "{op:?}");
        }
        let mut connection = open();
        let again = connection.receive(&packet(Op::Response, 0, 0), b"");
        assert_eq!(again, Some(Op::Reset));
        assert_eq!(connection.receive(&packet(Op::Reset, 0, 0), b""), None);
    }

    #[test]
    fn room_is_told_when_half_was_read() {
        let mut connection = open();
        let half = vec![0; BUFFER_BYTES as usize / 2];
        connection.receive(&packet(Op::Data, BUFFER_BYTES / 2, 0), &half);
        let mut buffer = vec![0; half.len() - 1];
        connection.read(&mut buffer).unwrap();
        assert!(!connection.should_update());
        connection.read(&mut [0]).unwrap();
        assert!(connection.should_update());
        assert_eq!(connection.tell(), (BUFFER_BYTES, BUFFER_BYTES / 2));
        assert!(!connection.should_update());
    }
}
