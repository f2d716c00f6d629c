//! A helper process that only holds a guest's memory, from before its fence until its release, so that the memory
//! survives the daemon and a later daemon can capture it.
//!
//! Like the processes of a generation, the helper is found by a mark in its environment, but by a different one: a
//! fence kills the processes of the generation, and not the helper.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::contract::ProcessId;
use crate::marks;
use crate::process::{self, Exits, Stat};

/// Environment variable of such a process: the run directory of the generation whose memory it keeps.
const KEEPS_ENV: &str = "KMORPH_KEEPS_MEMORY";
const ROLE: &str = "memory-keeper";
/// The descriptor of the memory: standard input.
const DESCRIPTOR: u32 = 0;

/// Starts a helper process that keeps the memory, unless one exists.
pub(super) fn start(memory: &File, run_dir: &Path) -> io::Result<()> {
    if !find(run_dir)?.is_empty() {
        return Ok(());
    }
    kmorph_launch::close_on_exec_from(kmorph_launch::FIRST_OTHER)?;
    // In its own session, so that it survives the daemon and its terminal. The function that ends it reaps it through
    // its pidfd.
    let child = Command::new("setsid")
        .args(["--", "sleep", "infinity"])
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .env(KEEPS_ENV, run_dir)
        .stdin(memory.try_clone()?)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()?;
    drop(child);
    Ok(())
}

/// Returns the helper processes for the generation with this run directory.
pub(super) fn find(run_dir: &Path) -> io::Result<Vec<ProcessId>> {
    let mut mark = format!("{KEEPS_ENV}=").into_bytes();
    mark.extend_from_slice(run_dir.as_os_str().as_bytes());
    let all = process::all()?.into_iter();
    let keeps = all.filter(|stat| !stat.is_over() && marks::has_mark(stat.pid, &mark));
    Ok(keeps
        .map(|stat| ProcessId {
            role: ROLE.to_owned(),
            pid: stat.pid,
            start_ticks: stat.start_ticks,
        })
        .collect())
}

/// Returns the kept memory of the generation with this run directory.
pub(super) fn memory(run_dir: &Path) -> io::Result<Option<File>> {
    for keeper in find(run_dir)? {
        match File::open(format!("/proc/{}/fd/{DESCRIPTOR}", keeper.pid)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            // Checked after the open: the file belongs to this process, and not to another one that has reused its pid.
            Ok(memory) if Stat::read(keeper.pid)?.is_some_and(|stat| stat.is(&keeper)) => {
                return Ok(Some(memory));
            }
            Ok(_) => {}
        }
    }
    Ok(None)
}

/// Ends the helper processes, and waits until they are gone.
pub(super) async fn end(run_dir: &Path, exits: &Exits) -> io::Result<()> {
    for keeper in find(run_dir)? {
        if let Some(fd) = process::open(&keeper)? {
            process::send(&fd, Signal::KILL)?;
            exits.wait(&keeper).await?;
            exits.forget(&keeper);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[tokio::test]
    async fn memory_is_held_when_nobody_else_has_it_until_it_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let flags = MemfdFlags::CLOEXEC;
        let mut own = File::from(memfd_create("memory-backend-memfd", flags).unwrap());
        own.write_all(b"what it knew").unwrap();
        start(&own, dir.path()).unwrap();
        start(&own, dir.path()).unwrap();
        drop(own);
        assert_eq!(find(dir.path()).unwrap().len(), 1, "one is enough");
        assert!(memory(other.path()).unwrap().is_none());
        let mut kept = memory(dir.path()).unwrap().unwrap();
        let mut text = String::new();
        kept.rewind().unwrap();
        kept.read_to_string(&mut text).unwrap();
        assert_eq!(text, "what it knew");
        let exits = Exits::default();
        end(dir.path(), &exits).await.unwrap();
        end(dir.path(), &exits).await.unwrap();
        assert!(find(dir.path()).unwrap().is_empty());
        assert!(memory(dir.path()).unwrap().is_none());
    }
}
