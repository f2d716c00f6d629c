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

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::birth;
use crate::contract::Placement;
use crate::process::{self, Stat};

/// Environment variable that marks every process of a generation: its run directory.
pub const FENCE_ENV: &str = "KMORPH_FENCE";
/// How much of an environment is read at a time, bytes.
const BLOCK_BYTES: usize = 64 * 1024;

/// The processes of a generation that can still run, but for the one that asks.
///
/// # Errors
/// When `/proc` cannot be read.
pub(crate) fn members(placement: &Placement) -> io::Result<Vec<Stat>> {
    let mark = mark_of(&placement.run_dir);
    let own = i32::try_from(std::process::id()).ok();
    let mut all = process::all()?;
    all.retain(|stat| own != Some(stat.pid) && !stat.is_over() && !stat.is_kernel_thread);
    let kin = kin(&all, placement)?;
    let belongs = |stat: &Stat| {
        kin.contains_key(&stat.pid)
            || placement
                .containment
                .tag
                .is_some_and(|tag| has_tag(stat.pid, tag))
            || has_mark(stat.pid, &mark)
            || stat.is_headless() && a_thread_has_mark(stat.pid, &mark)
    };
    all.retain(belongs);
    Ok(all)
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

fn has_tag(pid: i32, tag: u64) -> bool {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"));
    limits.is_ok_and(|limits| birth::tag_in(&limits) == Some(tag))
}

/// Whether the environment that a process was started with carries this entry.
pub(crate) fn has_mark(pid: i32, entry: &[u8]) -> bool {
    file_carries(Path::new(&format!("/proc/{pid}/environ")), entry)
}

/// The same, asked of each thread: with the first one its view of the memory has gone.
fn a_thread_has_mark(pid: i32, entry: &[u8]) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let mut threads = threads.into_iter().flatten().flatten();
    threads.any(|thread| file_carries(&thread.path().join("environ"), entry))
}

fn file_carries(environ: &Path, entry: &[u8]) -> bool {
    // What cannot be read ended meanwhile, or is another user's.
    File::open(environ).is_ok_and(|file| carries(file, entry).unwrap_or(false))
}

/// Whether the entry stands in a list of entries that end with NUL, however long that is.
fn carries(mut environ: impl Read, entry: &[u8]) -> io::Result<bool> {
    let mut block = vec![0; BLOCK_BYTES];
    // How many bytes of the current entry have been read and are those of the one that is sought.
    let mut matched = Some(0);
    loop {
        let length = match environ.read(&mut block) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        for byte in block.get(..length).unwrap_or_default() {
            matched = match (*byte, matched) {
                (0, Some(count)) if count == entry.len() => return Ok(true),
                (0, _) => Some(0),
                (byte, Some(count)) if entry.get(count) == Some(&byte) => Some(count + 1),
                _ => None,
            };
        }
        if length == 0 {
            return Ok(matched == Some(entry.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_a_whole_entry_however_far_behind_it_stands() {
        let found = |environ: &[u8]| carries(environ, b"A=1").unwrap();
        assert!(found(b"A=1"));
        assert!(found(b"B=2\0A=1\0"));
        assert!(!found(b"A=12\0"));
        assert!(!found(b"BA=1\0"));
        assert!(!found(b"A=\0"));
        assert!(!found(b""));
        for before in [BLOCK_BYTES - 2, BLOCK_BYTES, 6 << 20] {
            let mut environ = vec![b'x'; before];
            environ.extend(b"\0A=1\0Z=1\0");
            assert!(found(&environ), "behind {before} bytes");
        }
    }
}
