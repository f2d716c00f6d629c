//! A workload that overloads one CPU: two threads that never block. On a connection to its published port, both threads
//! end, and the process stays idle.

use std::sync::atomic::{AtomicBool, Ordering};

/// The first socket passed by the agent (`LISTEN_FDS`, docs/workloads.md).
const LISTENER: i32 = 3;

static DONE: AtomicBool = AtomicBool::new(false);

fn main() -> nix::Result<()> {
    for _ in 0..2 {
        std::thread::spawn(|| {
            while !DONE.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
    }
    loop {
        nix::sys::socket::accept(LISTENER)?;
        DONE.store(true, Ordering::Relaxed);
    }
}
