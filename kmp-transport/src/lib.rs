//! Links that carry KMP frames, and what both ends of them need.
//!
//! * [`link`] connects and listens: AF_VSOCK, the Unix-socket form of vsock, in memory, and a
//!   decorator that injects faults.
//! * [`connection`] frames a link and exchanges HELLO.
//! * [`peer`] is the daemon's end of one instance: a heartbeat and a control channel, each kept up
//!   with back-off. Losing a channel is not losing the instance.
//! * [`kernel`] asks an instance's kernel itself, when its agent is silent.
//! * [`kerf`] makes and serves the memory over which kerf-vsock talks.
//! * [`server`] is the instance's end: it accepts, bounds and identifies connections.
//!
//! This crate moves frames. It knows no state machine, starts no process and no actor. Whatever a
//! peer sends, nothing here panics, grows without bound or waits without a deadline.

pub mod connection;
pub mod kerf;
pub mod kernel;
pub mod link;
pub mod peer;
pub mod server;
pub mod speaker;

/// Nanoseconds since this kernel booted (`CLOCK_BOOTTIME`): the timestamp of every frame.
pub fn boottime_ns() -> u64 {
    let Ok(now) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) else {
        return 0;
    };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec()).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}
