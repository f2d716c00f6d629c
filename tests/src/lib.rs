//! Shared code of system tests, benchmarks and the demo: a daemon with resources of its own, driven over its control
//! socket, and a client of its workloads.
//!
//! A failure is a panic, which fails the test; no other code uses this crate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod control;
pub mod crashed_guest;
pub mod dumps;
mod events;
mod host;
pub mod initramfs;
pub mod kernels;
pub mod larger_guest;
pub mod resp;

pub use control::{Control, Reply};
pub use events::{Arrived, Events};
pub use host::{DEADLINE, Host, program, published, starts_once};
