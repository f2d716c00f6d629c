//! An emulation of multikernel Linux for tests and the demo: its files as a user-space file system, and the calls
//! that load, boot and halt. It behaves like the kernel, with the kernel's errors and pitfalls. It shares no code
//! with libkerf, and requires root and `/dev/fuse`.
//!
//! A booted instance is the agent's process, with the configuration found in the initramfs; its vsock is a Unix
//! socket that takes `CONNECT <port>`. The loaded kernel itself does not run.
//!
//! The code panics on errors, because tests fail that way. The demo checks [`Process::obstacle`] first; kmorph itself
//! never uses this crate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a test fails by panicking"
)]

mod client;
mod control;
mod fdt;
mod files;
mod initrd;
mod intercept;
mod machine;
mod mk;
mod spawn;
mod vsock;

use std::path::Path;
use std::sync::Arc;

pub use client::{Process, ask};
pub use files::Emulator;
pub use intercept::intercept;
pub use machine::Generation;
pub use mk::{Instance, Mk, Trap};

/// A machine that is on: its instances can be loaded, booted and halted until drop.
pub struct Powered(Arc<machine::Machine>);

impl Powered {
    /// Switches on the machine behind these files. The sockets are created in `directory`, and instances run `agent`.
    pub fn on(emulator: &Emulator, generation: Generation, agent: &Path, directory: &Path) -> Self {
        let machine = machine::Machine::new(&emulator.mk, generation, agent, directory);
        let machine = Arc::new(machine);
        control::serve(&machine, directory);
        intercept::serve(&machine, directory);
        Self(machine)
    }
}

impl Drop for Powered {
    fn drop(&mut self) {
        self.0.off();
    }
}
