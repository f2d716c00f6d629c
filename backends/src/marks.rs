//! Identifies the processes of a generation by evidence in `/proc`.
//!
//! | evidence | lost |
//! |---|---|
//! | a recorded process: pid and exact start time | never |
//! | its tag: the limit `RLIMIT_RTTIME` that it inherited | when it sets that limit itself |
//! | its mark: [`FENCE_ENV`] in its initial environment | when it is started with another environment |
//! | a descendant of a live recorded process, or a process in its session | when that process ends |
//!
//! Processes with a tag are remembered between scans: reading the tag again for each of many fences would be most of
//! the cost of a scan.
//!
//! A pid is never evidence by itself: if one leads to another process (a session, a parent), the scan looks at that
//! process again afterwards and checks that it is still the same. A pid cannot be reused while its process lives.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::birth;
use crate::contract::Placement;
use crate::process::{self, Stat};

/// Environment variable that marks every process of a generation: its run directory.
pub const FENCE_ENV: &str = "KMORPH_FENCE";
/// Maximum number of marks per process that are remembered between scans; a process with more is read in each scan.
const MARKS_KEPT: usize = 4;
/// Maximum length of a remembered mark, bytes: the variable's name and a path (PATH_MAX).
const MARK_MAX_BYTES: usize = 4096 + 32;
/// Number of bytes of an environment read at a time.
const BLOCK_BYTES: usize = 64 * 1024;

/// A process that can still run, with its evidence.
pub(crate) struct Seen {
    stat: Stat,
    evidence: Evidence,
}

/// Evidence from a process itself.
#[derive(Clone, Default)]
struct Evidence {
    tag: Option<u64>,
    /// Its marks, at most [`MARKS_KEPT`], in addition to those searched for.
    marks: BTreeSet<Vec<u8>>,
}

impl Evidence {
    /// Returns whether the evidence is valid as long as the process lives. A process with a tag was born into a
    /// generation and belongs to it for life, whatever it does to its limits and its environment later. A process
    /// without a tag may be about to get one.
    fn is_lasting(&self) -> bool {
        self.tag.is_some() && self.marks.len() <= MARKS_KEPT
    }
}

/// Evidence from earlier scans about processes that still run.
#[derive(Default)]
pub(crate) struct Known(HashMap<(i32, u64), Evidence>);

impl Known {
    /// Scans all processes that can still run, without the daemon's own, for generations with these marks.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub(crate) fn look(&mut self, sought: &BTreeSet<Vec<u8>>) -> io::Result<Vec<Seen>> {
        let own = i32::try_from(std::process::id()).ok();
        let mut all = process::all()?;
        all.retain(|stat| own != Some(stat.pid) && !stat.is_over() && !stat.is_kernel_thread);
        let mut before = std::mem::take(&mut self.0);
        let seen = |stat: Stat| {
            let process = (stat.pid, stat.start_ticks);
            let known = before.remove(&process);
            let evidence = known.unwrap_or_else(|| evidence(&stat, sought));
            if evidence.is_lasting() {
                self.0.insert(process, evidence.clone());
            }
            Seen { stat, evidence }
        };
        Ok(all.into_iter().map(seen).collect())
    }
}

fn evidence(stat: &Stat, sought: &BTreeSet<Vec<u8>>) -> Evidence {
    Evidence {
        tag: tag(stat.pid),
        marks: marks(stat, sought),
    }
}

/// Returns the processes of `seen` that belong to the generation; the scan included its mark.
///
/// # Errors
/// If `/proc` cannot be read.
pub(crate) fn members(placement: &Placement, seen: &[Seen]) -> io::Result<Vec<Stat>> {
    let mark = mark_of(&placement.run_dir);
    let tag = placement.containment.tag;
    let all: Vec<Stat> = seen.iter().map(|seen| seen.stat).collect();
    let kin = kin(&all, placement)?;
    let belongs = |seen: &&Seen| {
        kin.contains_key(&seen.stat.pid)
            || tag.is_some() && seen.evidence.tag == tag
            || seen.evidence.marks.contains(&mark)
    };
    Ok(seen.iter().filter(belongs).map(|seen| seen.stat).collect())
}

