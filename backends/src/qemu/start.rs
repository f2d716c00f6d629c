//! Starts the processes of a guest: the vhost-user device first, then QEMU.
//!
//! Each process leads its own session (`setsid`), so that it survives the daemon and its terminal, carries the
//! generation's mark in its environment, and records its identity before it executes its program.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kmorph_files::{OwnDir, PRIVATE_DIR};
use kmorph_launch::{FIRST_OTHER, close_on_exec_from};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::time::Instant;

use super::{console, qmp, run_dir};
use crate::birth::{self, Unborn};
use crate::cgroup::Cgroup;
use crate::contract::{Containment, ProcessId, SpawnError};
use crate::marks::FENCE_ENV;
use crate::process::Stat;

/// The role of the process whose end is the guest's end.
pub(super) const QEMU_ROLE: &str = "qemu";
/// The role of the process that carries its vsock.
pub(super) const VHOST_ROLE: &str = "vhost-user-vsock";
/// The role of that process for kerf-vsock.
pub(super) const KERF_ROLE: &str = "kerf-vsock";
/// The roles; the first one is the process whose end is the guest's end.
pub(super) const ROLES: [&str; 3] = [QEMU_ROLE, VHOST_ROLE, KERF_ROLE];
/// Maximum time for a started process to create its socket, and for QEMU to accept its first command. Generous:
/// only a process that hangs takes this long; one that ends is noticed at once.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval between checks for the socket.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A process to start.
pub(super) struct Starting<'a> {
    pub(super) role: &'static str,
    /// The agent's program on the host, which becomes this one.
    pub(super) agent: &'a Path,
    /// Program and arguments.
    pub(super) line: Vec<OsString>,
    pub(super) run_dir: &'a Path,
    /// Log file, in the run directory.
    pub(super) log: &'static str,
    /// Host CPUs that it may use.
    pub(super) cpus: &'a [u16],
    /// The cgroup in which it is started.
    pub(super) cgroup: Option<&'a Cgroup>,
    /// Marks that identify the process.
    pub(super) containment: &'a Containment,
}

impl Starting<'_> {
    /// Starts the process and confines it to its CPUs before it has threads of its own.
    pub(super) async fn start(&self) -> io::Result<ProcessId> {
        let log = OwnDir::make(self.run_dir, PRIVATE_DIR)?.append(self.log)?;
        close_on_exec_from(FIRST_OTHER)?;
        let held = self.containment;
        let birth = birth::prepare(self.run_dir, self.role, self.cgroup.map(Cgroup::path), held)?;
        // The agent is born, creates its own session and executes the program: the pid stays the same.
        let mut command = Command::new(self.agent);
        command
            .args(birth.words())
            .arg("--exec")
            .args(&self.line)
            .env(FENCE_ENV, self.run_dir)
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/");
        let unborn = Unborn::start(command)?;
        let pid = i32::try_from(unborn.pid()).map_err(|_| io::ErrorKind::InvalidData)?;
        // A child stays in `/proc` until it is reaped, so that the read always succeeds.
        let stat = Stat::read(pid)?.ok_or(io::ErrorKind::NotFound)?;
        confine(pid, self.cpus)?;
        limit_descriptors(pid)?;
        unborn.born().await?;
        Ok(ProcessId {
            role: self.role.to_owned(),
            pid,
            start_ticks: stat.start_ticks,
        })
    }

    /// Waits until the process accepts connections at `socket`, or has ended.
    pub(super) async fn wait_for(
        &self,
        process: &ProcessId,
        socket: &str,
    ) -> Result<(), SpawnError> {
        let path = self.run_dir.join(socket);
        let deadline = Instant::now() + SOCKET_TIMEOUT;
        let failed = |what: &str| {
            let program = self.line.first().cloned().unwrap_or_default();
            let said = console::tail(&self.run_dir.join(self.log));
            SpawnError::Refused(format!("{program:?} {what}; it said: {said:?}"))
        };
        loop {
            // Only check for the file, without connecting: the device treats its first connection as QEMU's.
            if path.exists() {
                return Ok(());
            }
            let stat = Stat::read(process.pid).unwrap_or(None);
            if stat.is_none_or(|stat| stat.is_over() || !stat.is(process)) {
                return Err(failed("exited at startup"));
            }
            if Instant::now() > deadline {
                return Err(failed(&format!(
                    "created no socket within {SOCKET_TIMEOUT:?}"
                )));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Gives a process the soft limit of descriptors with which this process was started.
fn limit_descriptors(pid: i32) -> io::Result<()> {
    let (Some(soft), Some(pid)) = (
        kmorph_launch::descriptor_limit::before(),
        Pid::from_raw(pid),
    ) else {
        return Ok(());
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: Some(soft),
        maximum,
    };
    prlimit(Some(pid), Resource::Nofile, limit)?;
    Ok(())
}

/// Restricts a thread, and the threads that it starts, to these CPUs.
fn confine(thread: i32, cpus: &[u16]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        let cpu = usize::from(*cpu);
        if cpu >= CpuSet::MAX_CPU {
            let text = format!(
                "CPU {cpu}: the highest that can be used is {}",
                CpuSet::MAX_CPU - 1
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        set.set(cpu);
    }
    let thread = Pid::from_raw(thread).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(sched_setaffinity(Some(thread), &set)?)
}

/// Pins each virtual CPU to a host CPU, in turn.
pub(super) async fn pin_vcpus(directory: &Path, cpus: &[u16]) -> io::Result<()> {
    let commands = directory.join(run_dir::COMMANDS);
    let answer = qmp::command_within(SOCKET_TIMEOUT, &commands, "query-cpus-fast", None).await?;
    let vcpus = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    for (vcpu, cpu) in vcpus.iter().zip(cpus.iter().cycle()) {
        let thread = vcpu["thread-id"]
            .as_i64()
            .and_then(|t| i32::try_from(t).ok());
        let thread = thread.ok_or(io::ErrorKind::InvalidData)?;
        confine(thread, &[*cpu])?;
    }
    Ok(())
}
