//! The kernel's files, as a user-space file system.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, FileAttr, FileType, Filesystem, MountOption, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow,
};
use nix::libc::{EINVAL, ENOENT, EPERM};
use nix::mount::{MntFlags, umount2};

use crate::mk::Mk;

const NOW: Duration = Duration::ZERO;
const DIRECT_IO: u32 = 1;
/// Maximum size of a write that the kernel's file system passes on, bytes.
const PAGE: usize = 4096;

/// A kernel whose files are mounted until drop.
pub struct Emulator {
    // Unmounted before the directory is removed.
    session: Option<BackgroundSession>,
    directory: PathBuf,
    /// Its own directory, if no directory was given.
    own: Option<tempfile::TempDir>,
    /// The kernel behind the files.
    pub mk: Arc<Mutex<Mk>>,
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // A lazy unmount: a program may have a file open, which keeps the session alive.
        let _ = umount2(&self.root(), MntFlags::MNT_DETACH);
        drop(self.session.take());
    }
}

impl Emulator {
    /// Mounts a kernel's files in a directory of its own. Requires root.
    pub fn start() -> Self {
        let own = tempfile::tempdir().unwrap();
        let mut emulator = Self::at(own.path());
        emulator.own = Some(own);
        emulator
    }

    /// Mounts a kernel's files at `multikernel` in this directory, next to an empty directory `run`. Requires root.
    pub fn at(directory: &Path) -> Self {
        let mk = Arc::new(Mutex::new(Mk::new()));
        let root = directory.join("multikernel");
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(directory.join("run")).unwrap();
        let files = Files {
            mk: Arc::clone(&mk),
            paths: vec![PathBuf::from("/")],
            numbers: HashMap::from([(PathBuf::from("/"), 1)]),
        };
        let options = [MountOption::FSName("multikernel".into())];
        let session = fuser::spawn_mount2(files, &root, &options);
        Self {
            session: Some(session.expect("mounting takes root and /dev/fuse")),
            directory: directory.to_owned(),
            own: None,
            mk,
        }
    }

    /// Returns the mount point, the equivalent of `/sys/fs/multikernel`.
    pub fn root(&self) -> PathBuf {
        self.directory.join("multikernel")
    }

    /// Returns the path of a file next to the mount.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

struct Files {
    mk: Arc<Mutex<Mk>>,
    /// Paths by inode number, which is the index plus one.
    paths: Vec<PathBuf>,
    numbers: HashMap<PathBuf, u64>,
}

enum Entry {
    Directory(Vec<String>),
    File {
        content: Vec<u8>,
        mode: u16,
        size: u64,
    },
}

fn file(content: impl Into<Vec<u8>>) -> Option<Entry> {
    Some(Entry::File {
        content: content.into(),
        mode: 0o444,
        size: 0,
    })
}

impl Files {
    fn number(&mut self, path: &Path) -> u64 {
        if let Some(number) = self.numbers.get(path) {
            return *number;
        }
        self.paths.push(path.to_owned());
        let number = self.paths.len() as u64;
        self.numbers.insert(path.to_owned(), number);
        number
    }

    fn path(&self, number: u64) -> PathBuf {
        let index = usize::try_from(number).unwrap() - 1;
        self.paths.get(index).cloned().unwrap_or_default()
    }

