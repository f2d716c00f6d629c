//! A workload that has more to do than one CPU can: two threads that never wait. Once someone connects to
//! its published port both end, and it goes on without anything to do.

use std::sync::atomic::{AtomicBool, Ordering};

/// The first socket that an agent passes on (`LISTEN_FDS`, docs/workloads.md).
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
