//! The shared memory of kerf-vsock: rings between peers that do not trust each other.
//!
//! `docs/kerf-vsock.md` describes the layout and its rules; `kmod/ring.c` and `kmod/link.c` are the C
//! implementation, for the kernel. [`layout`] contains the constants, [`memory`] the access to shared
//! memory, [`region`] the whole of it, [`producer`] and [`consumer`] the two ends of a ring, and [`link`]
//! determines when the rings between two peers may be used.
//!
//! This crate does no I/O: it maps nothing, rings no doorbell and never waits. No contents of the shared
//! memory make it panic, loop or access other memory: it reads each shared word once, and computes
//! addresses only from private numbers.

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

/// The peer wrote an invalid value. The caller must give up the link: see [`Link::corrupt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ring holds what no correct peer writes")]
pub struct Corrupt;