/// Returns the live recorded processes, their descendants, and the processes in their sessions.
fn kin(all: &[Stat], placement: &Placement) -> io::Result<BTreeMap<i32, Stat>> {
    let recorded = |stat: &&Stat| placement.processes.iter().any(|known| stat.is(known));
    let mut kin: BTreeMap<i32, Stat> = all
        .iter()
        .filter(recorded)
        .map(|stat| (stat.pid, *stat))
        .collect();
    let leaders: Vec<i32> = kin.keys().copied().collect();
    loop {
        let known = kin.len();
        for stat in all.iter().filter(|stat| stat.pid != stat.session) {
            if leaders.contains(&stat.session) {
                admit(stat, stat.session, |now| now.session, &mut kin)?;
            }
        }
        for stat in all {
            admit(stat, stat.parent, |now| now.parent, &mut kin)?;
        }
        if kin.len() == known {
            return Ok(kin);
        }
    }
}

/// Adds `stat` if its `link` leads to `to`, one of `kin`, which was the same process before and after the check.
fn admit(
    stat: &Stat,
    to: i32,
    link: impl Fn(&Stat) -> i32,
    kin: &mut BTreeMap<i32, Stat>,
) -> io::Result<()> {
    if kin.contains_key(&stat.pid) {
        return Ok(());
    }
    let Some(before) = kin.get(&to).copied() else {
        return Ok(());
    };
    let again = Stat::read(stat.pid)?;
    let linked = again.is_some_and(|now| now.start_ticks == stat.start_ticks && link(&now) == to);
    let same = Stat::read(to)?.is_some_and(|after| after.start_ticks == before.start_ticks);
    if linked && same {
        kin.insert(stat.pid, *stat);
    }
    Ok(())
}

/// Returns the environment entry that marks the generation with this run directory.
pub(crate) fn mark_of(run_dir: &Path) -> Vec<u8> {
    let mut mark = format!("{FENCE_ENV}=").into_bytes();
    mark.extend_from_slice(run_dir.as_os_str().as_encoded_bytes());
    mark
}

fn tag(pid: i32) -> Option<u64> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"));
    limits.ok().and_then(|limits| birth::tag_in(&limits))
}

/// Returns the marks of a process. If its first thread has ended, and with it that thread's view of the
/// memory, all remaining threads are read.
fn marks(stat: &Stat, sought: &BTreeSet<Vec<u8>>) -> BTreeSet<Vec<u8>> {
    let process = PathBuf::from(format!("/proc/{}", stat.pid));
    if !stat.is_headless() {
        return marks_in_file(&process.join("environ"), sought);
    }
    let threads = std::fs::read_dir(process.join("task"));
    let threads = threads.into_iter().flatten().flatten();
    threads
        .flat_map(|thread| marks_in_file(&thread.path().join("environ"), sought))
        .collect()
}

/// Returns whether a process was started with this entry in its environment.
pub(crate) fn has_mark(pid: i32, entry: &[u8]) -> bool {
    let environ = PathBuf::from(format!("/proc/{pid}/environ"));
    marks_in_file(&environ, &BTreeSet::from([entry.to_vec()])).contains(entry)
}

fn marks_in_file(environ: &Path, sought: &BTreeSet<Vec<u8>>) -> BTreeSet<Vec<u8>> {
    // An unreadable process has ended, or belongs to another user.
    let read = File::open(environ).and_then(|file| marks_in(file, sought));
    read.unwrap_or_default()
}

/// Returns the marks in a list of NUL-terminated entries of any length: all marks in `sought`, and the first others,
/// at most [`MARKS_KEPT`] plus one. Entries longer than [`MARK_MAX_BYTES`] are kept only if they are in `sought`.
fn marks_in(mut environ: impl Read, sought: &BTreeSet<Vec<u8>>) -> io::Result<BTreeSet<Vec<u8>>> {
    let longest = sought.iter().map(Vec::len).max().unwrap_or_default();
    let longest = longest.max(MARK_MAX_BYTES);
    let mut found = BTreeSet::new();
    let mut block = vec![0; BLOCK_BYTES];
    let mut entry = Vec::new();
    loop {
        let length = match environ.read(&mut block) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        // The end of the list terminates its last entry.
        let end: &[u8] = if length == 0 { &[0] } else { &[] };
        for byte in block.get(..length).unwrap_or_default().iter().chain(end) {
            if *byte != 0 {
                if entry.len() <= longest {
                    entry.push(*byte);
                }
                continue;
            }
            let is_mark = is_mark(&entry) && found.len() <= MARKS_KEPT;
            if is_mark || sought.contains(&entry) {
                found.insert(std::mem::take(&mut entry));
            }
            entry.clear();
        }
        if length == 0 {
            return Ok(found);
        }
    }
}

