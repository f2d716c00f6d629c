//! An emulation of multikernel Linux, for tests and the demo: its files as a file system in user space, and the calls that
//! load, boot and halt. It does what the kernel does with what is written, with the kernel's errors and its
//! traps. It shares no code with libkerf, and takes root and `/dev/fuse`.
//!
//! An instance that boots is the agent's process, with the configuration that was found in the initial file
//! system; its vsock is a Unix socket that takes `CONNECT <port>`. A kernel that is loaded is not run.
//!
//! Panics are how a test fails. The demo asks [`Process::obstacle`] first; kmorph itself never uses this crate.

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

/// A machine that is switched on: its instances can be loaded, booted and halted, until it is dropped.
pub struct Powered(Arc<machine::Machine>);

impl Powered {
    /// Switches on the machine behind these files. `directory` gets its sockets, and `agent` is what instances run.
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
