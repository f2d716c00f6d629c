//! The whole shared memory: its header and its peers.

use core::sync::atomic::Ordering;

use crate::layout::{Geometry, MAGIC, VERSION, header, peer, ring};
use crate::link::Name;
use crate::memory::Memory;

/// Why a region cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The magic number is missing.
    #[error("no region was made there yet")]
    Absent,
    /// The version of the layout is not supported.
    #[error("the region has layout version {0}; this program knows version 1")]
    Version(u32),
    /// The dimensions are out of range, contradict each other or do not fit.
    #[error("the region's header states impossible measures")]
    Measures,
}

/// The state that a peer reports. A dead peer reports nothing: see [`Region::bury`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// The peer was never attached.
    Absent,
    /// The peer resets its words.
    Starting,
    /// The peer is attached.
    Ready,
    /// The peer has detached.
    Left,
    /// The peer's kernel panicked.
    Panicked,
    /// An unknown number.
    Unknown(u32),
}

impl PeerState {
    fn number(self) -> u32 {
        match self {
            Self::Absent => 0,
            Self::Starting => 1,
            Self::Ready => 2,
            Self::Left => 3,
            Self::Panicked => 4,
            Self::Unknown(number) => number,
        }
    }
}

impl From<u32> for PeerState {
    fn from(number: u32) -> Self {
        match number {
            0 => Self::Absent,
            1 => Self::Starting,
            2 => Self::Ready,
            3 => Self::Left,
            4 => Self::Panicked,
            other => Self::Unknown(other),
        }
    }
}

/// A peer's state and generation, read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerWord {
    /// Its state.
    pub state: PeerState,
    /// Its incarnation; 0 before the first one.
    pub generation: u32,
}

impl PeerWord {
    /// Returns its generation, if it is ready.
    pub(crate) fn ready(self) -> Option<u32> {
        (self.state == PeerState::Ready && self.generation != 0).then_some(self.generation)
    }

    fn pack(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.state.number())
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the halves of a word are meant"
    )]
    fn unpack(word: u64) -> Self {
        Self {
            state: PeerState::from(word as u32),
            generation: (word >> 32) as u32,
        }
    }
}

/// Shared memory with checked dimensions.
#[derive(Debug)]
pub struct Region<M> {
    memory: M,
    geometry: Geometry,
}

impl<M: Memory> Region<M> {
    /// Creates a region in zeroed memory.
    ///
    /// # Errors
    /// [`OpenError::Measures`] when the memory is too small.
    pub fn format(memory: M, geometry: Geometry) -> Result<Self, OpenError> {
        if geometry.region_size() > memory.size() {
            return Err(OpenError::Measures);
        }
        let relaxed = Ordering::Relaxed;
        memory.store32(header::VERSION, VERSION, relaxed);
        memory.store32(header::PEERS, geometry.peers(), relaxed);
        memory.store32(header::SLOTS, geometry.slots(), relaxed);
        memory.store32(header::BYTES, geometry.bytes(), relaxed);
        memory.store64(header::SIZE, geometry.region_size(), relaxed);
        memory.store64(header::MAGIC, MAGIC, Ordering::Release);
        Ok(Self { memory, geometry })
    }

    /// Opens a region that another peer has created. Reads its dimensions only once.
    ///
    /// # Errors
    /// The error in the region.
    pub fn open(memory: M) -> Result<Self, OpenError> {
        if memory.size() < peer::OFFSET {
            return Err(OpenError::Measures);
        }
        if memory.load64(header::MAGIC, Ordering::Acquire) != MAGIC {
            return Err(OpenError::Absent);
        }
        let word = |at| memory.load32(at, Ordering::Relaxed);
        let version = word(header::VERSION);
        if version != VERSION {
            return Err(OpenError::Version(version));
        }
        let (peers, slots, bytes) = (
            word(header::PEERS),
            word(header::SLOTS),
            word(header::BYTES),
        );
        let geometry = Geometry::new(peers, slots, bytes).ok_or(OpenError::Measures)?;
        let size = memory.load64(header::SIZE, Ordering::Relaxed);
        if size != geometry.region_size() || size > memory.size() {
            return Err(OpenError::Measures);
        }
        Ok(Self { memory, geometry })
    }

