//! The link between two peers: when the rings between them may be used.
//!
//! A peer that begins takes a new generation, makes its own words zero and says ready
//! ([`Region::attach`]). Each end that sees a generation it has not accepted resets its own words of the
//! two rings between them, and then acknowledges that generation. The link is up when each end has
//! acknowledged the other's present generation: then both have reset, and neither has used the rings
//! before. So a peer that vanishes in the middle of a packet and comes back finds clean rings.
//!
//! A peer that writes what it must not is refused until it comes back with another generation.

use core::sync::atomic::Ordering::{Acquire, Release};

use crate::Corrupt;
use crate::consumer::Consumer;
use crate::layout::ring;
use crate::memory::Memory;
use crate::producer::{Class, Producer, PutError};
use crate::region::Region;

/// What a look at the peer shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// No link, as before.
    Down,
    /// A link, as before.
    Up,
    /// A link from now on.
    CameUp,
    /// No link any more: connections over it have ended.
    Lost,
}

/// This end of the link with one peer.
#[derive(Debug)]
pub struct Link {
    me: u32,
    peer: u32,
    generation: u32,
    accepted: Option<Accepted>,
    refused: Option<u32>,
    tell: bool,
}

/// A generation of the peer for which this end was reset.
#[derive(Debug)]
struct Accepted {
    generation: u32,
    up: bool,
    tx: Producer,
    rx: Consumer,
}

impl Link {
    /// The end of the peer `me`, attached with `generation`, towards `peer`.
    pub fn new(me: u32, peer: u32, generation: u32) -> Self {
        Self {
            me,
            peer,
            generation,
            accepted: None,
            refused: None,
            tell: false,
        }
    }

    /// The peer's number.
    pub fn peer(&self) -> u32 {
        self.peer
    }

    /// Whether the rings may be used.
    pub fn is_up(&self) -> bool {
        self.accepted.as_ref().is_some_and(|a| a.up)
    }

    /// Whether the peer is refused for what it wrote.
    pub fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// Whether the peer is to be rung because this end's word for it has changed; asking answers it.
    pub fn must_tell(&mut self) -> bool {
        core::mem::take(&mut self.tell)
    }

    /// Looks at the peer and does what the handshake asks for. To be called on every doorbell, now and
    /// then without one, and before the rings are used.
    pub fn poll<M: Memory>(&mut self, region: &Region<M>) -> LinkEvent {
        let ready = region.peer(self.peer).ready();
        if self.accepted.as_ref().map(|a| a.generation) != ready && self.drop_link(region) {
            return LinkEvent::Lost;
        }
        let Some(generation) = ready.filter(|now| self.refused != Some(*now)) else {
            return LinkEvent::Down;
        };
        if self.accepted.is_none() {
            self.accept(region, generation);
        }
        let from = region.geometry().ring(self.peer, self.me);
        let ack = region.memory().load32(from + ring::ACK, Acquire);
        let Some(accepted) = &mut self.accepted else {
            return LinkEvent::Down;
        };
        match (ack == self.generation, accepted.up) {
            (true, true) => LinkEvent::Up,
            (true, false) => {
                accepted.up = true;
                LinkEvent::CameUp
            }
            (false, false) => LinkEvent::Down,
            // It has taken its acknowledgement back: it will not use these rings again.
            (false, true) => {
                self.refuse(region);
                LinkEvent::Lost
            }
        }
    }

    /// Sends a packet; see [`Producer::put`]. Nothing can be sent while the link is down.
    ///
    /// # Errors
    /// [`PutError::Full`] while the link is down, else as there.
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

    /// Receives a packet; see [`Consumer::take`]. Nothing comes while the link is down.
    ///
    /// # Errors
    /// As there.
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

    /// Both ends of the rings while the link is up.
    pub fn rings(&mut self) -> Option<(&mut Producer, &mut Consumer)> {
        let accepted = self.accepted.as_mut().filter(|a| a.up)?;
        Some((&mut accepted.tx, &mut accepted.rx))
    }

    /// To be called when a ring was found [`Corrupt`]. The link is down from now on. Returns true when the
    /// peer is to blame and is refused, false when it has only begun anew.
    pub fn corrupt<M: Memory>(&mut self, region: &Region<M>) -> bool {
        let Some(accepted) = &self.accepted else {
            return false;
        };
        let same = region.peer(self.peer).ready() == Some(accepted.generation);
        if same {
            self.refuse(region);
        } else {
            self.drop_link(region);
        }
        same
    }

    /// Gives the link up: the peer sees that nothing is sent or taken any more.
    pub fn down<M: Memory>(&mut self, region: &Region<M>) {
        self.drop_link(region);
    }

    fn refuse<M: Memory>(&mut self, region: &Region<M>) {
        self.refused = self.accepted.as_ref().map(|a| a.generation);
        self.drop_link(region);
    }

    fn accept<M: Memory>(&mut self, region: &Region<M>, generation: u32) {
        let (memory, geometry) = (region.memory(), region.geometry());
        self.accepted = Some(Accepted {
            generation,
            up: false,
            tx: Producer::new(memory, geometry, self.me, self.peer),
            rx: Consumer::new(memory, geometry, self.peer, self.me),
        });
        // The peer that sees it sees our zeros.
        self.acknowledge(region, generation);
        self.refused = None;
    }

    /// Says whether the link was up.
    fn drop_link<M: Memory>(&mut self, region: &Region<M>) -> bool {
        let Some(accepted) = self.accepted.take() else {
            return false;
        };
        self.acknowledge(region, 0);
        accepted.up
    }

    fn acknowledge<M: Memory>(&mut self, region: &Region<M>, generation: u32) {
        let to = region.geometry().ring(self.me, self.peer);
        region.memory().store32(to + ring::ACK, generation, Release);
        self.tell = true;
    }
}
