//! The whole of the shared memory: its header and its peers.

use core::sync::atomic::Ordering;

use crate::layout::{Geometry, MAGIC, VERSION, header, peer, ring};
use crate::link::Name;
use crate::memory::Memory;

/// Why a region cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It does not begin with the magic number.
    #[error("no region was made there yet")]
    Absent,
    /// Another version of the layout.
    #[error("the region has layout version {0}; this program knows version 1")]
    Version(u32),
    /// Its measures are out of range, contradict each other or do not fit.
    #[error("the region's header states impossible measures")]
    Measures,
}

/// What a peer says of itself. A dead one says nothing: see [`Region::bury`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// Never there.
    Absent,
    /// Resetting its words.
    Starting,
    /// There.
    Ready,
    /// Gone.
    Left,
    /// Its kernel panicked.
    Panicked,
    /// A number that means nothing.
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

/// A peer's state and generation, read as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerWord {
    /// Its state.
    pub state: PeerState,
    /// Its incarnation; 0 means that there was none.
    pub generation: u32,
}

impl PeerWord {
    /// Its generation when it is there.
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

/// Shared memory with checked measures.
#[derive(Debug)]
pub struct Region<M> {
    memory: M,
    geometry: Geometry,
}

impl<M: Memory> Region<M> {
    /// Makes a region of zeroed memory.
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

    /// Opens a region that another has made. Its measures are read now and never again.
    ///
    /// # Errors
    /// What is wrong with it.
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

    /// Its measures.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Its memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// What `peer` says of itself.
    ///
    /// # Panics
    /// When the region has no such peer; likewise below.
    pub fn peer(&self, peer: u32) -> PeerWord {
        PeerWord::unpack(self.memory.load64(self.word_at(peer), Ordering::Acquire))
    }

    /// The interrupt of `peer` that belongs to `me`: what follows the doorbell's peer number.
    pub fn vector(&self, peer: u32, me: u32) -> u32 {
        let at = self.geometry.entry(peer) + peer::VECTORS;
        me % self.memory.load32(at, Ordering::Relaxed).max(1)
    }

    /// Why `peer` panicked, as far as it could say. Any bytes may be in it.
    pub fn reason(&self, peer: u32) -> Vec<u8> {
        let entry = self.geometry.entry(peer);
        let len = self
            .memory
            .load32(entry + peer::REASON_LEN, Ordering::Relaxed);
        let mut reason = vec![0; len.min(peer::REASON_MAX) as usize];
        self.memory.read(entry + peer::REASON, &mut reason);
        reason
    }

    /// Begins a new incarnation of the peer `me`, whose words are this end's to write, and returns its
    /// generation. Everybody is to be rung afterwards.
    pub fn attach(&self, me: u32, vectors: u32) -> u32 {
        let memory = &self.memory;
        let entry = self.geometry.entry(me);
        let old = PeerWord::unpack(memory.load64(entry + peer::WORD, Ordering::Relaxed));
        let generation = old.generation.checked_add(1).unwrap_or(1);
        let word = |state| PeerWord { state, generation }.pack();
        let relaxed = Ordering::Relaxed;
        memory.store64(entry + peer::WORD, word(PeerState::Starting), relaxed);
        // Who sees one of the zeros below and then looks at the word sees that we have begun anew.
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

    /// States again that the peer `me` is there with `generation`, its own copy, where another peer has written
    /// over it. To be called now and then, and not after [`Self::detach`].
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

    /// Says for a peer that has ended without a word that it is gone; one that has already said why it
    /// ended is left alone. Only for who knows that it cannot run any more: the doorbell server.
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
