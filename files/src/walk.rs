//! Opens a directory from `/` down, one component at a time.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, fchmod, fstat, mkdirat, openat, readlinkat, statat,
};
use rustix::io::Errno;

use crate::checks::{self, PERMISSIONS};
use crate::{PRIVATE_DIR, Refusal};

/// Symbolic links that are followed on one way; the kernel's own bound is the same (path_resolution(7)).
const SYMLINKS_MAX: usize = 40;
/// Mode of directories that root lacks on the way to one of the daemon's own.
const PUBLIC_DIR: u32 = 0o755;

/// The reaction to a missing directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The walk fails.
    Fails,
    /// Create it with this mode; directories leading to it are made passable for others if they belong to root.
    Made(u32),
}

/// A directory reached, and its path without symbolic links.
pub(crate) struct Reached {
    pub(crate) fd: OwnedFd,
    pub(crate) path: PathBuf,
}

/// How a directory is opened on the way: for looking further only, so that search permission is enough.
const PASSING: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
/// How a directory is opened that is used.
const USING: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

pub(crate) fn system(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> Refusal + use<> {
    let path = path.to_owned();
    move |errno| Refusal::System {
        what,
        path,
        source: errno.into(),
    }
}

/// Walks to `path`. Every directory on the path must belong to root or this user, and no one else may be able to
/// rename its entries; a symbolic link is followed only in a directory that no one else can write to.
pub(crate) fn walk(path: &Path, missing: Missing) -> Result<Reached, Refusal> {
    if !path.is_absolute() {
        return Err(Refusal::NotAbsolute {
            path: path.to_owned(),
        });
    }
    let root = openat(CWD, "/", PASSING, Mode::empty());
    let root = root.map_err(system("opening the directory", Path::new("/")))?;
    let mut way = Way {
        above: vec![Reached {
            fd: root,
            path: "/".into(),
        }],
        left: names(path),
        symlinks: 0,
    };
    while let Some(name) = way.left.pop_front() {
        way.step(&name, missing, path)?;
    }
    let last = way.last();
    let used = openat(&last.fd, ".", USING, Mode::empty());
    let fd = used.map_err(system("opening the directory", &last.path))?;
    Ok(Reached {
        fd,
        path: last.path.clone(),
    })
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(name).collect()
}

struct Way {
    /// From the root to where the walk is; never empty.
    above: Vec<Reached>,
    /// The rest of the path.
    left: VecDeque<OsString>,
    symlinks: usize,
}

impl Way {
    fn last(&self) -> &Reached {
        &self.above[self.above.len() - 1]
    }

    fn step(&mut self, name: &OsStr, missing: Missing, wanted: &Path) -> Result<(), Refusal> {
        if name == ".." {
            // The walked part has no symbolic links: its parent is the one above.
            self.above
                .truncate(self.above.len().saturating_sub(1).max(1));
            return Ok(());
        }
        let path = self.last().path.join(name);
        match openat(&self.last().fd, name, PASSING, Mode::empty()) {
            Ok(fd) => self.enter(fd, path),
            Err(Errno::NOENT) => match missing {
                Missing::Fails => Err(system("opening the directory", &path)(Errno::NOENT)),
                Missing::Made(mode) => self.make(name, path, mode),
            },
            Err(Errno::NOTDIR | Errno::LOOP) => self.no_directory(name, &path, wanted),
            Err(errno) => Err(system("opening the directory", &path)(errno)),
        }
    }

    fn enter(&mut self, fd: OwnedFd, path: PathBuf) -> Result<(), Refusal> {
        let stat = fstat(&fd).map_err(system("looking at", &path))?;
        checks::on_the_way(&stat, &path)?;
        self.above.push(Reached { fd, path });
        Ok(())
    }

    fn make(&mut self, name: &OsStr, path: PathBuf, mode: u32) -> Result<(), Refusal> {
        let mode = match (self.left.is_empty(), checks::own_uid()) {
            (true, _) => mode,
            (false, 0) => PUBLIC_DIR,
            (false, _) => PRIVATE_DIR,
        };
        let fd = make_at(&self.last().fd, name, &path, mode)?;
        self.above.push(Reached { fd, path });
        Ok(())
    }

    /// Handles an entry that is not a directory: a symbolic link is followed if no one else can have planted it.
    fn no_directory(&mut self, name: &OsStr, path: &Path, wanted: &Path) -> Result<(), Refusal> {
        let here = self.last();
        let found = statat(&here.fd, name, AtFlags::SYMLINK_NOFOLLOW);
        let found = found.map_err(system("looking at", path))?;
        let kind = FileType::from_raw_mode(found.st_mode);
        if kind != FileType::Symlink {
            return Err(Refusal::Type {
                path: path.to_owned(),
                found: checks::describe(kind),
                wanted: "a directory",
            });
        }
        let around = fstat(&here.fd).map_err(system("looking at", &here.path))?;
        if checks::others_can_write(&around) {
            return Err(Refusal::Symlink {
                path: path.to_owned(),
            });
        }
        let target = readlinkat(&here.fd, name, Vec::new());
        let target = target.map_err(system("reading the symbolic link", path))?;
        self.symlinks += 1;
        if self.symlinks > SYMLINKS_MAX {
            return Err(Refusal::TooManySymlinks {
                path: wanted.to_owned(),
            });
        }
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        if target.is_absolute() {
            self.above.truncate(1);
        }
        let mut left = names(&target);
        left.append(&mut self.left);
        self.left = left;
        Ok(())
    }
}

/// Creates a directory with exactly this mode, whatever the umask. A directory created by someone else in the
/// meantime is checked like any other.
pub(crate) fn make_at(
    above: &OwnedFd,
    name: &OsStr,
    path: &Path,
    mode: u32,
) -> Result<OwnedFd, Refusal> {
    match mkdirat(above, name, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(system("making the directory", path)(errno)),
    }
    // The umask may have taken away even the owner's permission to open it.
    let fd = openat(above, name, PASSING, Mode::empty());
    let fd = fd.map_err(system("opening the directory", path))?;
    let stat = fstat(&fd).map_err(system("looking at", path))?;
    checks::on_the_way(&stat, path)?;
    set_mode(&fd, &stat, path, mode)?;
    Ok(fd)
}

/// Changes the mode of this user's file or directory, where it differs. `fd` may be one for looking only.
pub(crate) fn set_mode(
    fd: &OwnedFd,
    stat: &rustix::fs::Stat,
    path: &Path,
    mode: u32,
) -> Result<(), Refusal> {
    if stat.st_mode & PERMISSIONS == mode || stat.st_uid != checks::own_uid() {
        return Ok(());
    }
    let changed = fchmod(fd, Mode::from_raw_mode(mode)).or_else(|_| {
        // A descriptor for looking only takes no fchmod; its name in /proc leads to the same file.
        let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
        rustix::fs::chmod(name, Mode::from_raw_mode(mode))
    });
    changed.map_err(system("changing the mode of", path))
}
