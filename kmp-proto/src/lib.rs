//! The Kernel Morphing Protocol (KMP): its wire format and its protocol engines.
//!
//! This crate does no I/O, reads no clock, starts no thread and contains no `unsafe`: the same code runs in the
//! daemon, an agent, a property test, a fuzzer and a simulation on virtual time. `docs/kmp.md` describes the protocol
//! for implementers in any language.
//!
//! * [`wire`] and [`message`] define the bytes; [`codec`] defines the stream of frames.
//! * [`detector`], [`recovery`] and [`morph`] are the engines: `handle(event, now)`, `poll_action()`,
//!   `poll_timeout()`.
//! * [`auth`] authenticates the ends of a connection.
//! * [`fence`] holds the proof that a generation has ended.

#![forbid(unsafe_code)]

pub mod auth;
pub mod checksum;
pub mod codec;
pub mod detector;
pub mod fence;
pub mod instance;
pub mod message;
pub mod morph;
pub mod recovery;
pub mod time;
pub mod transition;
pub mod wire;
