//! The tests' emulated kernel, for programs in other languages: mounts its files, which takes root and
//! /dev/fuse, prints where they are, and takes them away when its standard input ends. Beside them is a
//! directory `run` for the lock.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    reason = "of the tests, which use more of it"
)]

#[path = "../tests/emulator/fdt.rs"]
mod fdt;
#[path = "../tests/emulator/files.rs"]
mod files;
#[path = "../tests/emulator/mk/mod.rs"]
mod mk;

fn main() {
    let emulator = files::Emulator::start();
    println!("{}", emulator.root().display());
    // Until whoever started it closes the pipe, or dies.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).expect("the input can be read");
}
