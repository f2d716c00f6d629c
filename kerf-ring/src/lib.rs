//! The shared memory of kerf-vsock: rings between peers that do not trust each other.
//!
//! `docs/kerf-vsock.md` is the layout and its rules; `kmod/ring.c` and `kmod/link.c` are the same in C,
//! for the kernel. [`layout`] has the numbers, [`memory`] is how shared memory is touched, [`region`] the
//! whole of it, [`producer`] and [`consumer`] the two ends of a ring, and [`link`] says when the rings
//! between two peers may be used.
//!
//! This crate does no I/O: it maps nothing, rings no doorbell and never waits. Whatever stands in the
//! shared memory, nothing here panics, loops or reaches beyond it: each shared word is read once, and an
//! address is made only of numbers that this end keeps to itself.

pub mod consumer;
pub mod layout;
pub mod link;
pub mod memory;
pub mod producer;
pub mod region;

pub use consumer::Consumer;
pub use layout::Geometry;
pub use link::{Link, LinkEvent, RETRY_MAX, RETRY_MIN};
pub use memory::{Mapped, Memory};
pub use producer::{Class, Producer, PutError};
pub use region::{OpenError, PeerState, PeerWord, Region};

/// The peer wrote what it must not. The link that it happened on is to be given up: see
/// [`Link::corrupt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ring holds what no correct peer writes")]
pub struct Corrupt;
