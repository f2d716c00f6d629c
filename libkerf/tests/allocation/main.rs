//! What is chosen is free and as much as was asked for; a reason why not is true.

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
