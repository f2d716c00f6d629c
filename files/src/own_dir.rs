//! A directory of the daemon and the files in it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fstat, openat, statat};
use rustix::io::Errno;

use crate::checks;
use crate::walk::{self, Missing, Reached, set_mode, system};
use crate::{PRIVATE_DIR, PRIVATE_FILE, Refusal};

/// How files are opened: never through a symbolic link, and never waiting for a FIFO's other end.
const SAFELY: OFlags = OFlags::NOFOLLOW
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

/// A directory reached from `/` down, with every owner, mode and type on the path checked. It is held open:
/// everything opened through it is in this directory, even if its name leads elsewhere later.
#[derive(Debug)]
pub struct OwnDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl OwnDir {
    /// Opens a directory of this user, and creates it with `mode` if it is missing. If it exists, permissions not in
    /// `mode` are removed; a directory that others can write to is refused, because their files cannot be
    /// distinguished from the daemon's.
    ///
    /// # Errors
    /// If owner, mode or type of anything on the way lets another user change what is written, or the system
    /// refuses.
    pub fn make(path: &Path, mode: u32) -> Result<Self, Refusal> {
        let reached = walk::walk(path, Missing::Made(mode))?;
        Self::mended(reached, mode)
    }

    /// As [`OwnDir::make`] with mode 0700, for a directory that an operator names: one that others can look into is
    /// taken from them only when it is empty or holds one of `marks`. What was named by mistake, such as `/var/lib`,
    /// stays as it is.
    ///
    /// # Errors
    /// As [`OwnDir::make`]; also when it holds something else.
    pub fn make_private(path: &Path, marks: &[&str]) -> Result<Self, Refusal> {
        let reached = walk::walk(path, Missing::Made(PRIVATE_DIR))?;
        let stat = fstat(&reached.fd).map_err(system("looking at", &reached.path))?;
        let found = Self {
            fd: reached.fd,
            path: reached.path,
        };
        if stat.st_mode & 0o077 != 0 && !found.is_ours(marks)? {
            return Err(Refusal::Strange { path: found.path });
        }
        let Self { fd, path } = found;
        Self::mended(Reached { fd, path }, PRIVATE_DIR)
    }

    fn is_ours(&self, marks: &[&str]) -> Result<bool, Refusal> {
        let names = self.names()?;
        let marked = names
            .iter()
            .any(|name| marks.iter().any(|mark| name == mark));
        Ok(marked || names.is_empty())
    }

    fn names(&self) -> Result<Vec<OsString>, Refusal> {
        let reading = || system("reading", &self.path);
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd).map_err(reading())? {
            let entry = entry.map_err(reading())?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Opens a directory in which only root and this user can replace their own entries: `/run` or `/tmp`, but also a
    /// directory of this user.
    ///
    /// # Errors
    /// As [`OwnDir::make`]; also when it is missing.
    pub fn shared(path: &Path) -> Result<Self, Refusal> {
        let Reached { fd, path } = walk::walk(path, Missing::Fails)?;
        Ok(Self { fd, path })
    }

    fn mended(reached: Reached, mode: u32) -> Result<Self, Refusal> {
        let Reached { fd, path } = reached;
        let stat = fstat(&fd).map_err(system("looking at", &path))?;
        checks::own_directory(&stat, &path)?;
        set_mode(&fd, &stat, &path, stat.st_mode & mode)?;
        Ok(Self { fd, path })
    }

    /// Its path, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the directory `name` in this one, as [`OwnDir::make`].
    ///
    /// # Errors
    /// As [`OwnDir::make`].
    pub fn below(&self, name: impl AsRef<OsStr>, mode: u32) -> Result<Self, Refusal> {
        let name = name.as_ref();
        Self::make(&self.path.join(name), mode)
    }

    /// Opens the file `name` for reading and writing, and makes it where it is missing. What it holds stays. From
    /// then on it is for its owner only.
    ///
    /// # Errors
    /// If it is not a regular file, is a symbolic link, belongs to another user, has other hard links, or the system
    /// refuses.
    pub fn file(&self, name: impl AsRef<OsStr>) -> Result<File, Refusal> {
        self.open(name.as_ref(), OFlags::RDWR | OFlags::CREATE)
    }

    /// As [`OwnDir::file`], for appending only.
    ///
    /// # Errors
    /// As [`OwnDir::file`].
    pub fn append(&self, name: impl AsRef<OsStr>) -> Result<File, Refusal> {
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE;
        self.open(name.as_ref(), flags)
    }

    /// As [`OwnDir::file`], emptied.
    ///
    /// # Errors
    /// As [`OwnDir::file`].
    pub fn empty_file(&self, name: impl AsRef<OsStr>) -> Result<File, Refusal> {
        let name = name.as_ref();
        // Emptied once it is known what it is, not while it is opened.
        let file = self.file(name)?;
        rustix::fs::ftruncate(&file, 0).map_err(system("emptying", &self.path.join(name)))?;
        Ok(file)
    }

    /// Has the file `name` hold `bytes` and nothing else.
    ///
    /// # Errors
    /// As [`OwnDir::file`].
    pub fn write(&self, name: impl AsRef<OsStr>, bytes: &[u8]) -> Result<(), Refusal> {
        let name = name.as_ref();
        let mut file = self.empty_file(name)?;
        file.write_all(bytes).map_err(|source| Refusal::System {
            what: "writing",
            path: self.path.join(name),
            source,
        })
    }

    fn open(&self, name: &OsStr, flags: OFlags) -> Result<File, Refusal> {
        let path = self.path.join(name);
        let mode = Mode::from_raw_mode(PRIVATE_FILE);
        let opened = openat(&self.fd, name, SAFELY | flags, mode).map_err(|errno| match errno {
            Errno::LOOP => Refusal::Symlink { path: path.clone() },
            // A FIFO that nobody reads, opened for writing, or a socket.
            Errno::NXIO => self.refuse_type(name, &path),
            errno => system("opening", &path)(errno),
        })?;
        let stat = fstat(&opened).map_err(system("looking at", &path))?;
        checks::own_file(&stat, &path)?;
        set_mode(&opened, &stat, &path, PRIVATE_FILE)?;
        Ok(opened.into())
    }

    fn refuse_type(&self, name: &OsStr, path: &Path) -> Refusal {
        match statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Refusal::Type {
                path: path.to_owned(),
                found: checks::describe(FileType::from_raw_mode(stat.st_mode)),
                wanted: "a regular file",
            },
            Err(errno) => system("looking at", path)(errno),
        }
    }

    /// Makes every entry directly in the directory accessible only to its owner; deeper entries stay unchanged, since
    /// no one else can reach them. Sockets keep their mode.
    ///
    /// # Errors
    /// If something in it is a symbolic link, a device or a FIFO, belongs to another user, or the system refuses.
    pub fn mend(&self) -> Result<(), Refusal> {
        for name in self.names()? {
            self.mend_one(&name)?;
        }
        Ok(())
    }

    fn mend_one(&self, name: &OsStr) -> Result<(), Refusal> {
        let path = self.path.join(name);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            // Removed since the directory was read: SQLite does so with its log.
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(system("opening", &path)(errno)),
        };
        let stat = fstat(&fd).map_err(system("looking at", &path))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => Err(Refusal::Symlink { path }),
            FileType::Socket => Ok(()),
            FileType::Directory => {
                checks::own_directory(&stat, &path)?;
                set_mode(&fd, &stat, &path, stat.st_mode & PRIVATE_DIR)
            }
            _ => {
                checks::own_file(&stat, &path)?;
                set_mode(&fd, &stat, &path, PRIVATE_FILE)
            }
        }
    }
}
