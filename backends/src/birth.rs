//! The daemon's side of a [birth](kmorph_launch::birth): it prepares the records, starts the process, waits for its
//! report, and closes the births of an abandoned spawn.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use kmorph_launch::birth::{Birth, closed_path, heard, record_path};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use crate::contract::{Containment, ProcessId};
use crate::process::Stat;

/// Minimum tag: a run time in microseconds that no process reaches (146,000 years).
const TAG_MIN: u64 = 1 << 62;
/// Maximum time from the start of a process to its birth, which takes milliseconds unless the disk with the
/// run directories stalls.
const BIRTH_TIMEOUT: Duration = Duration::from_secs(120);

/// Returns a number that marks the processes of one generation, as `RLIMIT_RTTIME` in microseconds.
///
/// # Errors
/// If the system has no random numbers.
pub(crate) fn new_tag() -> io::Result<u64> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(TAG_MIN | u64::from_ne_bytes(random) >> 2)
}

/// Returns the tag in the text of `/proc/<pid>/limits`, if any.
pub(crate) fn tag_in(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max realtime timeout"))?;
    let hard: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    (hard >= TAG_MIN).then_some(hard)
}

/// Removes the records of an earlier spawn in this directory, so that they cannot be mistaken for those of the next
/// spawn.
///
/// # Errors
/// If they cannot be removed.
pub(crate) fn begin(run_dir: &Path, roles: &[&str]) -> io::Result<()> {
    let records = roles.iter().map(|role| record_path(run_dir, role));
    for path in records.chain([closed_path(run_dir)]) {
        remove(&path)?;
    }
    Ok(())
}

/// Prepares the birth of a process in the cgroup with this directory, which is the cgroup of `containment` or below it.
///
/// # Errors
/// If its record cannot be created.
pub(crate) fn prepare(
    run_dir: &Path,
    role: &str,
    cgroup: Option<&Path>,
    containment: &Containment,
) -> io::Result<Birth> {
    File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(record_path(run_dir, role))?;
    Ok(Birth {
        run_dir: run_dir.to_owned(),
        role: role.to_owned(),
        tag: containment.tag,
        cgroup: cgroup.map(Path::to_owned),
    })
}

/// A process that was started and may not be born yet. Dropping this value kills it.
pub(crate) struct Unborn {
    /// `None` once it is born.
    child: Option<Child>,
    pid: u32,
    told: Receiver,
}

impl Drop for Unborn {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            // A process that waits for a stalled disk cannot be reaped yet, and this thread must not wait for the disk.
            let reap = std::thread::Builder::new().name("reap".to_owned());
            let _ = reap.spawn(move || child.wait());
        }
    }
}

impl Unborn {
    /// Starts `command`, whose first arguments are those of a birth. Does not wait.
    ///
    /// # Errors
    /// If its program cannot be executed.
    pub(crate) fn start(mut command: Command) -> io::Result<Self> {
        let (told, tell) = io::pipe()?;
        let told = Receiver::from_owned_fd(told.into())?;
        let child = command.stdin(tell).spawn()?;
        // Dropping `command` closes this process's own copy of the other end.
        drop(command);
        let pid = child.id();
        Ok(Self {
            child: Some(child),
            pid,
            told,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until the process is born, at most [`BIRTH_TIMEOUT`].
    ///
    /// # Errors
    /// If it was not born, with its reason. The process has ended.
    pub(crate) async fn born(mut self) -> io::Result<()> {
        let mut told = Vec::new();
        let hear = self.told.read_to_end(&mut told);
        match tokio::time::timeout(BIRTH_TIMEOUT, hear).await {
            Ok(read) => read.and_then(|_| heard(&told))?,
            Err(_) => {
                let text =
                    format!("the process has not recorded its identity within {BIRTH_TIMEOUT:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
        self.child = None;
        Ok(())
    }
}

/// Ends a spawn that is under way in this run directory: afterwards no more of its processes can be born.
///
/// # Errors
/// If this cannot be ensured; the spawn may then continue.
pub(crate) fn close(run_dir: &Path) -> io::Result<()> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(closed_path(run_dir))
        .map(drop)
}

/// Returns the process with this role, which may have ended since.
///
/// # Errors
/// If its record cannot be read.
pub(crate) fn recorded(run_dir: &Path, role: &str) -> io::Result<Option<ProcessId>> {
    let text = match std::fs::read_to_string(record_path(run_dir, role)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    let pid = text.split(' ').next().and_then(|pid| pid.parse().ok());
    let stat = pid.and_then(|pid| Stat::parse(pid, &text));
    Ok(stat.map(|stat| ProcessId {
        role: role.to_owned(),
        pid: stat.pid,
        start_ticks: stat.start_ticks,
    }))
}

/// Removes the records of a spawn.
///
/// # Errors
/// If they cannot be removed.
pub(crate) fn forget(run_dir: &Path, roles: &[&str]) -> io::Result<()> {
    begin(run_dir, roles)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_limit_is_no_tag() {
        let line = |value: &str| format!("Max realtime timeout      {value} {value} us\n");
        assert_eq!(tag_in(&line("unlimited")), None);
        assert_eq!(tag_in(&line("200000")), None);
        assert_eq!(tag_in(&line(&TAG_MIN.to_string())), Some(TAG_MIN));
    }
}
