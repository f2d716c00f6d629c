//! The actors of kmorphd: shells around the engines of `kmp-proto`.
//!
//! An actor turns messages into engine calls and engine actions into I/O; it decides nothing that an
//! engine decides. This crate reads no configuration file and opens no log: `kmorphd` does.
//!
//! | actor | owns |
//! |---|---|
//! | [`supervisor::Supervisor`] | the tree: instances, admission of recoveries, restoration |
//! | [`platform::transport::Transport`] | every connection; requests and their replies |
//! | [`watch::Watch`] | the failure detector of one generation |
//! | [`instance::Instance`] | one instance: its state, its policy, what is under way |
//! | [`recovery::RecoveryJob`] | one recovery; [`capture`] captures for it |
//! | [`morph::MorphSession`] | one morph |
//! | [`platform::journal::Journal`] | the state database; the only writer |
//! | [`control`] | the API socket |
//!
//! All but the journal and the API socket share one thread: a request between them costs well under
//! a microsecond, one across threads tens of them. Nothing that blocks runs on it.

#![forbid(unsafe_code)]

pub mod capture;
pub mod control;
pub mod generation;
pub mod instance;
pub mod model;
pub mod morph;
pub mod platform;
pub mod recovery;
pub mod resources;
pub mod services;
pub mod supervisor;
pub mod watch;
