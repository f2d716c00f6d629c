//! Links that carry KMP frames, and the code that both ends of them share.
//!
//! * [`link`] connects and listens: AF_VSOCK, the Unix-socket form of vsock, in-memory links, and a decorator that
//!   injects faults.
//! * [`connection`] frames a link and exchanges HELLO.
//! * [`peer`] is the daemon's end of one instance: a heartbeat and a control channel, each reconnected with back-off.
//!   Losing a channel does not mean losing the instance.
//! * [`kernel`] queries an instance's kernel directly when its agent is silent.
//! * [`kerf`] creates and serves the shared memory of kerf-vsock.
//! * [`server`] is the instance's end: it accepts, bounds and identifies connections.
//!
//! This crate only moves frames. It knows no state machine, and starts no process and no actor. Whatever a peer
//! sends, nothing here panics, grows without bound or waits without a deadline.

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
