//! The link between two peers: determines when the rings between them may be used.
//!
//! A peer that starts takes a new generation, zeroes its own words and reports ready ([`Region::attach`]). Each
//! end of a link has a name: its peer's generation and a round, which counts the links of this pair that the
//! end has lost. An end that sees a name that it has not accepted resets its own words of the two rings, and
//! then acknowledges that name. The link is up when each end has acknowledged the other's current name: then
//! both have reset. An end that loses a link takes a new name, so no name is used for two links. Therefore
//! neither end has used the rings before, and a peer that vanishes in the middle of a packet and returns finds
//! clean rings.
//!
//! A lost link stays down for a while, longer each time, to limit the cost of a peer that keeps violating the
//! rules, and of a third peer that keeps corrupting the rings. A new generation of the peer ends the wait.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::time::Duration;

use crate::Corrupt;
use crate::consumer::Consumer;
use crate::layout::ring;
use crate::memory::Memory;
use crate::producer::{Class, Producer, PutError};
use crate::region::Region;

/// Wait after the first loss of a link; each further wait is twice as long.
pub const RETRY_MIN: Duration = Duration::from_secs(1);
/// Maximum wait after the loss of a link. After a link that was up for this long, the wait starts at [`RETRY_MIN`]
/// again.
pub const RETRY_MAX: Duration = Duration::from_secs(60);

/// The result of a poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// The link is still down.
    Down,
    /// The link is still up.
    Up,
    /// The link has come up.
    CameUp,
    /// The link is lost: connections over it have ended.
    Lost,
}

/// The name of an end of a link, for one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    generation: u32,
    round: u32,
}

impl Name {
    /// Returns the first name of a generation.
    pub(crate) fn first(generation: u32) -> Self {
        Self {
            generation,
            round: 1,
        }
    }

    fn next(self) -> Self {
        let round = self.round.checked_add(1).unwrap_or(1);
        Self { round, ..self }
    }

    pub(crate) fn pack(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.round)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the halves of a word are meant"
    )]
    fn unpack(word: u64) -> Self {
        Self {
            generation: (word >> 32) as u32,
            round: word as u32,
        }
    }
}

/// This end of the link with one peer.
#[derive(Debug)]
pub struct Link {
    me: u32,
    peer: u32,
    name: Name,
    accepted: Option<Accepted>,
    lost: Option<Lost>,
    /// Wait after the last lost link; zero if there was none.
    retry: Duration,
    waiting: bool,
    tell: bool,
}

/// A name of the peer for which this end was reset.
#[derive(Debug)]
struct Accepted {
    name: Name,
    /// Time at which the link came up.
    up: Option<Duration>,
    tx: Producer,
    rx: Consumer,
}

/// A lost link: no link begins with this generation of the peer before `until`.
#[derive(Debug)]
struct Lost {
    generation: u32,
    until: Duration,
}

impl Link {
    /// Creates the end of the peer `me`, attached with `generation`, of the link to `peer`.
    pub fn new(me: u32, peer: u32, generation: u32) -> Self {
        Self {
            me,
            peer,
            name: Name::first(generation),
            accepted: None,
            lost: None,
            retry: Duration::ZERO,
            waiting: false,
            tell: false,
        }
    }

    /// Returns the peer's number.
    pub fn peer(&self) -> u32 {
        self.peer
    }

    /// Returns whether the rings may be used.
    pub fn is_up(&self) -> bool {
        self.accepted.as_ref().is_some_and(|a| a.up.is_some())
    }

    /// Returns whether the link was lost and, at the last poll, it was too early to start again.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Returns whether to ring the peer because this end has changed its words; returns true only once per change.
    pub fn must_tell(&mut self) -> bool {
        core::mem::take(&mut self.tell)
    }

    /// Checks the peer and performs the steps of the handshake. Call this on every doorbell, regularly
    /// without one, and before each use of the rings. `now` is from a monotonic clock, the same one in every
    /// call.
    pub fn poll<M: Memory>(&mut self, region: &Region<M>, now: Duration) -> LinkEvent {
        self.restate(region);
        let seen = self.peer_name(region);
        if self.accepted.as_ref().map(|a| a.name) != seen && self.give_up(region, now) {
            return LinkEvent::Lost;
        }
        self.waiting = seen.is_some_and(|name| self.must_wait(name, now));
        let Some(name) = seen.filter(|_| !self.waiting) else {
            return LinkEvent::Down;
        };
        if !self.is_up() {
            self.accept(region, name);
        }
        let from = region.geometry().ring(self.peer, self.me);
        let ack = region.memory().load64(from + ring::ACK, Acquire);
        let Some(accepted) = &mut self.accepted else {
            return LinkEvent::Down;
        };
        match (ack == self.name.pack(), accepted.up.is_some()) {
            (true, true) => LinkEvent::Up,
            (true, false) => {
                accepted.up = Some(now);
                LinkEvent::CameUp
            }
            (false, false) => LinkEvent::Down,
            // The peer has withdrawn its acknowledgement: it will not use these rings again.
            (false, true) => {
                self.give_up(region, now);
                LinkEvent::Lost
            }
        }
    }

