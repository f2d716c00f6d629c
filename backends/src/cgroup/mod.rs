//! Cgroups (version 2) that contain the processes of a generation: a process and its children stay in the cgroup,
//! whatever they do to their session, environment or parents.
//!
//! ```text
//! <place>/kmorph/<run directory of the daemon, escaped>/<instance>.<generation>
//! ```
//!
//! A process enters the cgroup before it executes its program (`birth`). `cgroup.kill` kills all of it at once, and
//! `populated` in `cgroup.events` shows when the last process has ended. A directory can be removed only when no
//! process is in it, and nothing can enter a removed one: a removed cgroup means an ended generation.

mod memory;
mod place;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::contract::CgroupId;

pub(crate) use memory::Divided;

/// Directory, in the place delegated to kmorph, of all its cgroups.
const OWN_NAME: &str = "kmorph";
/// Maximum length of a directory's name, bytes (cgroup names are file names).
const NAME_MAX_BYTES: usize = 255;
/// Maximum number of attempts to create a directory while other daemons remove its empty parent.
const MAKE_ATTEMPTS: usize = 5;
/// Maximum nesting of a workload's own cgroups that is searched.
const DEPTH_MAX: usize = 32;
/// Maximum time until processes that a test has killed end.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between two checks.
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// The cgroups of one daemon's generations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    base: PathBuf,
    /// True if systemd has delegated the place.
    is_delegated: bool,
    /// Whether the cgroups can limit memory, or why not.
    memory: Result<(), NoCgroups>,
}

/// Why there are no cgroups, or why they lack a function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoCgroups(String);

impl NoCgroups {
    /// Returns a reason from the caller.
    pub fn because(reason: &str) -> Self {
        Self(reason.to_owned())
    }
}

impl Cgroups {
    /// Finds a place for the cgroups of the daemon with this runtime directory, tries it with a process, and
    /// removes empty cgroups that an earlier daemon left there.
    ///
    /// # Errors
    /// If there is no such place, with the reason.
    pub fn find(run_dir: &Path) -> Result<Self, NoCgroups> {
        let place = place::find()?;
        let own = Self {
            base: place.path.join(OWN_NAME).join(escaped(run_dir)),
            is_delegated: place.is_delegated,
            memory: Err(NoCgroups::because("no limits are needed")),
        };
        own.sweep();
        own.tried(Cgroup::try_out).map_err(|error| {
            NoCgroups(format!(
                "no process can be started in a cgroup in {:?}: {error}",
                own.base
            ))
        })?;
        Ok(own)
    }

    /// As [`Cgroups::find`], and enables memory limits if possible.
    ///
    /// # Errors
    /// As [`Cgroups::find`]. If memory cannot be limited, the cgroups work without limits.
    pub fn find_limiting_memory(run_dir: &Path) -> Result<Self, NoCgroups> {
        let mut own = Self::find(run_dir)?;
        own.memory = match own.is_delegated {
            true => Err(NoCgroups::because(IN_A_UNIT)),
            false => own
                .tried(|trial| Ok(own.try_memory(trial)))
                .unwrap_or_else(|error| Err(NoCgroups(error.to_string()))),
        };
        Ok(own)
    }

    /// Checks whether the memory of their processes can be limited, or why not.
    pub(crate) fn memory(&self) -> Result<(), &NoCgroups> {
        self.memory.as_ref().copied()
    }

    /// Returns their parent directory.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Creates a cgroup, or takes an existing empty one with this name.
    pub(crate) fn make(&self, name: &str) -> io::Result<Cgroup> {
        let path = self.base.join(name);
        if let Ok(left) = Cgroup::at(path.clone()) {
            // The existing cgroup may be divided, so that no process could enter it. A cgroup with live processes stays
            // as it is.
            let _ = left.remove();
        }
        for _ in 1..MAKE_ATTEMPTS {
            match std::fs::create_dir_all(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                made => return made.and_then(|()| Cgroup::at(path)),
            }
        }
        std::fs::create_dir_all(&path)?;
        Cgroup::at(path)
    }

    /// Runs `work` with a temporary cgroup.
    fn tried<T>(&self, work: impl FnOnce(&Cgroup) -> io::Result<T>) -> io::Result<T> {
        let trial = self.make("trial")?;
        let done = work(&trial);
        trial.remove()?;
        done
    }