    fn entry(&self, path: &Path) -> Option<Entry> {
        let mk = self.mk.lock().unwrap();
        let parts: Vec<&str> = path.iter().skip(1).filter_map(OsStr::to_str).collect();
        let names = |names: &[&str]| {
            Some(Entry::Directory(
                names.iter().map(|n| (*n).to_owned()).collect(),
            ))
        };
        match parts.as_slice() {
            [] => names(&["device_tree", "instances", "overlays"]),
            ["device_tree"] => Some(Entry::File {
                content: mk.pool_tree(),
                mode: 0o644,
                size: 1 << 20,
            }),
            ["instances"] => Some(Entry::Directory(
                mk.instances.iter().map(|i| i.name.clone()).collect(),
            )),
            ["instances", name, rest @ ..] => {
                let instance = mk.instances.iter().find(|i| i.name == *name)?;
                match rest {
                    [] => names(&["id", "status", "device_tree"]),
                    ["id"] => file(format!("{}\n", instance.id)),
                    ["status"] => file(format!("{}\n", instance.shown())),
                    ["device_tree"] => file(mk.instance_tree(name)?),
                    _ => None,
                }
            }
            ["overlays"] => {
                let transactions = mk.transactions.keys().map(|n| format!("tx_{n}"));
                Some(Entry::Directory(
                    transactions.chain(["new".to_owned()]).collect(),
                ))
            }
            ["overlays", "new"] => Some(Entry::File {
                content: Vec::new(),
                mode: 0o200,
                size: 0,
            }),
            ["overlays", transaction, rest @ ..] => {
                let number = transaction.strip_prefix("tx_")?.parse().ok()?;
                let transaction = mk.transactions.get(&number)?;
                match rest {
                    [] => names(&["id", "status", "instance", "resources", "dtbo"]),
                    ["id"] => file(format!("{number}\n")),
                    ["status"] => file(format!("{}\n", transaction.status)),
                    ["instance"] => file(format!("{}\n", transaction.target)),
                    ["resources"] => file("unknown\n"),
                    ["dtbo"] => file(transaction.blob.clone()),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    fn attributes(&mut self, path: &Path) -> Option<FileAttr> {
        let (kind, perm, size) = match self.entry(path)? {
            Entry::Directory(_) => (FileType::Directory, 0o755, 0),
            Entry::File { mode, size, .. } => (FileType::RegularFile, mode, size),
        };
        Some(FileAttr {
            ino: self.number(path),
            size,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn write_to(&mut self, path: &Path, offset: i64, data: &[u8]) -> Result<usize, i32> {
        let mut mk = self.mk.lock().unwrap();
        match path.to_str() {
            Some("/device_tree") => mk.write_baseline(data).map(|()| data.len()),
            Some("/overlays/new") if offset != 0 || data.is_empty() => Err(EINVAL),
            Some("/overlays/new") => {
                let taken = data.len().min(PAGE);
                mk.write_overlay(&data[..taken]).map(|()| taken)
            }
            _ => Err(EPERM),
        }
    }
}

impl Filesystem for Files {
    fn lookup(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEntry) {
        let path = self.path(parent).join(name);
        match self.attributes(&path) {
            Some(attributes) => reply.entry(&NOW, &attributes, 0),
            None => reply.error(ENOENT),
        }
    }

    fn getattr(&mut self, _: &Request<'_>, ino: u64, _: Option<u64>, reply: ReplyAttr) {
        match self.attributes(&self.path(ino)) {
            Some(attributes) => reply.attr(&NOW, &attributes),
            None => reply.error(ENOENT),
        }
    }

    /// Writers open with truncation, which has no effect here.
    fn setattr(
        &mut self,
        request: &Request<'_>,
        ino: u64,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        fh: Option<u64>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<u32>,
        reply: ReplyAttr,
    ) {
        self.getattr(request, ino, fh, reply);
    }

    fn open(&mut self, _: &Request<'_>, _: u64, _: i32, reply: ReplyOpen) {
        reply.opened(0, DIRECT_IO);
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        ino: u64,
        _: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        match self.entry(&self.path(ino)) {
            Some(Entry::File { content, .. }) => {
                let start = usize::try_from(offset).unwrap_or(0).min(content.len());
                let end = (start + size as usize).min(content.len());
                reply.data(&content[start..end]);
            }
            _ => reply.error(ENOENT),
        }
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        ino: u64,
        _: u64,
        offset: i64,
        data: &[u8],
        _: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyWrite,
    ) {
        match self.write_to(&self.path(ino), offset, data) {
            Ok(taken) => reply.written(u32::try_from(taken).unwrap()),
            Err(error) => reply.error(error),
        }
    }

    fn fsync(&mut self, _: &Request<'_>, _: u64, _: u64, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(
        &mut self,
        _: &Request<'_>,
        ino: u64,
        _: u64,
        offset: i64,
        mut reply: ReplyDirectory,
    ) {
        let path = self.path(ino);
        let Some(Entry::Directory(names)) = self.entry(&path) else {
            reply.error(ENOENT);
            return;
        };
        for (number, name) in (1_i64..)
            .zip(names)
            .skip(usize::try_from(offset).unwrap_or(0))
        {
            let child = path.join(&name);
            let kind = match self.entry(&child) {
                Some(Entry::Directory(_)) => FileType::Directory,
                _ => FileType::RegularFile,
            };
            if reply.add(self.number(&child), number, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn mkdir(&mut self, _: &Request<'_>, _: u64, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(EPERM);
    }

    fn rmdir(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("tx_")?.parse().ok());
        let removed = match (self.path(parent).to_str(), number) {
            (Some("/overlays"), Some(number)) => self.mk.lock().unwrap().remove_transaction(number),
            _ => Err(EPERM),
        };
        match removed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }
}
