//! A peer, played packet by packet: what no correct peer sends, and peers that take nothing.

use std::time::{Duration, Instant};

use kmorph_kerf_ring::{Class, Link, PutError};
use kmp_transport::kerf::HOST;

use crate::guest::{Guest, Machine};

/// Longest wait for the guest to take or send a packet: software emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const HEADER_BYTES: usize = 44;
/// CID of peer 0.
const CID_BASE: u32 = 2;
/// The port of this side.
const PORT: u32 = 4000;
/// The room that this side says it has for a connection, bytes.
const ROOM: u32 = 256 * 1024;

pub(crate) const STREAM: u16 = 1;
pub(crate) const SEQPACKET: u16 = 2;
pub(crate) const END_OF_MESSAGE: u32 = 1;
/// A flag of [`Op::Shutdown`]: this side sends nothing more.
pub(crate) const NO_MORE: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditRequest = 7,
}

/// A packet that has come.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) op: u16,
    pub(crate) port: u32,
    pub(crate) payload: Vec<u8>,
}

/// What goes into a header besides the CIDs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) kind: u16,
    pub(crate) op: Op,
    pub(crate) flags: u32,
    pub(crate) from: u32,
    pub(crate) to: u32,
    /// The length that the header states is the payload's and this.
    pub(crate) excess: u32,
}

impl Header {
    pub(crate) fn new(kind: u16, op: Op, to: u32) -> Self {
        Self {
            kind,
            op,
            flags: 0,
            from: PORT,
            to,
            excess: 0,
        }
    }
}

/// The link of this process with one guest.
pub(crate) struct Raw<'a> {
    machine: &'a Machine,
    link: Link,
    me: u32,
    guest: u32,
}

impl<'a> Raw<'a> {
    /// Attaches as peer 0 and waits for the link with `guest`.
    pub(crate) fn new(machine: &'a Machine, guest: u32) -> Self {
        Self::as_peer(machine, HOST, guest)
    }

    /// Attaches as the peer `me` and waits for the link with `guest`.
    pub(crate) fn as_peer(machine: &'a Machine, me: u32, guest: u32) -> Self {
        let link = Link::new(me, guest, machine.region().attach(me, 1));
        let mut raw = Self {
            machine,
            link,
            me,
            guest,
        };
        raw.until("the link", |raw| {
            // It waits for its first link only.
            raw.link.poll(machine.region(), Duration::ZERO);
            raw.ring();
            raw.link.is_up().then_some(())
        });
        raw
    }

    fn ring(&self) {
        self.machine.server().ring(self.guest, self.me);
    }

    fn until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(start.elapsed() < PATIENCE, "waiting for {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether there was room for it.
    fn try_send(&mut self, header: &Header, payload: &[u8]) -> bool {
        self.try_send_as(CID_BASE + self.me, CID_BASE + self.guest, header, payload)
    }

    fn try_send_as(&mut self, source: u32, target: u32, header: &Header, payload: &[u8]) -> bool {
        let len = u32::try_from(payload.len()).unwrap() + header.excess;
        let mut bytes = [0; HEADER_BYTES];
        let words = [
            (0, source),
            (8, target),
            (16, header.from),
            (20, header.to),
            (24, len),
            (28, u32::from(header.kind) | (header.op as u32) << 16),
            (32, header.flags),
            (36, ROOM),
        ];
        for (at, word) in words {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        let region = self.machine.region();
        match self.link.put(region, &[&bytes, payload], Class::Control) {
            Ok(()) => {}
            Err(PutError::Full) => return false,
            Err(error) => panic!("{error}"),
        }
        let (tx, _) = self.link.rings().unwrap();
        if tx.must_ring(region.memory()) {
            self.ring();
        }
        true
    }

    pub(crate) fn send(&mut self, header: &Header, payload: &[u8]) {
        self.until("room", |raw| raw.try_send(header, payload).then_some(()));
    }

    /// From another CID than this side's.
    pub(crate) fn send_as(&mut self, source: u32, target: u32, header: &Header, payload: &[u8]) {
        self.until("room", |raw| {
            raw.try_send_as(source, target, header, payload)
                .then_some(())
        });
    }

    /// The next packet.
    pub(crate) fn take(&mut self) -> Packet {
        self.until("a packet", Self::try_take)
    }

    fn try_take(&mut self) -> Option<Packet> {
        let region = self.machine.region();
        let mut bytes = Vec::new();
        self.link.take(region, &mut bytes).unwrap()?;
        let (_, rx) = self.link.rings().unwrap();
        if rx.must_ring(region.memory()) {
            self.ring();
        }
        Some(Packet {
            op: u16::from_le_bytes([bytes[30], bytes[31]]),
            port: u32::from_le_bytes(bytes[16..20].try_into().unwrap()),
            payload: bytes.split_off(HEADER_BYTES),
        })
    }

    /// Connects to a port of the guest.
    pub(crate) fn connect(&mut self, kind: u16, to: u32) {
        self.send(&Header::new(kind, Op::Request, to), b"");
        // A program may still be reading what came over an earlier link, and give credit for it.
        while self.take().op != Op::Response as u16 {}
    }

    /// Accepts the guest's connection from its port `to` to the port `from` of this side.
    pub(crate) fn answer(&mut self, from: u32, to: u32) {
        let mut header = Header::new(STREAM, Op::Response, to);
        header.from = from;
        self.send(&header, b"");
    }

    /// The payload of the next packet that has one.
    pub(crate) fn take_data(&mut self) -> Vec<u8> {
        loop {
            let packet = self.take();
            if !packet.payload.is_empty() {
                return packet.payload;
            }
        }
    }

    /// Sends one after the other, `most` at most, until the guest has said `end`, and takes nothing.
    pub(crate) fn flood(
        &mut self,
        guest: &mut Guest,
        end: &str,
        most: u64,
        mut next: impl FnMut(u64) -> (Header, &'static [u8]),
    ) -> u64 {
        let start = Instant::now();
        let mut done = || {
            if start.elapsed() > PATIENCE {
                guest.wait_for(end);
            }
            guest.has_said(end)
        };
        self.flood_until(&mut done, most, &mut next)
    }

    /// Sends one after the other, `most` at most, until it is `done`, and takes nothing.
    pub(crate) fn flood_until(
        &mut self,
        done: &mut dyn FnMut() -> bool,
        most: u64,
        next: &mut dyn FnMut(u64) -> (Header, &'static [u8]),
    ) -> u64 {
        let mut sent = 0;
        while !done() {
            let (header, payload) = next(sent);
            if sent < most && self.try_send(&header, payload) {
                sent += 1;
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        sent
    }
}
