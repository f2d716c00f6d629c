//! The layout of the shared memory, version 1.
//!
//! ```text
//! 0        header
//! 4096     an entry of 256 bytes for each peer
//! rings    a ring for each (from, to), page-aligned:
//!            0    head, want, ack, begun   written by the sender
//!            128  tail, freed, wake        written by the receiver
//!            256  descriptors              u64 for each slot, written by the sender
//!            …    slots                    256 bytes each, packets of up to 255 bytes
//!            …    bytes                    longer packets
//! ```

/// The bytes `KERFVSK1`, at the start of the header.
pub const MAGIC: u64 = u64::from_le_bytes(*b"KERFVSK1");
/// Version of the layout.
pub const VERSION: u32 = 1;
/// Maximum number of peers in a region.
pub const PEERS_MAX: u32 = 64;
/// Minimum number of slots of a ring.
pub const SLOTS_MIN: u32 = 32;
/// Maximum number of slots of a ring.
pub const SLOTS_MAX: u32 = 1024;
/// Number of slots reserved for control packets.
pub const SLOTS_RESERVED: u32 = 8;
/// Minimum size of a byte ring, bytes.
pub const BYTES_MIN: u32 = 64 * 1024;
/// Maximum size of a byte ring, bytes.
pub const BYTES_MAX: u32 = 16 * 1024 * 1024;
/// Alignment of packets in the byte ring, bytes.
pub const BYTES_ALIGN: u32 = 64;
/// Maximum length of an inline packet, bytes.
pub const INLINE_MAX: u32 = 255;
/// Maximum length of a packet, bytes.
pub const PACKET_MAX: u32 = 32 * 1024 - 512;
/// Distance between inline slots, bytes.
pub const SLOT_SIZE: u32 = 256;

/// Offsets in the header.
pub mod header {
    /// u64 [`MAGIC`](super::MAGIC).
    pub const MAGIC: u64 = 0;
    /// u32 [`VERSION`](super::VERSION).
    pub const VERSION: u64 = 8;
    /// u32: number of peers.
    pub const PEERS: u64 = 12;
    /// u32: number of slots of each ring.
    pub const SLOTS: u64 = 16;
    /// u32: size of each byte ring, bytes.
    pub const BYTES: u64 = 20;
    /// u64: size of the region, bytes.
    pub const SIZE: u64 = 24;
}

/// The peers' entries.
pub mod peer {
    /// Offset of the first entry.
    pub const OFFSET: u64 = 4096;
    /// Distance between entries, bytes.
    pub const STRIDE: u64 = 256;
    /// u64: state in the low half, generation in the high half.
    pub const WORD: u64 = 0;
    /// u32: number of interrupts with which the peer can be rung.
    pub const VECTORS: u64 = 8;
    /// u32: length of the reason.
    pub const REASON_LEN: u64 = 12;
    /// Text: the reason of its panic.
    pub const REASON: u64 = 16;
    /// Maximum length of the reason, bytes.
    pub const REASON_MAX: u32 = 112;
}

/// Offsets in a ring.
pub mod ring {
    /// u32: number of published slots, modulo 2^32.
    pub const HEAD: u64 = 0;
    /// u32: ticket of the sender that waits for space; 0 if it does not wait.
    pub const WANT: u64 = 4;
    /// u64: the receiver's name for which the sender has reset itself; 0 for none.
    pub const ACK: u64 = 8;
    /// u64: the sender's own name, with the round in the low half and the generation in the high half.
    pub const BEGUN: u64 = 16;
    /// u32: number of taken slots.
    pub const TAIL: u64 = 128;
    /// u32: number of freed bytes.
    pub const FREED: u64 = 132;
    /// u32: ticket of the receiver that sleeps; 0 if it is awake.
    pub const WAKE: u64 = 136;
    /// One u64 for each slot.
    pub const DESCRIPTORS: u64 = 256;
}

/// The kinds of a descriptor.
pub mod kind {
    /// The packet is in the slot.
    pub const INLINE: u64 = 1;
    /// The packet is in the byte ring.
    pub const BULK: u64 = 2;
}

const PAGE: u64 = 4096;

/// The checked dimensions of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    peers: u32,
    slots: u32,
    bytes: u32,
}

