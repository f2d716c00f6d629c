//! The init of a guest in which kerf-vsock is tested. It loads modules, runs what its arguments name and says
//! on the console how each went:
//!
//! ```text
//! KERF ok <what>
//! KERF failed <what>: <why>
//! KERF done
//! ```
//!
//! What follows `--` on the kernel's command line are the commands, see [`commands`].

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod cases;
mod commands;
mod fault;
mod machine;
mod services;
mod suite;
mod vsock;
mod zerocopy;

fn main() {
    machine::prepare();
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("?").to_owned();
        println!(
            "KERF panic in {name}: {}",
            info.to_string().replace('\n', " ")
        );
    }));
    for command in std::env::args().skip(1) {
        commands::run(&command);
    }
    println!("KERF done");
    machine::power_off();
}
