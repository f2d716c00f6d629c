//! The actors of kmorphd: shells around the engines of `kmp-proto`.
//!
//! An actor turns messages into engine calls and engine actions into I/O; all decisions belong to the engines. This
//! crate reads no configuration file and opens no log: `kmorphd` does.
//!
//! | actor | owns |
//! |---|---|
//! | [`supervisor::Supervisor`] | the tree of instances, admission of recoveries, restoration |
//! | [`platform::transport::Transport`] | all connections; requests and their replies |
//! | [`watch::Watch`] | the failure detector of one generation |
//! | [`instance::Instance`] | one instance: its state, its policy, its current work |
//! | [`recovery::RecoveryJob`] | one recovery; [`capture`] captures for it |
//! | [`morph::MorphSession`] | one morph |
//! | [`platform::journal::Journal`] | the state database; the only writer |
//! | [`control`] | the API socket |
//!
//! All except the journal and the API socket share one thread: a request between them costs well under a microsecond, a
//! request across threads tens of microseconds. Nothing on this thread blocks.

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