    /// Returns its dimensions.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Returns its memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Returns the word of `peer`.
    ///
    /// # Panics
    /// When the region has no such peer; likewise below.
    pub fn peer(&self, peer: u32) -> PeerWord {
        PeerWord::unpack(self.memory.load64(self.word_at(peer), Ordering::Acquire))
    }

    /// Returns the interrupt of `peer` for doorbells from `me`: the value that follows the peer number in a doorbell.
    pub fn vector(&self, peer: u32, me: u32) -> u32 {
        let at = self.geometry.entry(peer) + peer::VECTORS;
        me % self.memory.load32(at, Ordering::Relaxed).max(1)
    }

    /// Returns the reason why `peer` panicked, as far as it could report it. May contain any bytes.
    pub fn reason(&self, peer: u32) -> Vec<u8> {
        let entry = self.geometry.entry(peer);
        let len = self
            .memory
            .load32(entry + peer::REASON_LEN, Ordering::Relaxed);
        let mut reason = vec![0; len.min(peer::REASON_MAX) as usize];
        self.memory.read(entry + peer::REASON, &mut reason);
        reason
    }

    /// Starts a new incarnation of the peer `me`, whose words this end may write, and returns its
    /// generation. Ring all peers after this.
    pub fn attach(&self, me: u32, vectors: u32) -> u32 {
        let memory = &self.memory;
        let entry = self.geometry.entry(me);
        let old = PeerWord::unpack(memory.load64(entry + peer::WORD, Ordering::Relaxed));
        let generation = old.generation.checked_add(1).unwrap_or(1);
        let word = |state| PeerWord { state, generation }.pack();
        let relaxed = Ordering::Relaxed;
        memory.store64(entry + peer::WORD, word(PeerState::Starting), relaxed);
        // A peer that sees one of the zeros below and then reads the word sees the new incarnation.
        memory.barrier();
        memory.store32(entry + peer::VECTORS, vectors, relaxed);
        memory.store32(entry + peer::REASON_LEN, 0, relaxed);
        for other in 0..self.geometry.peers() {
            let to = self.geometry.ring(me, other);
            let from = self.geometry.ring(other, me);
            memory.store64(to + ring::ACK, 0, relaxed);
            memory.store64(to + ring::BEGUN, Name::first(generation).pack(), relaxed);
            for at in [to + ring::HEAD, to + ring::WANT] {
                memory.store32(at, 0, relaxed);
            }
            for at in [from + ring::TAIL, from + ring::FREED, from + ring::WAKE] {
                memory.store32(at, 0, relaxed);
            }
        }
        let ready = word(PeerState::Ready);
        memory.store64(entry + peer::WORD, ready, Ordering::Release);
        generation
    }

    /// Rewrites the word of the peer `me` with `generation`, its own copy, if another peer has overwritten it.
    /// Call this regularly, and not after [`Self::detach`].
    pub fn restate(&self, me: u32, generation: u32, vectors: u32) {
        let entry = self.geometry.entry(me);
        let relaxed = Ordering::Relaxed;
        if self.memory.load32(entry + peer::VECTORS, relaxed) != vectors {
            self.memory.store32(entry + peer::VECTORS, vectors, relaxed);
        }
        let state = PeerState::Ready;
        let word = PeerWord { state, generation };
        if self.peer(me) != word {
            self.memory
                .store64(entry + peer::WORD, word.pack(), Ordering::Release);
        }
    }

    /// Ends the incarnation of the peer `me`.
    pub fn detach(&self, me: u32) {
        let generation = self.peer(me).generation;
        let state = PeerState::Left;
        let word = PeerWord { state, generation }.pack();
        self.memory
            .store64(self.word_at(me), word, Ordering::Release);
    }

    /// Marks a peer that ended without a report as left; does not change a peer that has reported its
    /// end. Only for the doorbell server, which knows that the peer cannot run any more.
    pub fn bury(&self, peer: u32) {
        let word = self.peer(peer);
        if matches!(word.state, PeerState::Left | PeerState::Panicked) {
            return;
        }
        let state = PeerState::Left;
        let left = PeerWord { state, ..word }.pack();
        self.memory.replace64(self.word_at(peer), word.pack(), left);
    }

    fn word_at(&self, peer: u32) -> u64 {
        self.geometry.entry(peer) + peer::WORD
    }
}
