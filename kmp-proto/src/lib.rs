//! The Kernel Morphing Protocol (KMP): its wire format and its protocol engines.
//!
//! This crate does no I/O, reads no clock, starts no thread and contains no `unsafe`: the same code
//! runs under the daemon, an agent, a property test, a fuzzer and a simulation on virtual time.
//! The protocol is described, for implementers in any language, in `docs/kmp.md`.
//!
//! * [`wire`] and [`message`] are the bytes, [`codec`] the stream of them.
//! * [`detector`], [`recovery`] and [`morph`] are the engines: `handle(event, now)`,
//!   `poll_action()`, `poll_timeout()`.
//! * [`auth`] proves who speaks.
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
