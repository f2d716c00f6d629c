//! The sender of a ring.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::Corrupt;
use crate::layout::{
    Geometry, INLINE_MAX, PACKET_MAX, SLOTS_RESERVED, Span, bulk_size, kind, ring,
};
use crate::memory::Memory;

/// The class of a packet: determines the slots that it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Leaves [`SLOTS_RESERVED`] slots free.
    Data,
    /// May take every slot.
    Control,
}

/// Why a packet was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PutError {
    /// No space at this time: wait and try again.
    #[error("the ring is full")]
    Full,
    /// The receiver wrote an invalid value: give up the link.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The packet is empty, or longer than [`PACKET_MAX`]: an error of the caller.
    #[error("a packet has 1 to {PACKET_MAX} bytes, not {0}")]
    Length(usize),
}

/// The sender. Its positions are private: the peer cannot write them.
#[derive(Debug)]
pub struct Producer {
    geometry: Geometry,
    ring: u64,
    head: u32,
    tail: u32,
    filled: u32,
    freed: u32,
    want: u32,
    rung: u32,
}

impl Producer {
    /// Creates a new sender of the ring `from` → `to`, with its shared words zeroed.
    pub(crate) fn new<M: Memory>(memory: &M, geometry: Geometry, from: u32, to: u32) -> Self {
        let ring = geometry.ring(from, to);
        memory.store32(ring + ring::HEAD, 0, Relaxed);
        memory.store32(ring + ring::WANT, 0, Relaxed);
        Self {
            geometry,
            ring,
            head: 0,
            tail: 0,
            filled: 0,
            freed: 0,
            want: 0,
            rung: 0,
        }
    }

    /// Sends a packet, given in parts. Check [`Self::must_ring`] after the last packet of a batch.
    ///
    /// # Errors
    /// When the packet was not sent; then no part of it was.
    pub fn put<M: Memory>(
        &mut self,
        memory: &M,
        parts: &[&[u8]],
        class: Class,
    ) -> Result<(), PutError> {
        let total = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(total)
            .ok()
            .filter(|len| (1..=PACKET_MAX).contains(len))
            .ok_or(PutError::Length(total))?;
        let span = self.reserve(memory, len, class)?;
        scatter(memory, span, parts);
        self.publish(memory, len);
        Ok(())
    }

    fn reserve<M: Memory>(&mut self, memory: &M, len: u32, class: Class) -> Result<Span, PutError> {
        let keep = match class {
            Class::Data => SLOTS_RESERVED,
            Class::Control => 0,
        };
        let tail = memory.load32(self.ring + ring::TAIL, Acquire);
        advance(&mut self.tail, tail, self.head)?;
        if self.geometry.slots() - self.head.wrapping_sub(self.tail) <= keep {
            return Err(PutError::Full);
        }
        if len <= INLINE_MAX {
            return Ok(Span::inline(self.geometry, self.ring, self.head, len));
        }
        let freed = memory.load32(self.ring + ring::FREED, Acquire);
        advance(&mut self.freed, freed, self.filled)?;
        if self.geometry.bytes() - self.filled.wrapping_sub(self.freed) < bulk_size(len) {
            return Err(PutError::Full);
        }
        Ok(Span::bulk(self.geometry, self.ring, self.filled, len))
    }

    fn publish<M: Memory>(&mut self, memory: &M, len: u32) {
        let bulk = len > INLINE_MAX;
        let (kind, position) = if bulk {
            (kind::BULK, self.filled)
        } else {
            (kind::INLINE, self.head)
        };
        let descriptor = u64::from(position) << 32 | kind << 16 | u64::from(len);
        let at = self.ring + self.geometry.descriptor(self.head);
        memory.store64(at, descriptor, Relaxed);
        if bulk {
            self.filled = self.filled.wrapping_add(bulk_size(len));
        }
        self.head = self.head.wrapping_add(1);
        memory.store32(self.ring + ring::HEAD, self.head, Release);
    }

    /// Returns whether the receiver sleeps and has not been rung since.
    pub fn must_ring<M: Memory>(&mut self, memory: &M) -> bool {
        // Pairs with Consumer::sleep: either this end sees its ticket, or it sees this end's head.
        memory.barrier();
        let wake = memory.load32(self.ring + ring::WAKE, Relaxed);
        let ring = wake != 0 && wake != self.rung;
        if ring {
            self.rung = wake;
        }
        ring
    }

    /// Requests a doorbell when there is space. Call [`Self::put`] once more after this, and
    /// [`Self::has_room`] when no packet waits any more.
    pub fn want_room<M: Memory>(&mut self, memory: &M) {
        self.want = self.want.checked_add(1).unwrap_or(1);
        memory.store32(self.ring + ring::WANT, self.want, Relaxed);
        // Pairs with Consumer::must_ring.
        memory.barrier();
    }

    /// Ends [`Self::want_room`].
    pub fn has_room<M: Memory>(&mut self, memory: &M) {
        memory.store32(self.ring + ring::WANT, 0, Relaxed);
    }
}

/// Accepts a position only if it is between the known one and `limit`.
fn advance(known: &mut u32, read: u32, limit: u32) -> Result<(), Corrupt> {
    if read.wrapping_sub(*known) > limit.wrapping_sub(*known) {
        return Err(Corrupt);
    }
    *known = read;
    Ok(())
}

/// Writes the concatenation of `parts`, which must fill `span`.
fn scatter<M: Memory>(memory: &M, span: Span, parts: &[&[u8]]) {
    let mut places = span.parts().into_iter();
    let (mut at, mut room) = places.next().unwrap_or_default();
    for part in parts {
        let mut part = *part;
        while !part.is_empty() {
            if room == 0 {
                (at, room) = places.next().unwrap_or_default();
                if room == 0 {
                    return;
                }
            }
            let (now, later) = part.split_at(part.len().min(room));
            memory.write(at, now);
            at += now.len() as u64;
            room -= now.len();
            part = later;
        }
    }
}
