//! The first steps of a process that a backend starts: it enters its generation's cgroup, takes the generation's tag,
//! and records its identity.
//!
//! ```text
//!  daemon                        process                       a later daemon
//!  placement.json, spawn ──────▶ enters the cgroup
//!                                tag
//!                                <role>.birth ◀── /proc/self/stat
//!                                spawn.closed? ── yes: ends    spawn.closed, then <role>.birth is read
//!  the spawn succeeds ◀── born ─ standard input
//!                                becomes its program
//! ```
//!
//! So a daemon may die at any moment: either the process has written its pid and start time before the next daemon
//! reads them, or it sees that the spawn was closed and exits. The process reports to the daemon on standard input,
//! which is a pipe until then, and the daemon does not consider the spawn complete before.
//!
//! The process does this itself, instead of the daemon doing it between fork and exec: a fork copies the daemon's
//! page tables, which takes longer than the rest of a start when the daemon monitors thousands of instances.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};

/// First of the words that say how to be born.
const WORD: &str = "--birth";
/// How many words there are with it.
const WORDS: usize = 5;
/// Ending of the name of the file in a run directory that a process of this role writes.
const RECORD_SUFFIX: &str = ".birth";
/// Name of the file in a run directory after which no process of it is started any more.
const CLOSED: &str = "spawn.closed";
/// The report to the daemon on success; anything else is the reason for the failure.
const BORN: &str = "born";
/// Most that it tells, bytes: the capacity of the smallest pipe, so that telling never waits.
const TOLD_MAX: usize = 4096;

/// How a process is to be born.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Birth {
    /// Run directory of its generation.
    pub run_dir: PathBuf,
    /// Role of the process in its generation.
    pub role: String,
    /// Its tag, as `RLIMIT_RTTIME` in microseconds.
    pub tag: Option<u64>,
    /// Directory of its cgroup.
    pub cgroup: Option<PathBuf>,
}

/// Why a process was not born.
#[derive(Debug, thiserror::Error)]
pub enum BirthError {
    /// The words do not say it.
    #[error("invalid words after --birth: run directory, role, tag and cgroup are needed")]
    Words,
    /// Another daemon has given the spawn up.
    #[error("a later daemon has closed this spawn")]
    Closed,
    /// The system refused something.
    #[error("{what}: {source}")]
    System {
        /// The attempted action.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
}

fn failed(what: &str, at: &Path) -> impl FnOnce(io::Error) -> BirthError {
    let what = format!("{what} {at:?}");
    move |source| BirthError::System { what, source }
}

impl Birth {
    /// The words, as the first arguments of the process.
    pub fn words(&self) -> [OsString; WORDS] {
        let tag = self.tag.map(|tag| tag.to_string()).unwrap_or_default();
        let cgroup = self.cgroup.clone().unwrap_or_default();
        [
            WORD.into(),
            self.run_dir.clone().into(),
            self.role.clone().into(),
            tag.into(),
            cgroup.into(),
        ]
    }

    /// Takes the words off the front of `arguments`; `None` when there are none, because a person starts the process.
    ///
    /// # Errors
    /// [`BirthError::Words`].
    pub fn take(arguments: &mut Vec<OsString>) -> Result<Option<Self>, BirthError> {
        if arguments.first().is_none_or(|first| first != WORD) {
            return Ok(None);
        }
        if arguments.len() < WORDS {
            return Err(BirthError::Words);
        }
        let text = |word: &OsString| {
            word.to_str()
                .map(ToOwned::to_owned)
                .ok_or(BirthError::Words)
        };
        let given = |word: &OsStr| (!word.is_empty()).then(|| word.to_owned());
        let words: Vec<_> = arguments.drain(..WORDS).collect();
        let tag = given(&words[3]).map(|tag| text(&tag)?.parse().map_err(|_| BirthError::Words));
        Ok(Some(Self {
            run_dir: (&words[1]).into(),
            role: text(&words[2])?,
            tag: tag.transpose()?,
            cgroup: given(&words[4]).map(PathBuf::from),
        }))
    }

