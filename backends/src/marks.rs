//! Which processes are of a generation, by what can be seen of them in `/proc`.
//!
//! | evidence | a process loses it |
//! |---|---|
//! | it is one of the recorded ones: pid and exact start time | never |
//! | its tag: the limit `RLIMIT_RTTIME` that it inherited | when it sets that limit itself |
//! | its mark: [`FENCE_ENV`] in the environment it was started with | when it is started with another environment |
//! | it descends from a recorded process that lives, or is in its session | when that one ends |
//!
//! A pid is never evidence by itself: where one leads to another process (a session, a parent), that one is looked at
//! again afterwards, and must still be the one it was. A number cannot change hands while its process lives.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::birth;
use crate::contract::Placement;
use crate::process::{self, Stat};

/// Environment variable that marks every process of a generation: its run directory.
pub const FENCE_ENV: &str = "KMORPH_FENCE";
/// How much of an environment is read at a time, bytes.
const BLOCK_BYTES: usize = 64 * 1024;

/// A process that can still run, with the evidence that it carries.
pub(crate) struct Seen {
    stat: Stat,
    tag: Option<u64>,
    /// Those of the marks that were sought.
    marks: Vec<Vec<u8>>,
}

/// Looks once at every process that can still run, but for the one that asks, for generations with these marks.
///
/// # Errors
/// When `/proc` cannot be read.
pub(crate) fn look(sought: &BTreeSet<Vec<u8>>) -> io::Result<Vec<Seen>> {
    let own = i32::try_from(std::process::id()).ok();
    let mut all = process::all()?;
    all.retain(|stat| own != Some(stat.pid) && !stat.is_over() && !stat.is_kernel_thread);
    let seen = |stat: Stat| Seen {
        tag: tag(stat.pid),
        marks: marks(&stat, sought),
        stat,
    };
    Ok(all.into_iter().map(seen).collect())
}

/// Those of the processes that are of a generation. Its mark was sought.
///
/// # Errors
/// When `/proc` cannot be read.
pub(crate) fn members(placement: &Placement, seen: &[Seen]) -> io::Result<Vec<Stat>> {
    let mark = mark_of(&placement.run_dir);
    let tag = placement.containment.tag;
    let all: Vec<Stat> = seen.iter().map(|seen| seen.stat).collect();
    let kin = kin(&all, placement)?;
    let belongs = |seen: &&Seen| {
        kin.contains_key(&seen.stat.pid)
            || tag.is_some() && seen.tag == tag
            || seen.marks.contains(&mark)
    };
    Ok(seen.iter().filter(belongs).map(|seen| seen.stat).collect())
}

/// The recorded processes that live, what descends from them, and what is in their sessions.
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

/// Takes `stat` in if its `link` leads to `to`, one of `kin`, which was the same process before and after the look.
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

/// The entry of the environment that marks the generation with this run directory.
pub(crate) fn mark_of(run_dir: &Path) -> Vec<u8> {
    let mut mark = format!("{FENCE_ENV}=").into_bytes();
    mark.extend_from_slice(run_dir.as_os_str().as_encoded_bytes());
    mark
}

fn tag(pid: i32) -> Option<u64> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"));
    limits.ok().and_then(|limits| birth::tag_in(&limits))
}

/// Those of the marks that a process carries. When its first thread has ended, each thread that is left is asked: with
/// the first one its view of the memory has gone.
fn marks(stat: &Stat, sought: &BTreeSet<Vec<u8>>) -> Vec<Vec<u8>> {
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

/// Whether the environment that a process was started with carries this entry.
pub(crate) fn has_mark(pid: i32, entry: &[u8]) -> bool {
    let environ = PathBuf::from(format!("/proc/{pid}/environ"));
    !marks_in_file(&environ, &BTreeSet::from([entry.to_vec()])).is_empty()
}

fn marks_in_file(environ: &Path, sought: &BTreeSet<Vec<u8>>) -> Vec<Vec<u8>> {
    // What cannot be read ended meanwhile, or is another user's.
    let read = File::open(environ).and_then(|file| marks_in(file, sought));
    read.unwrap_or_default()
}

/// Those of the entries that stand in a list of entries that end with NUL, however long that is. No more of it is
/// kept than the longest of them.
fn marks_in(mut environ: impl Read, sought: &BTreeSet<Vec<u8>>) -> io::Result<Vec<Vec<u8>>> {
    let longest = sought.iter().map(Vec::len).max().unwrap_or_default();
    let mut found = Vec::new();
    let mut block = vec![0; BLOCK_BYTES];
    let mut entry = Vec::new();
    loop {
        let length = match environ.read(&mut block) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        // The end of the list ends its last entry.
        let end: &[u8] = if length == 0 { &[0] } else { &[] };
        for byte in block.get(..length).unwrap_or_default().iter().chain(end) {
            if *byte != 0 {
                if entry.len() <= longest {
                    entry.push(*byte);
                }
                continue;
            }
            if sought.contains(&entry) && !found.contains(&entry) {
                found.push(entry.clone());
            }
            entry.clear();
        }
        if length == 0 {
            return Ok(found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_a_whole_entry_however_far_behind_it_stands() {
        let sought = BTreeSet::from([b"A=1".to_vec(), b"LONG=1".to_vec()]);
        let carried = |environ: &[u8]| marks_in(environ, &sought).unwrap();
        let found = |environ: &[u8]| carried(environ).contains(&b"A=1".to_vec());
        assert!(found(b"A=1"));
        assert!(found(b"B=2\0A=1\0"));
        assert!(!found(b"A=12\0"));
        assert!(!found(b"BA=1\0"));
        assert!(!found(b"A=\0"));
        assert!(!found(b""));
        assert!(!found(b"A=1LONG"));
        assert_eq!(carried(b"LONG=1\0A=1\0A=1"), [&b"LONG=1"[..], b"A=1"]);
        for before in [BLOCK_BYTES - 2, BLOCK_BYTES, 6 << 20] {
            let mut environ = vec![b'x'; before];
            environ.extend(b"\0A=1\0Z=1\0");
            assert!(found(&environ), "behind {before} bytes");
        }
    }
}