    /// Removes the empty cgroups of this daemon.
    fn sweep(&self) {
        for child in children(&self.base) {
            if let Ok(cgroup) = Cgroup::at(child) {
                // A cgroup with live processes stays; its placement leads to it.
                let _ = cgroup.remove();
            }
        }
    }
}

/// Why memory is not limited in a delegation by systemd: see [`place`].
const IN_A_UNIT: &str = "systemd could not start kmorphd again beside running instances if the memory controller were \
                         enabled in the cgroup of its unit; without Delegate= in the unit, kmorphd run by root uses the \
                         top of the hierarchy, and limits memory there";

/// Returns the result of the search, as text for people.
pub(crate) fn told(found: &Result<Cgroups, NoCgroups>) -> String {
    match found {
        Ok(cgroups) => format!("a cgroup for each instance, in {}", cgroups.base.display()),
        Err(why) => format!("no cgroups: {why}"),
    }
}

/// As [`told`], with the way in which memory is limited for instances without their own kernel.
pub(crate) fn told_with_memory(found: &Result<Cgroups, NoCgroups>) -> String {
    let memory = match found.as_ref().map(Cgroups::memory) {
        Ok(Ok(())) => "memory: held by memory.max".to_owned(),
        Ok(Err(why)) => format!("memory: only limited for each process (RLIMIT_DATA): {why}"),
        Err(_) => "memory: only limited for each process (RLIMIT_DATA)".to_owned(),
    };
    format!("{}; {memory}", told(found))
}

/// Kills all processes in the cgroups of daemons with a runtime directory at or below this one, and removes the
/// cgroups. For tests, which must leave nothing behind.
pub fn end_all_below(directory: &Path) {
    let Ok(place) = place::find() else { return };
    let (top, prefix) = (place.path.join(OWN_NAME), escaped(directory));
    for base in children(&top) {
        let name = base.file_name().unwrap_or_default().to_string_lossy();
        let below = name.strip_prefix(prefix.as_str());
        if below.is_none_or(|rest| !rest.is_empty() && !rest.starts_with('-')) {
            continue;
        }
        for cgroup in children(&base)
            .into_iter()
            .filter_map(|path| Cgroup::at(path).ok())
        {
            let _ = cgroup.kill();
            let deadline = Instant::now() + END_TIMEOUT;
            while cgroup.is_populated().unwrap_or(false) && Instant::now() < deadline {
                std::thread::sleep(LOOK_PAUSE);
            }
            let _ = cgroup.remove();
        }
        let _ = std::fs::remove_dir(&base);
    }
    let _ = std::fs::remove_dir(top);
}

/// An existing cgroup.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    id: CgroupId,
}

impl Cgroup {
    fn at(path: PathBuf) -> io::Result<Self> {
        let id = std::fs::metadata(&path)?.ino();
        Ok(Self {
            id: CgroupId { path, id },
        })
    }