    /// Sends a packet; see [`Producer::put`]. Sends nothing while the link is down.
    ///
    /// # Errors
    /// [`PutError::Full`] while the link is down, else those of [`Producer::put`].
    pub fn put<M: Memory>(
        &mut self,
        region: &Region<M>,
        parts: &[&[u8]],
        class: Class,
    ) -> Result<(), PutError> {
        match self.rings() {
            Some((tx, _)) => tx.put(region.memory(), parts, class),
            None => Err(PutError::Full),
        }
    }

    /// Receives a packet; see [`Consumer::take`]. Receives nothing while the link is down.
    ///
    /// # Errors
    /// Those of [`Consumer::take`].
    pub fn take<M: Memory>(
        &mut self,
        region: &Region<M>,
        to: &mut Vec<u8>,
    ) -> Result<Option<usize>, Corrupt> {
        match self.rings() {
            Some((_, rx)) => rx.take(region.memory(), to),
            None => Ok(None),
        }
    }

    /// Returns both rings while the link is up.
    pub fn rings(&mut self) -> Option<(&mut Producer, &mut Consumer)> {
        let accepted = self.accepted.as_mut().filter(|a| a.up.is_some())?;
        Some((&mut accepted.tx, &mut accepted.rx))
    }

    /// Takes the link down after a ring was found [`Corrupt`]. Returns true if the peer or a third peer is
    /// to blame, and false if the peer has only started again.
    pub fn corrupt<M: Memory>(&mut self, region: &Region<M>, now: Duration) -> bool {
        let Some(accepted) = &self.accepted else {
            return false;
        };
        let blamed = self.peer_name(region) == Some(accepted.name);
        self.give_up(region, now);
        blamed
    }

    /// Takes the link down: the peer sees that this end no longer sends or receives.
    pub fn down<M: Memory>(&mut self, region: &Region<M>) {
        if self.accepted.take().is_some() {
            self.acknowledge(region, 0);
            self.tell = true;
        }
    }

    /// Returns the peer's current name, if the peer is ready.
    fn peer_name<M: Memory>(&self, region: &Region<M>) -> Option<Name> {
        let generation = region.peer(self.peer).ready()?;
        let from = region.geometry().ring(self.peer, self.me);
        // Pairs with the release in state_name: acknowledgements under an older name are no longer visible.
        let name = Name::unpack(region.memory().load64(from + ring::BEGUN, Acquire));
        (name.generation == generation).then_some(name)
    }

    fn must_wait(&self, name: Name, now: Duration) -> bool {
        let lost = self.lost.as_ref();
        lost.is_some_and(|lost| lost.generation == name.generation && now < lost.until)
    }

    /// Gives up a link that has ended or never came up. Returns whether it was up; then it stays down for a while.
    fn give_up<M: Memory>(&mut self, region: &Region<M>, now: Duration) -> bool {
        let ended = self.accepted.as_ref().map(|a| (a.name, a.up));
        self.down(region);
        let Some((name, Some(since))) = ended else {
            return false;
        };
        // After a link that was up for the maximum wait, start with the minimum wait again.
        self.retry = if now.saturating_sub(since) >= RETRY_MAX {
            RETRY_MIN
        } else {
            (self.retry * 2).clamp(RETRY_MIN, RETRY_MAX)
        };
        self.lost = Some(Lost {
            generation: name.generation,
            until: now + self.retry,
        });
        self.begin_anew(region);
        true
    }

    /// Takes a new name, because the old one has been used for a link.
    fn begin_anew<M: Memory>(&mut self, region: &Region<M>) {
        self.name = self.name.next();
        self.state_name(region);
        // A peer that sees a zero from accept and then reads the name sees the new name.
        region.memory().barrier();
    }

    /// Rewrites this end's words if a third peer has overwritten them: otherwise an end that is up does not write
    /// them, and the other end may wait for them.
    fn restate<M: Memory>(&self, region: &Region<M>) {
        let to = region.geometry().ring(self.me, self.peer);
        let memory = region.memory();
        if memory.load64(to + ring::BEGUN, Relaxed) != self.name.pack() {
            self.state_name(region);
        }
        if let Some(accepted) = self.accepted.as_ref().filter(|a| a.up.is_some()) {
            let name = accepted.name.pack();
            if memory.load64(to + ring::ACK, Relaxed) != name {
                self.acknowledge(region, name);
            }
        }
    }

    fn state_name<M: Memory>(&self, region: &Region<M>) {
        let to = region.geometry().ring(self.me, self.peer);
        // Pairs with the acquire in peer_name.
        region
            .memory()
            .store64(to + ring::BEGUN, self.name.pack(), Release);
    }

    /// Resets this end's words of both rings, and acknowledges the peer's name. Repeated at each poll until the link is
    /// up, because a third peer may have overwritten the words.
    fn accept<M: Memory>(&mut self, region: &Region<M>, name: Name) {
        let (memory, geometry) = (region.memory(), region.geometry());
        let accepted = Accepted {
            name,
            up: None,
            tx: Producer::new(memory, geometry, self.me, self.peer),
            rx: Consumer::new(memory, geometry, self.peer, self.me),
        };
        if self.accepted.replace(accepted).is_none() {
            self.lost = None;
            self.tell = true;
        }
        // A peer that sees the acknowledgement also sees this end's zeros.
        self.acknowledge(region, name.pack());
    }

    fn acknowledge<M: Memory>(&self, region: &Region<M>, name: u64) {
        let to = region.geometry().ring(self.me, self.peer);
        region.memory().store64(to + ring::ACK, name, Release);
    }
}
