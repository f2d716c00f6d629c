//! The receiver of a ring.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::Corrupt;
use crate::layout::{Geometry, INLINE_MAX, PACKET_MAX, Span, bulk_size, kind, ring};
use crate::memory::Memory;

/// The receiver. Its positions are private: the peer cannot write them.
#[derive(Debug)]
pub struct Consumer {
    geometry: Geometry,
    ring: u64,
    head: u32,
    tail: u32,
    freed: u32,
    wake: u32,
    rung: u32,
}

impl Consumer {
    /// Creates a new receiver of the ring `from` → `to`, awake, with its shared words zeroed.
    pub(crate) fn new<M: Memory>(memory: &M, geometry: Geometry, from: u32, to: u32) -> Self {
        let ring = geometry.ring(from, to);
        for at in [ring::TAIL, ring::FREED, ring::WAKE] {
            memory.store32(ring + at, 0, Relaxed);
        }
        Self {
            geometry,
            ring,
            head: 0,
            tail: 0,
            freed: 0,
            wake: 0,
            rung: 0,
        }
    }

    /// Appends the next packet to `to` and frees its space. Returns its length, or `None` if there is no packet. Check
    /// [`Self::must_ring`] after the last packet of a batch.
    ///
    /// # Errors
    /// When the sender wrote an invalid value; nothing was taken.
    pub fn take<M: Memory>(
        &mut self,
        memory: &M,
        to: &mut Vec<u8>,
    ) -> Result<Option<usize>, Corrupt> {
        let Some((span, len)) = self.peek(memory)? else {
            return Ok(None);
        };
        for (at, len) in span.parts() {
            let start = to.len();
            to.resize(start + len, 0);
            memory.read(at, &mut to[start..]);
        }
        self.release(memory, len);
        Ok(Some(len as usize))
    }

    fn peek<M: Memory>(&mut self, memory: &M) -> Result<Option<(Span, u32)>, Corrupt> {
        let head = memory.load32(self.ring + ring::HEAD, Acquire);
        let ready = head.wrapping_sub(self.tail);
        // The head is at most one full ring ahead, and never moves back.
        if ready > self.geometry.slots() || ready < self.head.wrapping_sub(self.tail) {
            return Err(Corrupt);
        }
        self.head = head;
        if ready == 0 {
            return Ok(None);
        }
        let at = self.ring + self.geometry.descriptor(self.tail);
        let descriptor = memory.load64(at, Relaxed);
        self.locate(descriptor).map(Some)
    }

    /// Returns the location of the next descriptor's packet. All of the descriptor except the length is predictable.
    fn locate(&self, descriptor: u64) -> Result<(Span, u32), Corrupt> {
        let (geometry, ring) = (self.geometry, self.ring);
        let position = descriptor >> 32;
        let len = (descriptor & 0xffff) as u32;
        match descriptor >> 16 & 0xffff {
            kind::INLINE if (1..=INLINE_MAX).contains(&len) && position == self.tail.into() => {
                Ok((Span::inline(geometry, ring, self.tail, len), len))
            }
            kind::BULK
                if (INLINE_MAX + 1..=PACKET_MAX).contains(&len)
                    && position == self.freed.into() =>
            {
                Ok((Span::bulk(geometry, ring, self.freed, len), len))
            }
            _ => Err(Corrupt),
        }
    }

    fn release<M: Memory>(&mut self, memory: &M, len: u32) {
        self.tail = self.tail.wrapping_add(1);
        if len > INLINE_MAX {
            self.freed = self.freed.wrapping_add(bulk_size(len));
            memory.store32(self.ring + ring::FREED, self.freed, Release);
        }
        memory.store32(self.ring + ring::TAIL, self.tail, Release);
    }

    /// Returns whether the sender waits for space and has not been rung since.
    pub fn must_ring<M: Memory>(&mut self, memory: &M) -> bool {
        // Pairs with Producer::want_room.
        memory.barrier();
        let want = memory.load32(self.ring + ring::WANT, Relaxed);
        let ring = want != 0 && want != self.rung;
        if ring {
            self.rung = want;
        }
        ring
    }

    /// Requests a doorbell with the next packet. Call [`Self::take`] once more after this, before waiting.
    pub fn sleep<M: Memory>(&mut self, memory: &M) {
        self.wake = self.wake.checked_add(1).unwrap_or(1);
        memory.store32(self.ring + ring::WAKE, self.wake, Relaxed);
        // Pairs with Producer::must_ring.
        memory.barrier();
    }

    /// Ends [`Self::sleep`].
    pub fn awake<M: Memory>(&mut self, memory: &M) {
        memory.store32(self.ring + ring::WAKE, 0, Relaxed);
    }
}
