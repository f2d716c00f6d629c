//! Finds a place in which kmorph may create cgroups: one delegated to this process, or an unmanaged one.
//!
//! | cgroup of this process | place |
//! |---|---|
//! | a cgroup that systemd delegated to its unit (`Delegate=yes`) | that cgroup |
//! | the subgroup of such a unit (`DelegateSubgroup=`) | the unit's cgroup |
//! | a cgroup created by another kmorph, of which this process is a workload | its own cgroup, so it stays contained |
//! | any other | the top of the mounted hierarchy, which requires root or a container's own hierarchy |
//!
//! Whether the place is writable shows only on use.
//!
//! In a cgroup that systemd delegated, no controller is enabled. A process cannot enter a cgroup whose children have a
//! controller, and systemd starts the daemon through the unit's own cgroup, even with `DelegateSubgroup=`: while
//! instances run, systemd could not restart it.

use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{getxattr, statfs};
use rustix::io::Errno;

use super::{NoCgroups, OWN_NAME};

/// Extended attributes with which systemd marks delegated cgroups; the second one is for readers without access to the
/// first.
const DELEGATED: [&str; 2] = ["trusted.delegate", "user.delegate"];

/// The type that statfs(2) returns for a cgroup2 file system (include/uapi/linux/magic.h).
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// The place for this process's cgroups.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Directory in which they are created.
    pub(super) path: PathBuf,
    /// True if systemd has delegated the cgroup, and keeps starting processes in it.
    pub(super) is_delegated: bool,
}

/// Finds the place for the cgroups of this process, without trying it.
pub(super) fn find() -> Result<Place, NoCgroups> {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .map_err(|error| NoCgroups(format!("{path} cannot be read: {error}")))
    };
    let own = own_path(&read("/proc/self/cgroup")?)
        .ok_or_else(|| NoCgroups("this kernel has no cgroups of version 2".to_owned()))?;
    let mounts = read("/proc/self/mountinfo")?;
    let visible = mounts
        .lines()
        .filter_map(mount)
        .find_map(|(root, point)| Some((point.join(own.strip_prefix(&root).ok()?), point)));
    let (own, top) =
        visible.ok_or_else(|| NoCgroups("no cgroup2 file system is mounted".to_owned()))?;
    Ok(choose(&own, &top, is_delegated))
}

fn choose(own: &Path, top: &Path, is_delegated: impl Fn(&Path) -> bool) -> Place {
    let place = |path: &Path| Place {
        path: path.to_owned(),
        is_delegated: is_delegated(path),
    };
    let below = own.strip_prefix(top).unwrap_or(Path::new(""));
    let is_workload = below
        .components()
        .any(|name| name == Component::Normal(OWN_NAME.as_ref()));
    if is_workload || is_delegated(own) {
        return place(own);
    }
    match own.parent() {
        Some(unit) if own != top && is_delegated(unit) => place(unit),
        _ => place(top),
    }
}

/// Returns the path of this process in the version 2 hierarchy (cgroups(7), /proc/pid/cgroup).
fn own_path(list: &str) -> Option<PathBuf> {
    let path = list.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(PathBuf::from(
        path.strip_suffix(" (deleted)").unwrap_or(path),
    ))
}

/// Returns the root and mount point of a cgroup2 file system (proc_pid_mountinfo(5)).
fn mount(line: &str) -> Option<(PathBuf, PathBuf)> {
    let (fields, source) = line.split_once(" - ")?;
    if source.split(' ').next()? != "cgroup2" {
        return None;
    }
    let mut fields = fields.split(' ').skip(3);
    let mut next = || fields.next().map(|text| PathBuf::from(unescaped(text)));
    Some((next()?, next()?))
}

/// Decodes blanks and backslashes, which are written as three octal digits.
fn unescaped(text: &str) -> String {
    let mut plain = text.to_owned();
    for (code, character) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        plain = plain.replace(code, character);
    }
    plain
}

fn is_delegated(directory: &Path) -> bool {
    DELEGATED
        .iter()
        .any(|name| attribute(directory, name).is_some_and(|value| value == *b"1"))
}

/// Returns the value of an extended attribute, if it is one byte long.
fn attribute(path: &Path, name: &str) -> Option<[u8; 1]> {
    let mut value = [0; 1];
    let length = getxattr(path, name, &mut value).ok()?;
    (length == value.len()).then_some(value)
}

/// Checks that the nearest existing directory above `path` is a cgroup: only then does the absence of `path` have a
/// meaning.
///
/// # Errors
/// If it is not a cgroup.
pub(super) fn is_cgroup2(path: &Path) -> io::Result<()> {
    for above in path.ancestors().skip(1) {
        match statfs(above) {
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
            Ok(found) if found.f_type == CGROUP2_SUPER_MAGIC => return Ok(()),
            Ok(_) => break,
        }
    }
    let text = format!("no cgroup2 file system is mounted where {path:?} was");
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_delegated_is_used_and_what_was_not_is_left_alone() {
        let chosen = |own: &str, delegated: &'static str| {
            let is_delegated = |path: &Path| path == Path::new(delegated);
            choose(Path::new(own), Path::new("/cg"), is_delegated)
        };
        let place = |path: &str, is_delegated| Place {
            path: path.into(),
            is_delegated,
        };
        let unit = "/cg/system.slice/kmorphd.service";
        assert_eq!(chosen(unit, unit), place(unit, true));
        let subgroup = "/cg/system.slice/kmorphd.service/daemon";
        assert_eq!(chosen(subgroup, unit), place(unit, true));
        let session = "/cg/user.slice/user-0.slice/session-1.scope";
        assert_eq!(chosen(session, unit), place("/cg", false));
        assert_eq!(chosen("/cg", unit), place("/cg", false));
        let workload = "/cg/kmorph/run-kmorph/web.1";
        assert_eq!(chosen(workload, unit), place(workload, false));
    }

    #[test]
    fn the_hierarchy_of_version_2_is_found_among_others() {
        let list = "9:name=systemd:/\n0::/a b (deleted)\n";
        assert_eq!(own_path(list), Some(PathBuf::from("/a b")));
        assert_eq!(own_path("4:memory:/x\n"), None);
        let line = r"41 31 0:38 /in /sys/fs/c\040g rw,relatime shared:4 - cgroup2 cgroup2 rw";
        let found = mount(line).unwrap();
        assert_eq!(found, ("/in".into(), "/sys/fs/c g".into()));
        assert_eq!(mount("41 31 0:38 / /c rw - cgroup cgroup rw,cpu"), None);
    }

    #[test]
    fn an_absence_means_nothing_where_no_cgroups_are() {
        let dir = tempfile::tempdir().unwrap();
        assert!(is_cgroup2(&dir.path().join("kmorph/web.1")).is_err());
    }
}
