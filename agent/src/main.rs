//! `kmorph-agent --config <file>`: see the library of this package.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use kmorph_agent::init;
use kmorph_launch::AgentConfig;
use kmorph_launch::birth::{Birth, BirthError};

const USAGE: &str = "usage: kmorph-agent --config <file> | --version";
/// Word after which a program and its arguments follow, for the daemon's use: become it, in a session of its own.
const EXEC: &str = "--exec";
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

/// Is born first, where a daemon's backend has started this process. The other arguments.
fn born(mut words: Vec<OsString>) -> Result<Vec<OsString>, BirthError> {
    if let Some(birth) = Birth::take(&mut words)? {
        birth.be_born()?;
    }
    Ok(words)
}

/// Returns only the system's refusal.
fn become_program(program: &OsString, arguments: &[OsString]) -> std::io::Error {
    match nix::unistd::setsid() {
        Ok(_) => Command::new(program).args(arguments).exec(),
        Err(errno) => errno.into(),
    }
}

fn agent() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let arguments = if init::is_init() {
        init::own_arguments(&words)
    } else {
        match born(words) {
            Ok(words) => words,
            Err(error) => {
                eprintln!("kmorph-agent: {error}");
                return ExitCode::FAILURE;
            }
        }
    };
    if let [first, program, rest @ ..] = arguments.as_slice()
        && first == EXEC
    {
        let error = become_program(program, rest);
        eprintln!("kmorph-agent: becoming {program:?}: {error}");
        return ExitCode::FAILURE;
    }
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
        eprintln!("kmorph-agent: cannot lower the limit of open descriptors: {error}");
    }
    match kmorph_agent::run(config, &path, listeners) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kmorph-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
