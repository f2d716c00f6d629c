//! Processes on the host, identified so that a reused pid is never mistaken for the original process, and watched by
//! pidfd.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::unix::AsyncFd;

use crate::contract::{ExitCause, ProcessId};

/// The flag of kernel threads (include/linux/sched.h), in field 9 of `/proc/<pid>/stat`.
const PF_KTHREAD: u64 = 0x0020_0000;

/// The fields of `/proc/<pid>/stat` (proc_pid_stat(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) pid: i32,
    /// `R`, `S`, `T`, `Z` …
    pub(crate) state: u8,
    /// Its current parent: a process whose parent has ended gets another one.
    pub(crate) parent: i32,
    pub(crate) session: i32,
    /// True for a kernel thread: it has no environment, no limits, and no parent among the daemon's processes.
    pub(crate) is_kernel_thread: bool,
    /// Number of remaining threads, including the first one even if it has ended.
    pub(crate) threads: u64,
    pub(crate) start_ticks: u64,
}

impl Stat {
    /// Reads the file; `None` if the process does not exist.
    pub(crate) fn read(pid: i32) -> io::Result<Option<Self>> {
        match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(text) => Ok(Self::parse(pid, &text)),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Parses the file. The command's name may contain any characters, including blanks and
    /// parentheses: fields are counted from the last parenthesis.
    pub(crate) fn parse(pid: i32, text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        Some(Self {
            pid,
            state: *fields.first()?.as_bytes().first()?,
            parent: fields.get(1)?.parse().ok()?,
            session: fields.get(3)?.parse().ok()?,
            is_kernel_thread: fields.get(6)?.parse::<u64>().ok()? & PF_KTHREAD != 0,
            threads: fields.get(17)?.parse().ok()?,
            start_ticks: fields.get(19)?.parse().ok()?,
        })
    }

    /// Returns whether this is the process `known`, and not another one with its pid.
    pub(crate) fn is(&self, known: &ProcessId) -> bool {
        self.pid == known.pid && self.start_ticks == known.start_ticks
    }

    /// Returns whether its first thread has ended and others still run.
    pub(crate) fn is_headless(&self) -> bool {
        self.state == b'Z' && self.threads > 1
    }

    /// Returns whether it has ended and only waits to be reaped. The state is that of its first
    /// thread: while other threads remain, the first one is a zombie of a process that still runs.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x') && self.threads <= 1
    }
}

fn gone(error: &io::Error) -> bool {
    // ESRCH: it ended between opening and reading.
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// Returns all current processes.
pub(crate) fn all() -> io::Result<Vec<Stat>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some(pid) = pid
            && let Ok(Some(stat)) = Stat::read(pid)
        {
            found.push(stat);
        }
    }
    Ok(found)
}

/// Returns a pidfd for exactly this process; `None` if it is gone.
pub(crate) fn open(process: &ProcessId) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(process.pid) else {
        return Ok(None);
    };
    let fd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    // Checked after the pidfd is open: from here on, a reuse of the pid would be noticed.
    let same = Stat::read(process.pid)?.is_some_and(|stat| stat.is(process));
    Ok(same.then_some(fd))
}

/// Sends a signal to the process behind `fd`; an ended process is not an error.
pub(crate) fn send(fd: &OwnedFd, signal: Signal) -> io::Result<()> {
    match pidfd_send_signal(fd, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Exit causes of the daemon's children: the status can be read only once, but has several readers.
#[derive(Debug, Default)]
pub(crate) struct Exits {
    known: Mutex<HashMap<(i32, u64), ExitCause>>,
}

impl Exits {
    /// Waits until the process has ended, reaps it if it is a child, and returns the cause.
    pub(crate) async fn wait(&self, process: &ProcessId) -> io::Result<ExitCause> {
        let Some(fd) = open(process)? else {
            return Ok(self.recall(process));
        };
        // SAFETY: the AsyncFd owns the descriptor, deregisters it before it is closed, and never
        // replaces it.
        let fd = unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)?;
        // A pidfd becomes readable when its process has ended (pidfd_open(2)).
        let _ = fd.readable().await?;
        Ok(self.reap(process, fd.get_ref()))
    }

    /// Reaps an ended process if it is a child.
    pub(crate) fn reap(&self, process: &ProcessId, fd: &OwnedFd) -> ExitCause {
        use std::os::fd::AsFd;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        if let Ok(Some(status)) = waitid(WaitId::PidFd(fd.as_fd()), options) {
            let signal = status.terminating_signal();
            let cause = match signal {
                Some(signal) => ExitCause::Signal { signal },
                None => ExitCause::Exited {
                    status: status.exit_status(),
                },
            };
            self.known
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert((process.pid, process.start_ticks), cause.clone());
            return cause;
        }
        self.recall(process)
    }

    fn recall(&self, process: &ProcessId) -> ExitCause {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known.get(&(process.pid, process.start_ticks));
        found.cloned().unwrap_or(ExitCause::Exited { status: None })
    }

    /// Forgets a process whose exit cause is no longer needed.
    pub(crate) fn forget(&self, process: &ProcessId) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(&(process.pid, process.start_ticks));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_cannot_forge_the_fields_behind_it() {
        let text = "7 (a) R 1 1 1) S 1 7 42 0 -1 0 0 0 0 0 0 0 0 0 20 0 3 0 12345 0 0";
        let stat = Stat::parse(7, text).unwrap();
        assert_eq!(
            (stat.state, stat.parent, stat.session, stat.threads),
            (b'S', 1, 42, 3)
        );
        assert_eq!(stat.start_ticks, 12345);
        assert!(!stat.is_kernel_thread);
        let text = "9 (kworker/0:1) I 2 0 0 0 -1 69238880 0 0 0 0 0 0 0 0 20 0 1 0 5 0 0";
        assert!(Stat::parse(9, text).unwrap().is_kernel_thread);
    }

    #[test]
    fn a_process_whose_first_thread_has_ended_runs_while_others_do() {
        let line = |state: char, threads: u32| {
            format!("7 (qemu) {state} 1 7 42 0 -1 0 0 0 0 0 0 0 0 0 20 0 {threads} 0 12345 0 0")
        };
        let is_over = |state, threads| Stat::parse(7, &line(state, threads)).unwrap().is_over();
        assert!(!is_over('Z', 2));
        assert!(is_over('Z', 1));
        assert!(!is_over('S', 1));
    }

    #[tokio::test]
    async fn the_status_of_a_child_is_told_to_everyone_who_asks() {
        #[expect(clippy::zombie_processes, reason = "reaping it is what is tested")]
        let child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let start_ticks = Stat::read(pid).unwrap().unwrap().start_ticks;
        let process = ProcessId {
            role: "sleep".into(),
            pid,
            start_ticks,
        };
        let exits = Exits::default();
        let other = ProcessId {
            start_ticks: start_ticks + 1,
            ..process.clone()
        };
        assert!(
            open(&other).unwrap().is_none(),
            "another start time is another process"
        );
        send(&open(&process).unwrap().unwrap(), Signal::KILL).unwrap();
        let killed = ExitCause::Signal { signal: 9 };
        assert_eq!(exits.wait(&process).await.unwrap(), killed);
        assert_eq!(exits.wait(&process).await.unwrap(), killed);
    }
}