    /// Returns the cgroup with this identity; `None` if it was removed, so that none of its processes lives.
    ///
    /// # Errors
    /// If it is not visible from here.
    pub(crate) fn known(id: &CgroupId) -> io::Result<Option<Self>> {
        match std::fs::metadata(&id.path) {
            Ok(found) => Ok((found.ino() == id.id).then(|| Self { id: id.clone() })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                place::is_cgroup2(&id.path).map(|_| None)
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn id(&self) -> &CgroupId {
        &self.id
    }

    pub(crate) fn path(&self) -> &Path {
        &self.id.path
    }

    /// Moves a process into the cgroup.
    fn take_in(&self, process: u32) -> io::Result<()> {
        std::fs::write(self.id.path.join("cgroup.procs"), process.to_string())
    }

    fn try_out(&self) -> io::Result<()> {
        // Kernels before 5.14 cannot kill a whole cgroup at once.
        std::fs::metadata(self.id.path.join("cgroup.kill"))?;
        // The process ends when its input does.
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn()?;
        let taken_in = self.take_in(child.id());
        child.wait()?;
        taken_in
    }

    /// Sends SIGKILL to all processes in it and below it, including those that are being forked.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match std::fs::write(self.id.path.join("cgroup.kill"), "1") {
            Err(error) if is_gone(&error) => Ok(()),
            done => done,
        }
    }

    /// Returns whether a process in it or below it has not ended.
    pub(crate) fn is_populated(&self) -> io::Result<bool> {
        match std::fs::read_to_string(self.id.path.join("cgroup.events")) {
            Ok(events) => Ok(!events.lines().any(|line| line == "populated 0")),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the processes in it and below it, as far as visible.
    pub(crate) fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for directory in tree(&self.id.path) {
            let list = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        pids
    }

    /// Removes it, together with cgroups that a workload created below it.
    ///
    /// # Errors
    /// If it has live processes.
    pub(crate) fn remove(&self) -> io::Result<()> {
        // Otherwise empty cgroups below it would be removed although others have live processes.
        if self.is_populated()? {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        for directory in tree(&self.id.path).iter().rev() {
            match std::fs::remove_dir(directory) {
                Err(error) if !is_gone(&error) => return Err(error),
                _ => {}
            }
        }
        // Parents with cgroups of other generations or daemons stay.
        for parent in self.id.path.ancestors().skip(1).take(2) {
            let _ = std::fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// ENODEV: it was removed after its file was opened.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

/// Returns the directory and all directories below it, children first.
fn tree(root: &Path) -> Vec<PathBuf> {
    let mut all = vec![root.to_owned()];
    let mut level = all.clone();
    for _ in 0..DEPTH_MAX {
        level = level.iter().flat_map(|path| children(path)).collect();
        if level.is_empty() {
            break;
        }
        all.extend(level.iter().cloned());
    }
    all
}

/// Returns a path as one name: `/` becomes `-`, and characters other than letters, digits and `_` become their
/// code, as in `systemd-escape --path`.
fn escaped(path: &Path) -> String {
    let bytes = path.as_os_str().as_encoded_bytes();
    let mut name = String::new();
    for byte in bytes.strip_prefix(b"/").unwrap_or(bytes) {
        match byte {
            b'/' => name.push('-'),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => name.push(char::from(*byte)),
            other => name.push_str(&format!("\\x{other:02x}")),
        }
    }
    if name.len() <= NAME_MAX_BYTES && !name.is_empty() {
        return name;
    }
    use sha2::{Digest, Sha256};
    let hash = Sha256::digest(bytes);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_path_is_one_name_that_no_other_path_has() {
        assert_eq!(escaped(Path::new("/run/kmorph")), "run-kmorph");
        assert_eq!(escaped(Path::new("/run-kmorph")), "run\\x2dkmorph");
        assert_eq!(escaped(Path::new("/a.b")), "a\\x2eb");
        assert_eq!(escaped(Path::new(&"/d".repeat(300))).len(), 64);
    }

    #[test]
    fn what_lives_in_it_is_seen_ended_and_leaves_it_removable() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = match Cgroups::find(dir.path()) {
            Ok(cgroups) => cgroups,
            Err(why) => return eprintln!("SKIPPED: {why}"),
        };
        let cgroup = cgroups.make("web.1").unwrap();
        assert!(!cgroup.is_populated().unwrap());
        // A workload's own cgroup, which is empty now.
        let inner = cgroup.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let mut command = Command::new("sh");
        // A descendant without any other evidence: another session, no environment, another parent.
        command.args(["-c", "read go; setsid env -i sleep 600 & :"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let taken_in = cgroup.take_in(child.id());
        child.wait().unwrap();
        taken_in.unwrap();
        let known = || Cgroup::known(cgroup.id()).unwrap();
        assert!(known().unwrap().is_populated().unwrap());
        assert_eq!(cgroup.pids().len(), 1);
        assert!(cgroup.remove().is_err(), "something lives in it");
        cgroups.sweep();
        assert!(known().is_some());
        assert!(inner.exists(), "it is not left half removed");
        cgroup.kill().unwrap();
        while cgroup.is_populated().unwrap() {
            std::thread::yield_now();
        }
        cgroups.sweep();
        assert!(known().is_none());
        assert!(!cgroup.is_populated().unwrap());
        // The same path now belongs to another cgroup.
        let another = cgroups.make("web.1").unwrap();
        assert!(known().is_none());
        another.remove().unwrap();
        assert!(!cgroups.base().exists());
    }

    #[test]
    fn what_was_removed_is_entered_by_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let Ok(cgroups) = Cgroups::find(dir.path()) else {
            return eprintln!("SKIPPED: no cgroup can be had");
        };
        let cgroup = cgroups.make("web.1").unwrap();
        let mut entrance = std::fs::File::options();
        let mut entrance = entrance
            .write(true)
            .open(cgroup.path().join("cgroup.procs"))
            .unwrap();
        cgroup.remove().unwrap();
        let error = entrance.write_all(b"0").unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(rustix::io::Errno::NODEV.raw_os_error()),
            "{error}"
        );
    }
}
