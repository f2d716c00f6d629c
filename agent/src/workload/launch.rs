//! Starting the program.

use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use kmorph_launch::{FIRST_OTHER, close_on_exec_from};
use kmorph_workload::handover::{ActivatedListener, AgentEnd, attach};
use nix::sys::signal::Signal;

use super::Plan;
use crate::priority::Scheduling;

/// Why the program could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{what} for the workload {program:?}: {source}")]
pub struct LaunchError {
    what: &'static str,
    program: PathBuf,
    source: io::Error,
}

/// A started program.
pub(super) struct Launched {
    pub(super) child: tokio::process::Child,
    pub(super) end: AgentEnd,
    /// The program's output.
    pub(super) output: OwnedFd,
}

/// Starts the program of `plan`, with its listening sockets when `listening`.
pub(super) fn launch(plan: &Plan, listening: bool) -> Result<Launched, LaunchError> {
    let failed = |what: &'static str| {
        move |source| LaunchError {
            what,
            program: plan.spec.program.clone(),
            source,
        }
    };
    let mut command = Command::new(&plan.spec.program);
    let (output, input) = io::pipe().map_err(failed("making a pipe"))?;
    let errors = input.try_clone().map_err(failed("making a pipe"))?;
    command
        .args(&plan.spec.args)
        .envs(&plan.spec.env)
        .env("KMORPH_INSTANCE", &plan.instance)
        .env("KMORPH_GENERATION", plan.generation.to_string())
        .env("KMORPH_KERNEL_RELEASE", &plan.kernel_release)
        .env(kmorph_workload::MEMORY_ENV, plan.memory.bytes.to_string())
        .env_remove(kmorph_launch::LISTENERS_ENV)
        .env_remove(kmorph_launch::descriptor_limit::SOFT_LIMIT_ENV)
        .stdin(Stdio::null())
        .stdout(input)
        .stderr(errors);
    let mut listeners = Vec::new();
    if listening {
        for (name, socket) in &plan.listeners {
            let socket = socket
                .try_clone()
                .map_err(failed("duplicating a listening socket"))?;
            let name = name.clone();
            listeners.push(ActivatedListener { name, socket });
        }
    }
    let ours = attach(&mut command, &listeners).map_err(failed("passing its sockets"))?;
    let entrance = plan.memory.cgroup().map(|cgroup| {
        let procs = cgroup.join("cgroup.procs");
        File::options().write(true).open(procs)
    });
    let entrance = entrance.transpose().map_err(failed("opening its cgroup"))?;
    place(&mut command, entrance, plan.scheduling, listeners.len());
    let mut command = tokio::process::Command::from(command);
    let child = command.spawn().map_err(failed("starting"))?;
    // Closes this process's copies of what the program inherits.
    drop(command);
    let end = AgentEnd::new(ours).map_err(failed("watching its socket"))?;
    Ok(Launched {
        child,
        end,
        output: output.into(),
    })
}

/// A workload never outlives its agent: without it an instance is dead, and nothing would fence it. Where the
/// agent went first, the workload does not. `entrance` is the `cgroup.procs` of a cgroup of its own.
fn place(command: &mut Command, entrance: Option<File>, scheduling: Scheduling, listeners: usize) {
    use std::os::unix::process::CommandExt;
    // After the listening sockets comes the agent's own, and nothing else is for the workload.
    let last = RawFd::try_from(listeners).unwrap_or(RawFd::MAX - FIRST_OTHER - 1);
    let beyond = FIRST_OTHER + last + 1;
    let place = move || {
        if let Some(entrance) = &entrance {
            // `0` is whoever writes (Documentation/admin-guide/cgroup-v2.rst).
            nix::unistd::write(entrance, b"0")?;
        }
        close_on_exec_from(beyond)?;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        scheduling.restore()
    };
    // SAFETY: the closure runs between fork and exec and makes system calls only; it allocates
    // nothing and takes no lock.
    unsafe { command.pre_exec(place) };
}
