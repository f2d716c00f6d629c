//! What system tests and benchmarks share: a daemon with everything of its own, driven over its
//! control socket, and a client of its workloads.
//!
//! Panics are how a test fails; this crate is used by nothing else.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod control;
mod host;
pub mod resp;

pub use control::{Control, Reply};
pub use host::{DEADLINE, Host, program};