/// Returns whether an environment entry sets [`FENCE_ENV`].
fn is_mark(entry: &[u8]) -> bool {
    let value = entry.strip_prefix(FENCE_ENV.as_bytes());
    entry.len() <= MARK_MAX_BYTES && value.is_some_and(|value| value.first() == Some(&b'='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_a_whole_entry_however_far_behind_it_stands() {
        let sought = BTreeSet::from([b"A=1".to_vec(), b"LONG=1".to_vec()]);
        let carried = |environ: &[u8]| marks_in(environ, &sought).unwrap();
        let found = |environ: &[u8]| carried(environ).contains(b"A=1".as_slice());
        assert!(found(b"A=1"));
        assert!(found(b"B=2\0A=1\0"));
        assert!(!found(b"A=12\0"));
        assert!(!found(b"BA=1\0"));
        assert!(!found(b"A=\0"));
        assert!(!found(b""));
        assert!(!found(b"A=1LONG"));
        assert_eq!(carried(b"LONG=1\0A=1\0A=1"), sought);
        for before in [BLOCK_BYTES - 2, BLOCK_BYTES, 6 << 20] {
            let mut environ = vec![b'x'; before];
            environ.extend(b"\0A=1\0Z=1\0");
            assert!(found(&environ), "behind {before} bytes");
        }
    }

    #[test]
    fn few_marks_are_kept_and_those_that_are_sought_in_any_case() {
        let mark = |n: usize| format!("{FENCE_ENV}=/run/{n}").into_bytes();
        let environ: Vec<u8> = (0..10_000)
            .flat_map(|n| [mark(n), vec![0]].concat())
            .collect();
        let sought = BTreeSet::from([mark(9_000)]);
        let found = marks_in(&environ[..], &sought).unwrap();
        assert_eq!(found.len(), MARKS_KEPT + 2);
        assert!(found.contains(&mark(9_000)));
        let of_a_bystander = marks_in(&b"PATH=/bin\0KMORPH_FENCES=/x\0"[..], &sought).unwrap();
        assert_eq!(of_a_bystander, BTreeSet::new());
    }

    /// The process belongs to its generation even after it has dropped all evidence since it was first seen.
    #[test]
    fn what_was_seen_with_a_tag_is_known_as_long_as_it_lives() {
        let (tag, dir) = (birth::new_tag().unwrap(), tempfile::tempdir().unwrap());
        let mut known = Known::default();
        let mut command = std::process::Command::new("sh");
        command
            .args(["-c", "exec env -i sleep 600"])
            .env(FENCE_ENV, dir.path());
        let mut child = command.spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let number = rustix::process::Pid::from_raw(pid);
        let limit = |microseconds| {
            let limit = rustix::process::Rlimit {
                current: Some(microseconds),
                maximum: Some(microseconds),
            };
            rustix::process::prlimit(number, rustix::process::Resource::Rttime, limit)
        };
        let tagged = limit(tag);
        let mut find = || {
            let seen = known.look(&BTreeSet::new()).unwrap();
            seen.into_iter().find(|seen| seen.stat.pid == pid)
        };
        let first = find().map(|seen| seen.evidence.tag);
        let dropped = limit(1_000_000);
        let (read, second) = (super::tag(pid), find().map(|seen| seen.evidence.tag));
        child.kill().unwrap();
        child.wait().unwrap();
        tagged.and(dropped).unwrap();
        assert_eq!(
            (first, read, second),
            (Some(Some(tag)), None, Some(Some(tag)))
        );
        assert!(find().is_none());
        assert!(known.0.keys().all(|(known, _)| *known != pid));
    }
}
