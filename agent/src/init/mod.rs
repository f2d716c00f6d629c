//! The agent as PID 1 of a small guest: its steps before it serves and when it ends.
//!
//! ```text
//!  kernel ─▶ /init ─▶ mounts ─▶ modules ─▶ loopback, name, limits ─▶ listening sockets ─▶ serve
//!                                                                                          │
//!            power off ◀─ sync ◀─ the workload ends ◀─ SIGINT (Ctrl-Alt-Del), SIGTERM ─────┘
//! ```
//!
//! Each finished step prints a line on the console: if a guest hangs during startup, the last line shows after which
//! step.
//!
//! Invariant: PID 1 never returns. The kernel would panic, and an orderly end would look like a crash; so every end,
//! including a failed start, is a power-off with the reason on the console.

mod loopback;
mod mounts;

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use kmorph_launch::{AgentConfig, PublishedPort};
use kmp_transport::link::vsock;
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use slog::{Logger, info, warn};

/// Open files of the agent and its workload: the kernel's own default of 1,024 is for terminals.
const OPEN_FILES_MAX: u64 = 65_536;
/// The module that answers heartbeats for this kernel, and is told for whom.
const KERF_VSOCK: &str = "kerf-vsock.ko";

/// Why the guest could not be made ready.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {}", errno.desc())]
pub struct InitError {
    what: String,
    errno: Errno,
}

fn failed(what: impl Into<String>) -> impl FnOnce(Errno) -> InitError {
    let what = what.into();
    |errno| InitError { what, errno }
}

/// Whether this process is PID 1, the init of its kernel.
pub fn is_init() -> bool {
    std::process::id() == 1
}

/// Makes the guest ready: mounts, modules, loopback, name, limits.
///
/// # Errors
/// If something without which the daemon could not reach this guest is refused.
pub fn prepare(config: &AgentConfig, log: &Logger) -> Result<(), InitError> {
    mounts::all()?;
    info!(log, "file systems mounted");
    for module in &config.modules {
        let how = load(module, &parameters(module, config)?)?;
        info!(log, "module {}", how; "module" => %module.display());
    }
    // From now on Ctrl-Alt-Del is a SIGINT to this process instead of a reset.
    set_cad_enabled(false).map_err(failed("taking over Ctrl-Alt-Del"))?;
    nix::unistd::sethostname(config.instance.as_str()).map_err(failed("setting the host name"))?;
    let (_, most) =
        getrlimit(Resource::RLIMIT_NOFILE).map_err(failed("reading the limit of open files"))?;
    let files = OPEN_FILES_MAX.max(most);
    setrlimit(Resource::RLIMIT_NOFILE, files, files)
        .map_err(failed("raising the limit of open files"))?;
    // Programs expect 127.0.0.1; one that does without it should run on a kernel without IP.
    if let Err(errno) = loopback::up() {
        warn!(log, "cannot bring up the loopback interface"; "error" => errno.desc());
    }
    info!(log, "guest prepared"; "open_files" => files);
    Ok(())
}

/// This guest's context id, for logs; none where its vsock does not tell.
pub fn cid() -> Option<u32> {
    ::vsock::get_local_cid().ok()
}

fn system(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// The parameters of a module; most modules get none and use their defaults.
fn parameters(module: &Path, config: &AgentConfig) -> Result<CString, InitError> {
    if module.file_name() != Some(OsStr::new(KERF_VSOCK)) {
        return Ok(CString::default());
    }
    let boot_id = kmorph_launch::boot_id().map_err(|e| failed("reading the boot id")(system(e)))?;
    let (instance, generation) = (&config.instance, config.generation);
    let text = format!("instance={instance} generation={generation} boot_id={boot_id}");
    CString::new(text).map_err(|_| failed("naming this instance to its kernel")(Errno::EINVAL))
}

/// Loads it, and says how that went.
fn load(module: &Path, parameters: &CStr) -> Result<&'static str, InitError> {
    let what = || format!("loading the module {}", module.display());
    let file = File::open(module).map_err(|e| failed(what())(system(e)))?;
    match finit_module(&file, parameters, ModuleInitFlags::empty()) {
        Ok(()) => Ok("loaded"),
        // Built in, or loaded by the kernel for a device it found.
        Err(Errno::EEXIST) => Ok("was there"),
        Err(errno) => Err(failed(what())(errno)),
    }
}

/// One AF_VSOCK listener for each published port, in order: the daemon's forwarder connects to them. `option` selects
/// their transport, if needed.
///
/// # Errors
/// The system's, for instance without a vsock device.
pub fn listeners(
    ports: &[PublishedPort],
    option: Option<i32>,
    log: &Logger,
) -> Result<Vec<OwnedFd>, InitError> {
    let mut sockets = Vec::with_capacity(ports.len());
    for port in ports {
        sockets.push(listener(port.port, option)?);
        info!(log, "published port listens"; "vsock_port" => port.port);
    }
    Ok(sockets)
}

fn listener(port: u16, option: Option<i32>) -> Result<OwnedFd, InitError> {
    vsock::listening(u32::from(port), option).map_err(|error| {
        let what = format!("listening at vsock port {port}");
        failed(what)(system(error))
    })
}

/// Ends this kernel. Returns only the system's refusal to do so.
pub fn power_off() -> io::Error {
    nix::unistd::sync();
    match reboot(RebootMode::RB_POWER_OFF) {
        Ok(never) => match never {},
        Err(errno) => errno.into(),
    }
}

/// The agent's arguments among those of init. The kernel hands over every word of its command line
/// that it does not know itself, and ours, which follow `--`, last.
pub fn own_arguments(words: &[std::ffi::OsString]) -> Vec<std::ffi::OsString> {
    let ours = words.iter().rposition(|word| word == "--config");
    ours.map_or_else(|| words.to_vec(), |at| words[at..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_words_of_the_kernels_command_line_are_left_out() {
        let words = ["ro", "--config", "/etc/kmorph/agent.json"].map(Into::into);
        assert_eq!(own_arguments(&words), words[1..]);
        let usual = ["--version"].map(Into::into);
        assert_eq!(own_arguments(&usual), usual);
    }
}
