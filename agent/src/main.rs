//! `kmorph-agent --config <file>`: see the library of this package.

use std::path::PathBuf;
use std::process::ExitCode;

use kmorph_agent::init;
use kmorph_launch::AgentConfig;

const USAGE: &str = "usage: kmorph-agent --config <file> | --version";
/// Exit status for a wrong command line or configuration.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    if !init::is_init() {
        return agent();
    }
    // PID 1 must not return: an orderly end and a failed start both power the guest off.
    let _ = agent();
    let refused = init::power_off();
    eprintln!("kmorph-agent: powering off: {refused}");
    ExitCode::FAILURE
}

fn agent() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let arguments = if init::is_init() {
        init::own_arguments(&words)
    } else {
        words
    };
    let path = match arguments.as_slice() {
        [flag] if flag == "--version" => {
            println!("kmorph-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        [flag] if flag == "--help" => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        [flag, path] if flag == "--config" => PathBuf::from(path),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let config = match AgentConfig::load(&path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("kmorph-agent: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    // SAFETY: first thing the program does with descriptors; no thread runs yet.
    let listeners = match unsafe { kmorph_agent::inherited::listeners(config.ports.len()) } {
        Ok(listeners) => listeners,
        Err(error) => {
            eprintln!("kmorph-agent: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if let Err(error) = kmorph_launch::descriptor_limit::take_told() {
        eprintln!("kmorph-agent: the limit of open descriptors stays high: {error}");
    }
    match kmorph_agent::run(config, &path, listeners) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kmorph-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