    /// Has this process be born, and tells the daemon. Standard input is empty afterwards.
    ///
    /// # Errors
    /// If it was not: the process must end.
    pub fn be_born(&self) -> Result<(), BirthError> {
        let null = File::open("/dev/null").map_err(failed("opening", Path::new("/dev/null")));
        let born = null.and_then(|null| self.steps().map(|()| null));
        let told = born
            .as_ref()
            .map_or_else(ToString::to_string, |_| BORN.to_owned());
        let input = io::stdin().as_fd().try_clone_to_owned();
        // A daemon that has died meanwhile does not hear it: the next one finds the record.
        let told = &told.as_bytes()[..told.len().min(TOLD_MAX)];
        let _ = input.map(|input| File::from(input).write_all(told));
        let emptied = rustix::stdio::dup2_stdin(born?).map_err(io::Error::from);
        emptied.map_err(failed("reading", Path::new("/dev/null")))
    }

    fn steps(&self) -> Result<(), BirthError> {
        if let Some(cgroup) = &self.cgroup {
            // `0` is whoever writes (Documentation/admin-guide/cgroup-v2.rst).
            let entered = std::fs::write(cgroup.join("cgroup.procs"), "0");
            entered.map_err(failed("entering the cgroup", cgroup))?;
        }
        if let Some(tag) = self.tag {
            take_tag(tag).map_err(failed("taking the tag for", &self.run_dir))?;
        }
        let path = record_path(&self.run_dir, &self.role);
        let stat =
            std::fs::read("/proc/self/stat").map_err(failed("reading the identity for", &path))?;
        // The daemon has made the file. Where it is gone, so is the generation.
        let record = File::options().write(true).open(&path);
        let recorded = record.and_then(|mut record| record.write_all(&stat));
        recorded.map_err(failed("writing", &path))?;
        let closed = closed_path(&self.run_dir);
        match closed.try_exists() {
            Ok(false) => Ok(()),
            Ok(true) => Err(BirthError::Closed),
            Err(error) => Err(failed("looking for", &closed)(error)),
        }
    }
}

/// The process's report on its birth, from the end of its pipe.
///
/// # Errors
/// Its reason, when it was not born.
pub fn heard(told: &[u8]) -> io::Result<()> {
    match String::from_utf8_lossy(told).as_ref() {
        BORN => Ok(()),
        "" => Err(io::Error::other("it exited immediately")),
        reason => Err(io::Error::other(reason.to_owned())),
    }
}

/// If a lower limit is already in force, the instance of another kmorph runs this process, which keeps that one's
/// tag.
fn take_tag(tag: u64) -> io::Result<()> {
    let limit = Rlimit {
        current: Some(tag),
        maximum: Some(tag),
    };
    match setrlimit(Resource::Rttime, limit) {
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The file in which a process of this role records its identity: its `/proc/<pid>/stat`.
pub fn record_path(run_dir: &Path, role: &str) -> PathBuf {
    run_dir.join(format!("{role}{RECORD_SUFFIX}"))
}

/// The file that closes a spawn.
pub fn closed_path(run_dir: &Path) -> PathBuf {
    run_dir.join(CLOSED)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn words_say_how_to_be_born() {
        for birth in [
            Birth {
                run_dir: "/run/kmorph/web/1".into(),
                role: "agent".to_owned(),
                tag: Some(1 << 62),
                cgroup: Some("/sys/fs/cgroup/kmorph/web.1".into()),
            },
            Birth {
                run_dir: OsStr::from_bytes(b"/run/\xff").into(),
                role: "qemu".to_owned(),
                tag: None,
                cgroup: None,
            },
        ] {
            let mut arguments = birth.words().to_vec();
            arguments.push("--config".into());
            assert_eq!(Birth::take(&mut arguments).unwrap(), Some(birth));
            assert_eq!(arguments, ["--config"]);
            assert_eq!(Birth::take(&mut arguments).unwrap(), None);
        }
        for words in [
            vec![],
            vec!["/run", "agent", "1"],
            vec!["/run", "agent", "x", ""],
        ] {
            let mut arguments: Vec<OsString> =
                [WORD].into_iter().chain(words).map(Into::into).collect();
            assert!(matches!(
                Birth::take(&mut arguments),
                Err(BirthError::Words)
            ));
        }
    }

    #[test]
    fn a_daemon_hears_the_reason() {
        heard(BORN.as_bytes()).unwrap();
        let reason = BirthError::Closed.to_string();
        assert_eq!(heard(reason.as_bytes()).unwrap_err().to_string(), reason);
        assert!(heard(b"").is_err());
    }
}