impl Geometry {
    /// Dimensions for `peers` peers (1 to [`PEERS_MAX`]), and rings of `slots` slots and `bytes` bytes
    /// (powers of two, within their bounds); `None` if a value is out of range.
    pub fn new(peers: u32, slots: u32, bytes: u32) -> Option<Self> {
        let valid = (1..=PEERS_MAX).contains(&peers)
            && slots.is_power_of_two()
            && (SLOTS_MIN..=SLOTS_MAX).contains(&slots)
            && bytes.is_power_of_two()
            && (BYTES_MIN..=BYTES_MAX).contains(&bytes);
        valid.then_some(Self {
            peers,
            slots,
            bytes,
        })
    }

    /// Returns the number of peers for which the region has space; they are numbered from 0.
    pub fn peers(self) -> u32 {
        self.peers
    }

    /// Returns the number of slots of each ring.
    pub fn slots(self) -> u32 {
        self.slots
    }

    /// Returns the size of each byte ring, bytes.
    pub fn bytes(self) -> u32 {
        self.bytes
    }

    /// Returns the size of the whole region, bytes.
    pub fn region_size(self) -> u64 {
        let peers = u64::from(self.peers);
        self.rings() + peers * peers * self.stride()
    }

    /// Returns the offset of the entry of `peer`.
    ///
    /// # Panics
    /// When the peer does not exist: the number is the caller's own, never read from shared memory.
    pub(crate) fn entry(self, peer: u32) -> u64 {
        assert!(peer < self.peers, "no peer {peer}");
        peer::OFFSET + u64::from(peer) * peer::STRIDE
    }

    /// Returns the offset of the ring from `from` to `to`.
    ///
    /// # Panics
    /// As [`Self::entry`].
    pub(crate) fn ring(self, from: u32, to: u32) -> u64 {
        assert!(from < self.peers && to < self.peers, "no ring {from} {to}");
        let index = u64::from(from) * u64::from(self.peers) + u64::from(to);
        self.rings() + index * self.stride()
    }

    /// Returns the offset of an inline slot in a ring; every `index` gives a slot.
    pub(crate) fn slot(self, index: u32) -> u64 {
        let first = ring::DESCRIPTORS + u64::from(self.slots) * 8;
        first + u64::from(index & (self.slots - 1)) * u64::from(SLOT_SIZE)
    }

    /// Returns the offset of a descriptor in a ring; every `index` gives a descriptor.
    pub(crate) fn descriptor(self, index: u32) -> u64 {
        ring::DESCRIPTORS + u64::from(index & (self.slots - 1)) * 8
    }

    /// Returns the offset in a ring of a position of the byte ring, and the distance to the end of the byte ring.
    pub(crate) fn byte(self, position: u32) -> (u64, u32) {
        let at = position & (self.bytes - 1);
        let first = self.slot(0) + u64::from(self.slots) * u64::from(SLOT_SIZE);
        (first + u64::from(at), self.bytes - at)
    }

    fn rings(self) -> u64 {
        (peer::OFFSET + u64::from(self.peers) * peer::STRIDE).next_multiple_of(PAGE)
    }

    fn stride(self) -> u64 {
        let slots = u64::from(self.slots) * (8 + u64::from(SLOT_SIZE));
        (ring::DESCRIPTORS + slots + u64::from(self.bytes)).next_multiple_of(PAGE)
    }
}

/// Returns the size of a packet of `len` bytes in the byte ring.
pub(crate) fn bulk_size(len: u32) -> u32 {
    len.next_multiple_of(BYTES_ALIGN)
}

/// Location of a packet of `len` bytes, as offsets in the region: one part, or two around the end of
/// the byte ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    parts: [(u64, usize); 2],
}

impl Span {
    /// Returns the location in the slot `index`.
    pub(crate) fn inline(geometry: Geometry, ring: u64, index: u32, len: u32) -> Self {
        Self {
            parts: [(ring + geometry.slot(index), len as usize), (0, 0)],
        }
    }

    /// Returns the location in the byte ring from `position` on.
    pub(crate) fn bulk(geometry: Geometry, ring: u64, position: u32, len: u32) -> Self {
        let (at, room) = geometry.byte(position);
        let first = len.min(room);
        let (start, _) = geometry.byte(0);
        Self {
            parts: [
                (ring + at, first as usize),
                (ring + start, (len - first) as usize),
            ],
        }
    }

    pub(crate) fn parts(&self) -> [(u64, usize); 2] {
        self.parts
    }
}
