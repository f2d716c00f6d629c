//! `kmorph-emulated-kernel [<directory> <agent> [silent]]`: mounts the files of an emulated kernel, prints their
//! path, and removes them, with all instances, when its standard input ends. Without arguments, only the files exist,
//! in a directory of their own. With `silent`, a halt by force does not wait for the CPUs.
//!
//! `kmorph-emulated-kernel under <directory> <program> …`: runs a program whose load, boot and halt calls are
//! answered by the emulated kernel in that directory.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use kmorph_emulated_kernel::{Emulator, Generation, Powered, intercept};

fn main() {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    match words.as_slice() {
        [] => {
            let emulator = Emulator::start();
            println!("{}", emulator.root().display());
            wait();
        }
        [under, directory, program, arguments @ ..] if under == "under" => {
            intercept(Path::new(directory));
            let error = Command::new(program).args(arguments).exec();
            eprintln!("kmorph-emulated-kernel: {program:?}: {error}");
            std::process::exit(127);
        }
        [directory, agent, rest @ ..] => {
            let generation = match rest {
                [] => Generation::Confirms,
                _ => Generation::Silent,
            };
            let emulator = Emulator::at(Path::new(directory));
            let powered = Powered::on(
                &emulator,
                generation,
                Path::new(agent),
                Path::new(directory),
            );
            println!("{}", emulator.root().display());
            wait();
            drop(powered);
        }
        _ => eprintln!("usage: kmorph-emulated-kernel [<directory> <agent> [silent]]"),
    }
}

/// Waits until the parent process closes the pipe or dies.
fn wait() {
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
}
