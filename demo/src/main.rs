//! `make demo`: a daemon of its own, an instance that is killed, hangs and is morphed, and a client that
//! keeps using the instance. Every command shown runs exactly as shown.
//!
//! ```text
//! story     the steps, with a check of each step's result
//! setting   the differences of the backends: configuration, kernels, ways to harm an instance
//! client    the client of the key-value server
//! shell     runs the commands
//! figures   the measured figures
//! stage     the output
//! ```
//!
//! At the end, everything that the demo started is gone, because all of it belongs to a [`kmorph_tests::Host`].

#![forbid(unsafe_code)]

mod client;
mod figures;
mod setting;
mod shell;
mod stage;
mod story;
mod trouble;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Parser;
use kmorph_tests::Host;
use nix::sys::signal::{SigSet, Signal};

use crate::setting::{Backend, Setting};
use crate::stage::Stage;
use crate::trouble::Trouble;

/// Exit status when this machine lacks a requirement of the story; the same as kmorphctl's.
const NOT_HERE: u8 = 9;
/// Exit status after Ctrl-C; the same as a shell's.
const INTERRUPTED: i32 = 130;

/// Shows kmorph at work: healing and morphing, with a client watching.
#[derive(Debug, Parser)]
#[command(name = "kmorph-demo", version)]
struct Arguments {
    /// What instances are: processes, Linux kernels in QEMU, or kernels beside an emulated one
    #[arg(long, value_enum, default_value = "embedded")]
    backend: Backend,
    /// What carries vsock to kernels in QEMU: virtio-vsock, or kerf-vsock.ko over shared memory
    #[arg(long, value_parser = ["virtio", "kerf"], default_value = "virtio")]
    transport: String,
}

/// Everything that the demo starts, until [`take_down`].
type SharedHost = Arc<Mutex<Option<Host>>>;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    let signals: SigSet = signals.into_iter().collect();
    // Before the start of any thread, so that all threads leave these signals to the thread that waits for them.
    if let Err(error) = signals.thread_block() {
        eprintln!("kmorph-demo: signals cannot be blocked: {error}");
        return ExitCode::FAILURE;
    }
    let backend = arguments.backend;
    let mut stage = Stage::new();
    let host = match backend.host(&arguments.transport) {
        Ok(host) => host,
        Err(trouble) => {
            eprintln!("kmorph-demo: {trouble}");
            return match trouble {
                Trouble::NotHere { .. } => ExitCode::from(NOT_HERE),
                _ => ExitCode::FAILURE,
            };
        }
    };
    let ground = story::Ground::of(&host);
    let setting = Setting::of(backend, &arguments.transport, &host);
    let host: SharedHost = Arc::new(Mutex::new(Some(host)));
    end_on_signal(signals, host.clone());
    let told = setting.and_then(|setting| story::tell(&setting, &ground, &mut stage));
    let daemon_log = ground.daemon_log();
    take_down(&host);
    let ended = told.and_then(|figures| stage.closing(&figures));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            eprintln!("\nThe story did not happen as told: {trouble}");
            eprintln!("The last lines of the daemon's log:\n{daemon_log}");
            ExitCode::FAILURE
        }
    }
}

/// Ends everything that was started, and waits for the end.
fn take_down(host: &SharedHost) {
    let mut host = host.lock().unwrap_or_else(PoisonError::into_inner);
    drop(host.take());
}

fn end_on_signal(signals: SigSet, host: SharedHost) {
    std::thread::spawn(move || {
        if signals.wait().is_err() {
            return;
        }
        // Held until exit: the story must not print any more.
        let _quiet = std::io::stdout().lock();
        eprintln!("\nInterrupted: everything that was started is ended.");
        take_down(&host);
        std::process::exit(INTERRUPTED);
    });
}
