//! Chosen resources are free and as many as requested; the reason of a refusal is true.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod change;
mod choice;
mod exchange;
mod ground;
mod reshape;
mod split;
