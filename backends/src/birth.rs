//! What a started process does between fork and exec: it enters its generation's cgroup, takes the generation's tag,
//! and writes down who it is.
//!
//! ```text
//!  daemon                     child                          another daemon, later
//!  placement.json ── fork ──▶ enters the cgroup
//!                             tag
//!                             <role>.birth ◀── /proc/self/stat
//!                             spawn.closed? ── yes: ends     spawn.closed, then <role>.birth is read
//!                             exec
//! ```
//!
//! So a daemon may die at any moment: either the child has written its pid and start time before the next daemon
//! reads them, or it sees that the spawn was closed and never becomes its program.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, access, read, write};

use crate::cgroup::Cgroup;
use crate::contract::{Containment, ProcessId};
use crate::process::Stat;

/// Ending of the name of the file in a run directory that a process of this role writes.
const RECORD_SUFFIX: &str = ".birth";
/// Name of the file in a run directory after which no process of it is started any more.
const CLOSED: &str = "spawn.closed";
/// Longest `/proc/<pid>/stat`, bytes: 52 numbers and a name of 15 bytes.
const STAT_MAX_BYTES: usize = 2048;
/// The lowest tag: microseconds that no process ever runs (146,000 years).
const TAG_MIN: u64 = 1 << 62;

/// A number that marks the processes of one generation, as `RLIMIT_RTTIME` in microseconds.
///
/// # Errors
/// When the system has no random numbers.
pub(crate) fn new_tag() -> io::Result<u64> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(TAG_MIN | u64::from_ne_bytes(random) >> 2)
}

/// The tag in the text of `/proc/<pid>/limits`, if there is one.
pub(crate) fn tag_in(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max realtime timeout"))?;
    let hard: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    (hard >= TAG_MIN).then_some(hard)
}

/// Has processes that are started from now on be told from those of an earlier spawn in this directory.
///
/// # Errors
/// When what that left cannot be removed.
pub(crate) fn begin(run_dir: &Path, roles: &[&str]) -> io::Result<()> {
    let records = roles.iter().map(|role| record_path(run_dir, role));
    for path in records.chain([run_dir.join(CLOSED)]) {
        remove(&path)?;
    }
    Ok(())
}

/// Has `command`, once it is spawned, do all that the module tells. `cgroup` must be the one of `containment`.
///
/// # Errors
/// When the files that it writes cannot be made.
pub(crate) fn prepare(
    command: &mut Command,
    run_dir: &Path,
    role: &str,
    cgroup: Option<&Cgroup>,
    containment: &Containment,
) -> io::Result<()> {
    let record = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(record_path(run_dir, role))?;
    if let Some(cgroup) = cgroup {
        enter_before_exec(command, cgroup.entrance()?);
    }
    let closed = CString::new(run_dir.join(CLOSED).as_os_str().as_bytes())?;
    let tag = containment.tag;
    let born = move || {
        if let Some(tag) = tag {
            take_tag(tag)?;
        }
        let stat = open(
            c"/proc/self/stat",
            OFlag::O_RDONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        let mut text = [0; STAT_MAX_BYTES];
        let length = read(&stat, &mut text)?;
        if write(&record, text.get(..length).unwrap_or(&text))? != length {
            return Err(Errno::EIO.into());
        }
        match access(closed.as_c_str(), AccessFlags::F_OK) {
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
            Ok(()) => Err(Errno::ECANCELED.into()),
        }
    };
    // SAFETY: the closure runs between fork and exec of a process that may have threads. It makes system calls only
    // (prlimit64, open, read, write, faccessat, close), all of them async-signal-safe. It allocates nothing, takes no
    // lock, and what it uses was made before the fork.
    unsafe {
        command.pre_exec(born);
    }
    Ok(())
}

/// Has `command`, once it is spawned, enter a cgroup before it becomes its program.
pub(crate) fn enter_before_exec(command: &mut Command, entrance: File) {
    let enter = move || match write(&entrance, b"0") {
        Ok(_) => Ok(()),
        Err(errno) => Err(errno.into()),
    };
    // SAFETY: as in `prepare`: one write, to a file that was opened before the fork.
    unsafe {
        command.pre_exec(enter);
    }
}

/// Where the limit is lower already, the instance of another kmorph runs this one: it has that one's tag.
fn take_tag(tag: u64) -> io::Result<()> {
    match setrlimit(Resource::RLIMIT_RTTIME, tag, tag) {
        Ok(()) | Err(Errno::EPERM) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Ends the spawn in this run directory, if it is under way: no process that has not been born yet will be.
///
/// # Errors
/// When that cannot be said; it may go on then.
pub(crate) fn close(run_dir: &Path) -> io::Result<()> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(run_dir.join(CLOSED))
        .map(drop)
}

/// The process of this role, which may have ended since.
///
/// # Errors
/// When its record cannot be read.
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

/// Removes what a spawn left.
///
/// # Errors
/// When it cannot be removed.
pub(crate) fn forget(run_dir: &Path, roles: &[&str]) -> io::Result<()> {
    begin(run_dir, roles)
}

fn record_path(run_dir: &Path, role: &str) -> PathBuf {
    run_dir.join(format!("{role}{RECORD_SUFFIX}"))
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

    fn contained() -> Containment {
        Containment {
            cgroup: None,
            tag: Some(new_tag().unwrap()),
        }
    }

    #[test]
    fn a_process_is_on_record_and_tagged_before_it_is_its_program() {
        let dir = tempfile::tempdir().unwrap();
        let containment = contained();
        let mut command = Command::new("cat");
        command.arg("/proc/self/limits");
        prepare(&mut command, dir.path(), "agent", None, &containment).unwrap();
        let child = command
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let seen = Stat::read(pid).unwrap().unwrap();
        let known = recorded(dir.path(), "agent").unwrap().unwrap();
        assert!(seen.is(&known), "{seen:?} {known:?}");
        let output = child.wait_with_output().unwrap();
        let limits = String::from_utf8(output.stdout).unwrap();
        assert_eq!(tag_in(&limits), containment.tag);
        forget(dir.path(), &["agent"]).unwrap();
        assert_eq!(recorded(dir.path(), "agent").unwrap(), None);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_spawn_that_was_closed_starts_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let marker = dir.path().join("ran");
        let mut command = Command::new("touch");
        command.arg(&marker);
        prepare(&mut command, dir.path(), "agent", None, &contained()).unwrap();
        close(dir.path()).unwrap();
        close(dir.path()).unwrap();
        let error = command.spawn().unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(Errno::ECANCELED as i32),
            "{error}"
        );
        assert!(!marker.exists());
    }

    #[test]
    fn an_ordinary_limit_is_no_tag() {
        let line = |value: &str| format!("Max realtime timeout      {value} {value} us\n");
        assert_eq!(tag_in(&line("unlimited")), None);
        assert_eq!(tag_in(&line("200000")), None);
        assert_eq!(tag_in(&line(&TAG_MIN.to_string())), Some(TAG_MIN));
    }
}
